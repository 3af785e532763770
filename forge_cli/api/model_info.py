"""What a live model weighs and what freezing saves, for Python."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from torch import nn

from forge_cli.errors import ModelError
from forge_cli.estimate.memory import MemoryEstimate, estimate_memory
from forge_cli.estimate.setting import Adapters, Setting
from forge_cli.facts.config_facts import read_config_facts
from forge_cli.facts.families import find_family
from forge_cli.parts.freeze import find_trainable_below, runs_without_grad
from forge_cli.parts.layers import count_parameters, find_decoder_layers, unwrap_model
from forge_cli.units import GIB, format_bytes, format_count

# AdamW keeps two float32 states per trained weight.
ADAM_STATE_BYTES = 8


def print_model_info(model: nn.Module, show_breakdown: bool = False) -> None:
    """Prints size, formats and trained share of a model.

    Args:
        model: A transformers model or a PEFT model.
        show_breakdown: Also one line per decoder layer.
    """
    total, trainable = count_parameters(model)
    layers = find_decoder_layers(model)
    config = unwrap_model(model).config.get_text_config()
    print(f"model        {type(unwrap_model(model)).__name__}, {len(layers)} layers, hidden size {config.hidden_size}")
    print(f"parameters   {format_count(total)} ({total})")
    print(f"trained      {format_count(trainable)} ({100 * trainable / total:.2f} %)")
    print(f"weights      {format_bytes(count_weight_bytes(model))} in {', '.join(_formats(model))}")
    print(f"frozen first {count_frozen_prefix(model)} of {len(layers)} layers")
    if show_breakdown:
        rows = [(f"layer {index}", layer) for index, layer in enumerate(layers)]
        rows.append(("embeddings", unwrap_model(model).get_input_embeddings()))
        for name, module in rows:
            count, trained = count_parameters(module)
            print(f"  {name:12} {format_count(count):>9}  trained {format_count(trained):>9}")


def estimate_model_memory(model: nn.Module, batch_size: int = 4, sequence_length: int = 2048) -> dict[str, float]:
    """Estimates the peak memory of a training step of a live model with AdamW.

    Args:
        model: A transformers model or a PEFT model, with its trained parameters chosen.
        batch_size: Rows per micro step.
        sequence_length: Tokens per row, padding included.

    Returns:
        Components at the highest instant of a step and their sum ``total_estimated_gb``, all in GiB (2^30 bytes),
        without the CUDA context.

    Raises:
        ModelError: Forge cannot replay this architecture.
    """
    peak = _estimate(model, batch_size, sequence_length, count_frozen_prefix(model)).peak
    parts = {
        "weights_gb": peak.parts.get("weights", 0) + peak.parts.get("adapters", 0),
        "gradients_gb": peak.parts.get("gradients", 0),
        "optimizer_gb": peak.parts.get("optimizer", 0),
        "activations_gb": peak.parts.get("activations", 0) + peak.parts.get("autocast copies", 0),
    }
    parts["working_gb"] = peak.total_bytes - sum(parts.values())
    parts["total_estimated_gb"] = peak.total_bytes
    return {name: size / GIB for name, size in parts.items()}


def get_memory_savings_estimate(model: nn.Module, batch_size: int = 4, sequence_length: int = 2048) -> dict[str, float]:
    """Estimates what the frozen parameters save against training every parameter that the model could train.

    With adapters that means all adapters; without, all weights. The saving in activations is that of running
    the frozen first layers without autograd, and 0 where something below them is trained.

    Returns:
        ``gradient_saved_gb``, ``optimizer_saved_gb``, ``activation_saved_gb`` and ``total_saved_gb`` in GiB.
    """
    is_peft = hasattr(model, "peft_config")
    candidates = [p for name, p in model.named_parameters() if "lora_" in name or not is_peft]
    frozen = [p for p in candidates if not p.requires_grad and p.is_floating_point()]
    gradient = sum(p.numel() * p.element_size() for p in frozen)
    optimizer = sum(p.numel() for p in frozen) * ADAM_STATE_BYTES
    prefix = count_frozen_prefix(model)
    without, with_prefix = (_estimate(model, batch_size, sequence_length, count) for count in (0, prefix))
    activation = max(without.activations_bytes - with_prefix.activations_bytes, 0)
    parts = {"gradient_saved_gb": gradient, "optimizer_saved_gb": optimizer, "activation_saved_gb": activation}
    return {name: size / GIB for name, size in {**parts, "total_saved_gb": sum(parts.values())}.items()}


def count_frozen_prefix(model: nn.Module) -> int:
    """Counts the first decoder layers that run without autograd."""
    count = 0
    for layer in find_decoder_layers(model):
        if not runs_without_grad(layer):
            break
        count += 1
    return 0 if count and find_trainable_below(model, count) else count


def count_weight_bytes(model: nn.Module) -> int:
    """Counts the bytes of all weights as they are held, quantisation constants included."""
    total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        for constants in (state, getattr(state, "state2", None)):
            absmax = getattr(constants, "absmax", None)
            total += absmax.numel() * absmax.element_size() if absmax is not None else 0
    return total


def _formats(model: nn.Module) -> list[str]:
    names = {str(p.dtype).removeprefix("torch.") for p in model.parameters()}
    quantized = {p.quant_state.quant_type for p in model.parameters() if getattr(p, "quant_state", None) is not None}
    return sorted(names - ({"uint8"} if quantized else set())) + sorted(quantized)


def _estimate(model: nn.Module, batch_size: int, sequence_length: int, prefix: int) -> MemoryEstimate:
    """Estimates a step of a live model on a GPU: 16-bit compute, as the Trainer of transformers runs it."""
    base = unwrap_model(model)
    config = base.config.get_text_config()
    facts = read_config_facts(config.to_dict(), Path("config.json"), type(base).__name__, "")
    if find_family(facts) is None:
        raise ModelError(
            f"the memory of {config.model_type} models cannot be estimated",
            fix="train a few steps and read torch.cuda.max_memory_allocated()",
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    head, embeddings = base.get_output_embeddings(), base.get_input_embeddings()
    quantized = getattr(model, "is_quantized", False) or getattr(base, "is_quantized", False)
    return estimate_memory(
        Setting(
            facts=facts,
            batch_size=batch_size,
            sequence_length=sequence_length,
            # Adapters are among the parameters counted here.
            weights_bytes=count_weight_bytes(model) - (_count_trained_bytes(model) if _find_adapters(model) else 0),
            trained=dict(Counter(p.numel() for p in trained)),
            adapters=_find_adapters(model),
            quantized_bits=(8 if getattr(base, "is_loaded_in_8bit", False) else 4) if quantized else None,
            weight_bytes=embeddings.weight.element_size(),
            trained_bytes=trained[0].element_size() if trained else 4,
            num_frozen_layers=prefix,
            embeddings_train=embeddings.weight.requires_grad,
            head_trains=head is not None and any(p.requires_grad for p in head.parameters()),
            activation_checkpointing=any(getattr(m, "gradient_checkpointing", False) for m in model.modules()),
            loss="plain",
        )
    )


def _find_adapters(model: nn.Module) -> Adapters | None:
    config = getattr(model, "peft_config", {}).get("default")
    if config is None or getattr(config, "r", None) is None:
        return None
    targets = config.target_modules
    names = (targets,) if isinstance(targets, str) else tuple(sorted(targets))
    return Adapters(config.r, names, config.lora_dropout, config.use_dora)


def _count_trained_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
