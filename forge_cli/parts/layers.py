"""Finds the decoder layers of a causal language model, with or without PEFT around it."""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from forge_cli.errors import ModelError


def unwrap_model(model: nn.Module) -> nn.Module:
    """Returns the transformers model inside a PEFT model, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def find_decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Finds the list of decoder layers.

    It is the ``nn.ModuleList`` whose length is the configuration's ``num_hidden_layers``; where several have
    that length (an encoder beside a decoder), the one with the most parameters.

    Raises:
        ModelError: No such list exists.
    """
    base = unwrap_model(model)
    config = base.config.get_text_config()
    lists = [
        module
        for module in base.modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    ]
    if not lists:
        raise ModelError(
            f"no list of {config.num_hidden_layers} decoder layers was found in {type(base).__name__}",
            why="layers are frozen and monitored by their number",
            fix="use freeze.patterns with module names instead of freeze.first",
        )
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))


def find_layer_prefix(model: nn.Module) -> str:
    """Returns the name of the decoder layers inside the unwrapped model, such as ``model.layers``."""
    layers = find_decoder_layers(model)
    return next(name for name, module in unwrap_model(model).named_modules() if module is layers)


def find_linear_names(model: nn.Module) -> list[str]:
    """Lists the last name parts of all linear layers inside the decoder layers, in order of first use.

    Counts ``nn.Linear`` and its quantised subclasses, and GPT-2's ``Conv1D``: what PEFT puts adapters on.
    """
    names: dict[str, None] = {}
    for name, module in find_decoder_layers(model).named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            names.setdefault(name.rsplit(".", 1)[-1])
    return list(names)


class ParameterGroups:
    """Sorts trainable parameters by the decoder layer they belong to.

    Attributes:
        names: Parameter names, in model order.
        parameters: The parameters, in the same order.
        labels: One label per group: ``layer 0``, ``layer 1``, ..., ``outside layers``.
        index: ``[P]`` group of each parameter.
    """

    def __init__(self, model: nn.Module) -> None:
        pattern = re.compile(re.escape(find_layer_prefix(model)) + r"\.(\d+)\.")
        self.names: list[str] = []
        self.parameters: list[nn.Parameter] = []
        layer_of: list[int | None] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                found = pattern.search(name)
                self.names.append(name)
                self.parameters.append(parameter)
                layer_of.append(int(found.group(1)) if found else None)
        layers = sorted({layer for layer in layer_of if layer is not None})
        self.labels = [f"layer {layer}" for layer in layers]
        if None in layer_of:
            self.labels.append("outside layers")
        position = {layer: place for place, layer in enumerate(layers)}
        self.index = torch.tensor([position.get(layer, len(layers)) for layer in layer_of], dtype=torch.long)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Returns (all, trainable) parameters; a packed 4-bit tensor counts its unpacked elements."""
    total = trainable = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = math.prod(state.shape) if state is not None else parameter.numel()
        total += count
        trainable += count if parameter.requires_grad else 0
    return total, trainable


def measure_norms(groups: ParameterGroups) -> tuple[torch.Tensor, torch.Tensor]:
    """Measures the gradient norm of every trainable parameter, without a host sync.

    Args:
        groups: The trainable parameters. One without a gradient counts as 0.

    Shapes:
        Returns ``norms [P]`` in float32, in the order of ``groups.names``, and their 2-norm ``total []``.
    """
    gradients = [p.grad for p in groups.parameters if p.grad is not None]
    if not gradients:
        zeros = torch.zeros(len(groups.parameters))
        return zeros, zeros.sum()
    device = gradients[0].device
    measured = iter(torch._foreach_norm(gradients, dtype=torch.float32))
    zero = torch.zeros((), device=device)
    norms = torch.stack([zero if p.grad is None else next(measured).to(device) for p in groups.parameters])
    return norms, torch.linalg.vector_norm(norms)
