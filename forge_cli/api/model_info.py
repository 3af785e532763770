"""What a live model weighs and what freezing saves, for Python."""

from __future__ import annotations

import math

from torch import nn

from forge_cli.estimate.memory import LayerShape, MemoryEstimate, estimate_memory
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
        Components and ``total_estimated_gb``, all in GiB (2^30 bytes), without the CUDA context.
    """
    estimate = _estimate(model, batch_size, sequence_length, count_frozen_prefix(model))
    parts = {
        "weights_gb": estimate.weights_bytes,
        "gradients_gb": estimate.gradients_bytes,
        "optimizer_gb": estimate.optimizer_bytes,
        "activations_gb": estimate.activations_bytes,
        "working_gb": estimate.working_bytes,
        "total_estimated_gb": estimate.total_bytes,
    }
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
    without = _estimate(model, batch_size, sequence_length, 0).activations_bytes
    activation = without - _estimate(model, batch_size, sequence_length, prefix).activations_bytes
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
    config = unwrap_model(model).config.get_text_config()
    trained = [p for p in model.parameters() if p.requires_grad]
    peft_config = getattr(model, "peft_config", {}).get("default")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head = unwrap_model(model).get_output_embeddings()
    return estimate_memory(
        weights_bytes=count_weight_bytes(model),
        num_trainable_parameters=sum(math.prod(p.shape) for p in trained),
        layer=LayerShape(
            hidden_size=config.hidden_size,
            query_size=heads * head_dim,
            key_size=key_heads * head_dim,
            intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            num_attention_heads=heads,
        ),
        num_layers=len(find_decoder_layers(model)),
        vocab_size=config.vocab_size,
        batch_size=batch_size,
        sequence_length=sequence_length,
        num_frozen_prefix_layers=prefix,
        activation_checkpointing=any(getattr(m, "gradient_checkpointing", False) for m in model.modules()),
        lora_rank=getattr(peft_config, "r", None),
        trainable_bytes=trained[0].element_size() if trained else 4,
        compute_bytes=2,
        quantized=getattr(model, "is_quantized", False) or getattr(unwrap_model(model), "is_quantized", False),
        head_trains=head is not None and any(p.requires_grad for p in head.parameters()),
        fused_loss=False,
    )
