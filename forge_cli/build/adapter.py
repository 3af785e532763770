"""Places LoRA adapters and freezes layers, as a plan says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import set_seed

from forge_cli.build.model import refuse_non_finite
from forge_cli.errors import ModelError
from forge_cli.facts.layer_count import count_frozen_layers
from forge_cli.parts.adapter_inputs import leave_inputs_to_autocast
from forge_cli.parts.freeze import FreezeReport, freeze_layers
from forge_cli.parts.layers import count_parameters, find_decoder_layers, find_layer_prefix, find_linear_names
from forge_cli.schema.adapter import FreezeSection, LoraSection
from forge_cli.schema.runspec import RunSpec


@dataclass(frozen=True)
class TrainableReport:
    """What is trained.

    Attributes:
        num_parameters: All parameters, adapters included.
        num_trainable_parameters: Parameters that are trained.
        target_modules: Names that got an adapter; empty without LoRA.
        freeze: What freezing did; ``None`` without it.
    """

    num_parameters: int
    num_trainable_parameters: int
    target_modules: tuple[str, ...]
    freeze: FreezeReport | None


def prepare_trainable(model: torch.nn.Module, spec: RunSpec) -> tuple[torch.nn.Module, TrainableReport]:
    """Wraps the model with adapters, freezes layers and reports what is left to train.

    The base of a quantised model is frozen by the wrap. Its norms and embeddings stay in their loaded format:
    PEFT's ``prepare_model_for_kbit_training`` would copy all of them to float32 for no gain under mixed precision.

    Raises:
        ModelError: A target or pattern matches nothing, or nothing is left to train.
    """
    num_layers = len(find_decoder_layers(model))
    first = spec.freeze.first if spec.freeze else None
    num_frozen = count_frozen_layers(first, num_layers)
    if first is not None and not 0 < num_frozen < num_layers:
        raise ModelError(
            f"freeze.first {first} is {num_frozen} of the model's {num_layers} decoder layers",
            why="that freezes nothing, or leaves nothing to train",
            fix=f"write a count from 1 to {num_layers - 1}",
        )
    targets: tuple[str, ...] = ()
    if spec.lora:
        # PEFT draws the adapters' start from the global generator.
        set_seed(spec.seed)
        if spec.model.adapter:
            config = read_adapter_config(spec.model.adapter)
            config.lora_dropout = spec.lora.lora_dropout
            model = load_adapter(model, spec.model.adapter, config, is_trainable=True)
        else:
            config = build_lora_config(
                spec.lora, model, num_frozen, "SEQ_CLS" if spec.method == "reward" else "CAUSAL_LM"
            )
            model = get_peft_model(model, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                # PEFT leaves modules_to_save in the base's format, where small updates are lost.
                parameter.data = parameter.data.float()
        leave_inputs_to_autocast(model)
        targets = tuple(sorted(config.target_modules))
        if not spec.model.adapter:
            _check_adapters(model, num_frozen, num_layers)
    whole = spec.lora.modules_to_save if spec.lora else []
    report = _freeze(model, spec.freeze, num_frozen, whole) if spec.freeze else None
    total, trainable = count_parameters(model)
    return model, TrainableReport(total, trainable, targets, report)


def build_lora_config(
    lora: LoraSection,
    model: torch.nn.Module | None = None,
    num_frozen_layers: int = 0,
    task_type: str = "CAUSAL_LM",
) -> LoraConfig:
    """Builds PEFT's settings; with a model, ``all-linear`` becomes names and frozen layers get no adapters.

    Args:
        lora: The section.
        model: The loaded model; ``None`` leaves ``all-linear`` to PEFT.
        num_frozen_layers: Decoder layers from the input without adapters.
        task_type: PEFT's name of what the model does; with ``SEQ_CLS`` the score head is trained and saved too.

    Raises:
        ModelError: A target name matches no linear layer; lists the names there are.
    """
    options: dict[str, object] = {}
    targets = lora.target_modules
    if model is not None:
        names = find_linear_names(model)
        if targets == "all-linear":
            targets = names
        _refuse_strangers(model, "target_modules", targets, names)
        _refuse_strangers(model, "modules_to_save", lora.modules_to_save, ["embed_tokens", "lm_head"])
        # Eyes have layers of the same names; text would never train an adapter there.
        namesakes = rf"(?!{re.escape(find_layer_prefix(model))}\.).*\.({'|'.join(names)})"
        if any(re.fullmatch(namesakes, name) for name, _ in model.named_modules()):
            options["exclude_modules"] = namesakes
        if num_frozen_layers:
            # PEFT takes layer numbers only beside a list of names, and the name of the list of layers.
            prefix = find_layer_prefix(model)
            options["layers_to_transform"] = list(range(num_frozen_layers, len(find_decoder_layers(model))))
            options["layers_pattern"] = prefix.rsplit(".", 1)[-1]
    return LoraConfig(
        task_type=task_type,
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=list(lora.modules_to_save) or None,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=lora.init_lora_weights,
        **options,
    )


def read_adapter_config(folder: str) -> LoraConfig:
    """Reads what kind of adapter a folder holds.

    Raises:
        ModelError: None that Forge can use.
    """
    place = Path(folder).expanduser()
    if not (place / "adapter_config.json").is_file():
        raise ModelError("this folder holds no adapter: adapter_config.json is missing", where=folder)
    try:
        config = PeftConfig.from_pretrained(str(place))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError("adapter_config.json cannot be read", where=folder, why=str(error)) from error
    if not isinstance(config, LoraConfig):
        raise ModelError(f"this is a {config.peft_type} adapter", where=folder, fix="Forge goes on with LoRA adapters")
    return config


def load_adapter(
    model: torch.nn.Module, folder: str, config: LoraConfig, *, name: str = "default", is_trainable: bool = False
) -> PeftModel:
    """Loads the weights of an adapter, all of them, onto a base or beside another adapter.

    Raises:
        ModelError: They do not fit the model, or some are missing.
    """
    place = Path(folder).expanduser()
    try:
        with safe_open(place / "adapter_model.safetensors", "pt") as file:
            given = set(file.keys())
        if isinstance(model, PeftModel):
            model.load_adapter(str(place), name, is_trainable=is_trainable)
        else:
            model = PeftModel.from_pretrained(model, str(place), name, is_trainable=is_trainable, config=config)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()
        raise ModelError("the adapter does not fit the model", where=folder, why=reason[-1].strip()[:300]) from error
    missing = set(get_peft_model_state_dict(model, adapter_name=name)) - given
    if missing:
        raise ModelError(
            f"the adapter lacks {len(missing)} tensors, {min(missing)} first",
            where=folder,
            why="these would start at random",
            fix="use the base model and settings that it was trained with",
        )
    refuse_non_finite(model, folder)
    return model


def _refuse_strangers(model: torch.nn.Module, field: str, wanted: Sequence[str], examples: Sequence[str]) -> None:
    """Refuses names that match no module of the model."""
    modules = [name for name, _ in model.named_modules()]
    strangers = [w for w in wanted if not any(name == w or name.endswith("." + w) for name in modules)]
    if strangers:
        raise ModelError(
            f"lora.{field}: {', '.join(strangers)} matches no module",
            why="what is placed nowhere trains nothing",
            fix=f"this model has {', '.join(examples)}",
        )


def _check_adapters(model: torch.nn.Module, num_frozen: int, num_layers: int) -> None:
    """Asserts what was asked for: adapters in every layer above the frozen ones and in none of those."""
    layers = find_decoder_layers(model)
    has_adapter = [any("lora_" in name for name, _ in layer.named_parameters()) for layer in layers]
    if has_adapter != [index >= num_frozen for index in range(num_layers)]:
        placed = [index for index, present in enumerate(has_adapter) if present]
        raise ModelError(
            f"adapters were placed in layers {placed}, not in {num_frozen} to {num_layers - 1}",
            why="PEFT matched other modules than the plan names",
            fix="give lora.target_modules as names of linear layers inside the decoder layers",
        )


def _freeze(model: torch.nn.Module, freeze: FreezeSection, num_frozen: int, whole: Sequence[str]) -> FreezeReport:
    """Freezes; embeddings that ``modules_to_save`` trains whole stay trained unless the file says otherwise."""
    embeddings = freeze.embeddings
    if embeddings is None:
        embeddings = freeze.first is not None and not any("embed" in name or name == "wte" for name in whole)
    return freeze_layers(model, num_frozen, embeddings=embeddings, patterns=freeze.patterns)
