"""What each part of an estimate is, which settings make it large, and its formula with this run's numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from forge_cli.estimate.losses import TILE_TOKENS, TILE_VOCABULARY
from forge_cli.estimate.memory import CUBLAS_BYTES, MemoryEstimate
from forge_cli.estimate.setting import Setting
from forge_cli.facts.parameter_count import count_parameters, count_quantized_parameters
from forge_cli.units import format_bytes, format_count

# Rounding of tensors to what the allocator hands out.
_NEGLIGIBLE = 0.02
# Instants at which every trained layer has run and none has been freed.
_WITH_ALL_LAYERS = ("forward", "loss", "reference", "backward loss", "backward layer")


class Cause(NamedTuple):
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
    return _CAUSES[part](estimate.setting, estimate.peak.parts.get(part, 0), estimate.peak.name)


def _count_tokens(s: Setting, instant: str) -> int:
    rows = s.eval_batch_size * (2 if s.pairs else 1) if instant == "evaluation" else s.num_sequences
    return rows * s.sequence_length


def _name_batch(instant: str) -> str:
    batch = "evaluation.per_device_eval_batch_size"
    return f"data.max_length, {batch if instant == 'evaluation' else 'training.per_device_train_batch_size'}"


def _count_trained(s: Setting) -> int:
    return sum(n * times for n, times in s.trained.items())


def _share(size: int, full: float) -> str:
    """Says how much of a sum there is: gradients come one by one, and a rank may hold only its own."""
    ratio = size / full if full else 1
    return "" if abs(ratio - 1) < _NEGLIGIBLE else f"; {100 * ratio:.0f} % of that at this instant"


def _explain_weights(s: Setting, size: int, instant: str) -> Cause:
    total = count_parameters(s.facts, score_head=s.loss == "score") or s.facts.num_parameters or 0
    formula = f"{format_count(total)} weights x {s.weight_bytes} bytes"
    packed = count_quantized_parameters(s.facts) or 0
    if s.quantized_bits and packed:
        rest = total - packed
        each = (s.weights_bytes - rest * s.weight_bytes) / packed
        formula = (
            f"{format_count(packed)} weights of linear layers x {each:.3f} bytes ({s.quantized_bits} bit and scales)"
            f" + {format_count(rest)} others x {s.weight_bytes} bytes"
        )
    return Cause(
        "model.name, model.dtype, quantization",
        formula + _share(size, s.weights_bytes),
        "shapes of transformers 5.23" + ("; bitsandbytes 0.50.2 QuantState, Int8Params" if s.quantized_bits else ""),
    )


def _explain_trained(s: Setting, size: int, instant: str) -> Cause:
    count = _count_trained(s)
    formula = f"{format_count(count)} trained weights x {s.trained_bytes} bytes"
    formula += _share(size, count * s.trained_bytes)
    if s.adapters is None:
        return Cause("model.name, freeze", formula, "torch 2.13: a gradient in the format of its weight")
    return Cause(
        "lora.r, lora.target_modules, freeze",
        formula,
        "PEFT 0.21: r x (inputs + outputs) per layer; Forge trains adapters in float32",
    )


def _explain_optimizer(s: Setting, size: int, instant: str) -> Cause:
    count = _count_trained(s)
    return Cause(
        "training.optim",
        f"{format_count(count)} trained weights x {size / count if count else 0:.3g} bytes ({s.optim})",
        "torch 2.13 AdamW; bitsandbytes 0.50.2 (2.03 bytes in 8 bit; paged states count as host memory)",
    )


def _explain_activations(s: Setting, size: int, instant: str) -> Cause:
    tokens, source = _count_tokens(s, instant), "replay of transformers' layer: what autograd keeps, tensor by tensor"
    if instant == "evaluation":
        formula = f"{tokens} tokens x {size / tokens:,.0f} bytes, of one layer or the output layer: none is kept"
        return Cause(_name_batch(instant), formula, "replay of transformers' layer without autograd")
    layers = s.facts.num_hidden_layers - s.num_frozen_layers
    settings = f"{_name_batch(instant)}, training.activation_checkpointing, freeze.first"
    stream = s.trained_bytes if s.adapters is None else s.weight_bytes
    kept = stream * s.facts.hidden_size * tokens
    if instant not in _WITH_ALL_LAYERS or (s.activation_checkpointing and size < layers * kept):
        formula = f"{tokens} tokens x {size / tokens:,.0f} bytes that are left at this instant"
    elif s.activation_checkpointing and s.quantized_bits == 8:
        formula = (
            f"{layers} layers x {tokens} tokens x {size / (layers * tokens):,.0f} bytes on average: layers in 8 bit "
            "keep their inputs though the decoder layers are checkpointed"
        )
        source += "; bitsandbytes 0.50.2 MatMul8bitLt"
    elif s.activation_checkpointing:
        runs = "the layer that runs again" if instant == "backward layer" else "what runs at this instant"
        formula = (
            f"{layers} layers x {format_bytes(kept)} of input "
            f"({tokens} tokens x {s.facts.hidden_size} x {stream} bytes)"
            f" + {format_bytes(size - layers * kept)} of {runs}"
        )
    else:
        formula = f"{layers} layers x {tokens} tokens x {size / max(layers * tokens, 1):,.0f} bytes"
    return Cause(settings, formula, source)


def _explain_loss(s: Setting, size: int, instant: str) -> Cause:
    tokens, words = _count_tokens(s, instant), s.facts.vocab_size
    if instant not in ("loss", "backward loss", "evaluation", "reference"):
        formula, source = f"{format_bytes(size)} that are left of it at this instant", "replay of the loss"
    elif s.loss == "plain":
        formula = f"{tokens} tokens x {words} words x {size / (tokens * words):.2g} bytes: all logits at once"
        source = "transformers 5.23 ForCausalLMLoss"
    elif s.loss == "score":
        formula = f"one score for each of {tokens // s.sequence_length} sequences"
        source = "transformers 5.23 GenericForSequenceClassification"
    else:
        formula = f"{tokens} tokens x {words} words in tiles of at most {TILE_TOKENS} x {TILE_VOCABULARY}"
        source = "TRL 1.16 ChunkedLogProbFunction"
    return Cause(f"{_name_batch(instant)}, method", formula, source)


def _explain_workspace(s: Setting, size: int, instant: str) -> Cause:
    cublas = f"{format_bytes(CUBLAS_BYTES)} that cuBLAS keeps"
    if size <= CUBLAS_BYTES:
        return Cause("no setting", cublas, "torch 2.13: a workspace per thread that multiplies")
    what = "gradients of activations at their highest" if "backward" in instant else "intermediate results"
    return Cause(
        _name_batch(instant),
        f"{format_bytes(size - CUBLAS_BYTES)} of {what}, and {cublas}",
        "replay of the step; flash attention's accumulators from flash_api.cpp",
    )


def _explain_copies(s: Setting, size: int, instant: str) -> Cause:
    return Cause("training.precision, model.dtype", "16-bit copies of trained float32 weights", "torch 2.13 autocast")


def _explain_average(s: Setting, size: int, instant: str) -> Cause:
    count = _count_trained(s)
    formula = f"{format_count(count)} trained weights x {size / count if count else 0:.3g} bytes"
    return Cause("ema, ema.device", formula, "forge_cli/parts/ema.py: a float32 average, and what is swapped")


def _explain_reference(s: Setting, size: int, instant: str) -> Cause:
    what = "a second model" if s.adapters is None else "a second adapter"
    return Cause("preference.reference", f"{what}, {format_bytes(size)}", "forge_cli/build/reference.py")


def _explain_loading(s: Setting, size: int, instant: str) -> Cause:
    return Cause("quantization", "the largest layer before it is quantised", "transformers 5.23, tensor by tensor")


def _explain_communication(s: Setting, size: int, instant: str) -> Cause:
    return Cause(
        "--sharding",
        "buckets of gradients, or the layers that are gathered at a time",
        "torch DDP and FSDP2, DeepSpeed",
    )


_CAUSES: dict[str, Callable[[Setting, int, str], Cause]] = {
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
