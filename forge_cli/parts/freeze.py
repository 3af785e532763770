"""Layer freezing that saves compute and memory ("frozen prefix", LP-LoRA style).

Setting ``requires_grad=False`` on the first layers saves almost nothing by itself: with activation checkpointing
on, transformers makes the embedding's output require a gradient, so autograd walks back through every frozen layer
and recomputes it on the way. Here the frozen layers run under ``torch.no_grad()``: one forward each, no backward,
nothing saved. The loss and the gradients of the other layers are the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MethodType

import torch
from torch import nn

from forge_cli.errors import ModelError
from forge_cli.facts.layer_count import count_frozen_layers
from forge_cli.parts.layers import find_decoder_layers, unwrap_model


@dataclass(frozen=True)
class FreezeReport:
    """What freezing did.

    Attributes:
        num_layers: Decoder layers of the model.
        num_frozen_layers: Decoder layers, from the input, in which nothing is trained.
        num_frozen_parameters: Parameters that were trainable before and are not any more.
        num_trainable_parameters: Parameters that are trained.
        prefix_without_grad: Whether the frozen layers run without autograd.
        blocked_by: Name of a trainable parameter at or below the frozen layers that forbids it; empty if none.
    """

    num_layers: int
    num_frozen_layers: int
    num_frozen_parameters: int
    num_trainable_parameters: int
    prefix_without_grad: bool
    blocked_by: str = ""

    def layer_map(self) -> str:
        """Draws the layers from input to output: ``[····####] 4 of 8 layers frozen``."""
        width = min(self.num_layers, 64)
        frozen = round(width * self.num_frozen_layers / self.num_layers)
        return f"[{'·' * frozen}{'#' * (width - frozen)}] {self.num_frozen_layers} of {self.num_layers} layers frozen"

    def compute_ratio(self, *, trains_weights: bool, activation_checkpointing: bool) -> float:
        """Returns the matmul work of the decoder layers relative to freezing nothing (0 to 1).

        Formula:
            ``f * 2 / c + (1 - f)`` with ``f`` the frozen share and ``c`` the units of work per trained layer:
            forward 2, gradient of activations 2, gradient of weights 2 (full training only), recomputation 2
            (checkpointing only). A frozen layer costs its forward alone.
        """
        if not self.prefix_without_grad:
            return 1.0
        units = 4 + 2 * trains_weights + 2 * activation_checkpointing
        share = self.num_frozen_layers / self.num_layers
        return share * 2 / units + (1 - share)


def freeze_layers(
    model: nn.Module, num_frozen_layers: int, *, embeddings: bool = True, patterns: Sequence[str] = ()
) -> FreezeReport:
    """Freezes the first decoder layers and runs them without autograd where nothing trainable lies below them.

    Works on a plain model and on a PEFT model, whose adapters in those layers are frozen as well. Call it after
    the adapters are placed. It may be called again (after other modules were made trainable): the decision to run
    without autograd is taken anew.

    Args:
        model: A transformers causal language model, or a PEFT model around one.
        num_frozen_layers: Decoder layers to freeze, counted from the input.
        embeddings: Freeze the input embeddings too. A tied output head is the same tensor and is frozen with it.
        patterns: Shell patterns of module names whose parameters are frozen as well.

    Returns:
        What was frozen.

    Raises:
        ModelError: A pattern matches nothing, or nothing trainable is left.
    """
    base = unwrap_model(model)
    layers = find_decoder_layers(model)
    if not 0 <= num_frozen_layers <= len(layers):
        raise ModelError(
            f"{num_frozen_layers} layers are to be frozen, and the model has {len(layers)} decoder layers",
            where="freeze.first",
            fix=f'write a count from 1 to {len(layers) - 1}, or a share such as "50%"',
        )
    before = _count_trainable(model)
    for layer in layers[:num_frozen_layers]:
        layer.requires_grad_(False)
    if embeddings:
        base.get_input_embeddings().requires_grad_(False)
    for pattern in patterns:
        _freeze_pattern(model, pattern)
    trainable = _count_trainable(model)
    if trainable == 0:
        raise ModelError(
            "freezing leaves nothing to train",
            why=f"{num_frozen_layers} of {len(layers)} layers, embeddings {'and' if embeddings else 'not'} frozen",
            fix="lower freeze.first or take a pattern out",
        )
    blocked_by = find_trainable_below(model, num_frozen_layers)
    for index, layer in enumerate(layers):
        _set_without_grad(layer, index < num_frozen_layers and not blocked_by)
    return FreezeReport(
        num_layers=len(layers),
        num_frozen_layers=num_frozen_layers,
        num_frozen_parameters=before - trainable,
        num_trainable_parameters=trainable,
        prefix_without_grad=num_frozen_layers > 0 and not blocked_by,
        blocked_by=blocked_by,
    )


def find_trainable_below(model: nn.Module, num_frozen_layers: int) -> str:
    """Returns the name of a trainable parameter that needs a gradient through the frozen layers; empty if none.

    Such parameters are those of the first layers themselves, of the input embeddings (and of an output head tied
    to them), and soft prompts, which enter below the first layer.
    """
    below = {id(p) for p in unwrap_model(model).get_input_embeddings().parameters()}
    for layer in find_decoder_layers(model)[:num_frozen_layers]:
        below |= {id(p) for p in layer.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (id(parameter) in below or "prompt_encoder" in name):
            return name
    return ""


def setup_lp_lora_style(model: nn.Module, freeze_ratio: float = 0.5) -> FreezeReport:
    """Freezes the first share of the decoder layers, adapters and embeddings included.

    The name is the guide's. In the literature "LP" stands for linear probing; what happens here is a frozen prefix.

    Args:
        model: A transformers model or a PEFT model; call it after ``get_peft_model``.
        freeze_ratio: Share of the decoder layers to freeze (0 to 1, both excluded); rounded down, at least one layer.

    Raises:
        ModelError: The share is out of range.
    """
    if not 0 < freeze_ratio < 1:
        raise ModelError(f"freeze_ratio is {freeze_ratio}", fix="use a share between 0 and 1, such as 0.5")
    num_layers = len(find_decoder_layers(model))
    return freeze_layers(model, count_frozen_layers(f"{freeze_ratio * 100}%", num_layers) or 1)


def _freeze_pattern(model: nn.Module, pattern: str) -> None:
    matches = [m for name, m in unwrap_model(model).named_modules() if name and fnmatchcase(name, pattern)]
    if not any(True for module in matches for _ in module.parameters()):
        names = [name for name, _ in unwrap_model(model).named_modules() if name][:8]
        raise ModelError(
            f'freeze.patterns: "{pattern}" matches no module with parameters',
            why="a pattern that matches nothing freezes nothing",
            fix=f"module names look like {', '.join(names)}",
        )
    if not any(p.requires_grad for module in matches for p in module.parameters()):
        raise ModelError(
            f'freeze.patterns: "{pattern}" matches only what is frozen already', fix="take the pattern out"
        )
    for module in matches:
        module.requires_grad_(False)


def _count_trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _set_without_grad(layer: nn.Module, wanted: bool) -> None:
    """Puts the layer's forward under ``no_grad``, or takes it out again.

    An instance's ``forward`` leaves module names, hooks and saved files as they are, and holds whether
    checkpointing is switched on before or after: a checkpointed call without autograd saves nothing. It is a
    method of the layer, so that a deep copy of the model runs the copy's weights.
    """
    installed = runs_without_grad(layer)
    if wanted and not installed:
        layer._forward_with_grad = layer.forward
        layer.forward = MethodType(_forward_without_grad, layer)
    elif installed and not wanted:
        layer.forward = layer._forward_with_grad
        del layer._forward_with_grad


def runs_without_grad(layer: nn.Module) -> bool:
    """Whether the layer was put under ``no_grad``."""
    return getattr(layer.forward, "__func__", None) is _forward_without_grad


def _forward_without_grad(layer: nn.Module, *args, **kwargs):
    if torch.is_grad_enabled() and any(p.requires_grad for p in layer.parameters()):
        raise ModelError(
            "a frozen layer has trainable parameters, which would get no gradient",
            why="something was made trainable after the layers were frozen",
            fix="freeze after get_peft_model, or freeze again",
        )
    with torch.no_grad():
        return layer._forward_with_grad(*args, **kwargs)
