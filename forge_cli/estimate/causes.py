"""What each part of an estimate is, which settings make it large, and its formula with this run's numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from forge_cli.estimate.memory import CUBLAS_BYTES, MemoryEstimate
from forge_cli.estimate.setting import Setting
from forge_cli.units import format_bytes, format_count


@dataclass(frozen=True)
class Cause:
    """Why a part is as large as it is.

    Attributes:
        settings: Settings that decide its size.
        formula: The formula with numbers.
        source: Where the formula comes from.
    """

    settings: str
    formula: str
    source: str


def explain_part(part: str, estimate: MemoryEstimate) -> Cause:
    """Explains one part of an estimate's peak."""
    return _CAUSES[part](estimate.setting, estimate.peak.parts.get(part, 0))


def _explain_weights(s: Setting, size: int) -> Cause:
    kind = {None: f"{s.weight_bytes} bytes each", 4: "linear layers 4 bit", 8: "linear layers 8 bit"}[s.quantized_bits]
    formula = f"{format_count(s.facts.num_parameters or 0)} weights, {kind}"
    if s.quantized_bits == 4:
        formula += f" (0.516 bytes with double quantisation, 0.5625 without), the rest {s.weight_bytes} bytes"
    return Cause(
        "model.name, model.dtype, quantization", formula, "bitsandbytes 0.50.2 QuantState; shapes of transformers 5.23"
    )


def _explain_trained(s: Setting, size: int) -> Cause:
    count = sum(n * times for n, times in s.trained.items())
    return Cause(
        "lora.r, lora.target_modules, freeze",
        f"{format_count(count)} trained weights x {s.trained_bytes} bytes",
        "PEFT 0.21: r x (inputs + outputs) per layer; Forge trains adapters in float32",
    )


def _explain_optimizer(s: Setting, size: int) -> Cause:
    count = sum(n * times for n, times in s.trained.items())
    return Cause(
        "training.optim",
        f"{format_count(count)} trained weights x {size / count if count else 0:.3g} bytes ({s.optim})",
        "torch 2.13 AdamW; bitsandbytes 0.50.2 (2.03 bytes in 8 bit; paged states count as host memory)",
    )


def _explain_activations(s: Setting, size: int) -> Cause:
    tokens = s.num_sequences * s.sequence_length
    layers = s.facts.num_hidden_layers - s.num_frozen_layers
    if s.activation_checkpointing:
        stream = s.trained_bytes if s.adapters is None else s.weight_bytes
        kept = stream * s.facts.hidden_size * tokens
        formula = (
            f"{layers} layers x {format_bytes(kept)} of input "
            f"({tokens} tokens x {s.facts.hidden_size} x {stream} bytes)"
            f" + {format_bytes(max(size - layers * kept, 0))} of the layer that runs again"
        )
    else:
        formula = f"{layers} layers x {tokens} tokens x {size / max(layers * tokens, 1):,.0f} bytes"
    return Cause(
        "data.max_length, training.per_device_train_batch_size, training.activation_checkpointing, freeze.first",
        formula,
        "replay of transformers' layer: what autograd keeps, tensor by tensor",
    )


def _explain_loss(s: Setting, size: int) -> Cause:
    tokens = s.num_sequences * s.sequence_length
    formula = f"{tokens} tokens x {s.facts.vocab_size} words in tiles of 4096 x 32768"
    if s.loss == "plain":
        formula = f"{tokens} tokens x {s.facts.vocab_size} words, all logits in float32 with their gradient"
    return Cause(
        "data.max_length, training.per_device_train_batch_size, method", formula, "TRL 1.16 ChunkedLogProbFunction"
    )


def _explain_workspace(s: Setting, size: int) -> Cause:
    return Cause(
        "data.max_length, training.per_device_train_batch_size",
        f"gradients of one layer's activations at their highest, and {format_bytes(CUBLAS_BYTES)} of cuBLAS",
        "replay of the backward pass; flash attention's accumulators from flash_api.cpp",
    )


def _explain_copies(s: Setting, size: int) -> Cause:
    return Cause("training.precision, model.dtype", "16-bit copies of trained float32 weights", "torch 2.13 autocast")


def _explain_average(s: Setting, size: int) -> Cause:
    return Cause("ema, ema.device", "trained weights x 4 bytes (float32 average)", "forge_cli/parts/ema.py")


def _explain_reference(s: Setting, size: int) -> Cause:
    return Cause("preference.reference", "a second model, or a second adapter", "forge_cli/build/reference.py")


def _explain_loading(s: Setting, size: int) -> Cause:
    return Cause("quantization", "the largest layer before it is quantised", "transformers 5.23, tensor by tensor")


def _explain_communication(s: Setting, size: int) -> Cause:
    return Cause(
        "--sharding",
        "buckets of gradients, or the layers that are gathered at a time",
        "torch DDP and FSDP2, DeepSpeed",
    )


_CAUSES: dict[str, Callable[[Setting, int], Cause]] = {
    "weights": _explain_weights,
    "adapters": _explain_trained,
    "gradients": _explain_trained,
    "optimizer": _explain_optimizer,
    "activations": _explain_activations,
    "loss": _explain_loss,
    "workspace": _explain_workspace,
    "autocast copies": _explain_copies,
    "EMA": _explain_average,
    "reference": _explain_reference,
    "loading": _explain_loading,
    "communication": _explain_communication,
}
