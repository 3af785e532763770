"""What is held from the first step to the last: weights as they are stored, adapters, optimizer states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from forge_cli.facts.families import find_family
from forge_cli.facts.shape import ModelFacts
from forge_cli.facts.weights import list_layer_weights, list_outer_weights

# Weights that share one scale, and scales that share one, in bitsandbytes' 4-bit formats.
_BLOCK, _NESTED_BLOCK = 64, 256
_CODE_BYTES, _NESTED_CODE_BYTES, _OFFSET_BYTES = 64, 1024, 4
# bitsandbytes keeps the states of smaller tensors in fp32, and does not page those below the other limit.
_EIGHT_BIT_FROM, _PAGED_FROM = 4096, 100_000
_STATE_BLOCK = 256

# Sizes of trained tensors, and how many of each there are.
Tensors = Mapping[int, int]


def round_up(size_bytes: float, granule_bytes: int) -> int:
    """Rounds a size up to what the allocator hands out. Units: bytes. Source: torch's CUDA allocator, 512."""
    return -(-int(-(-size_bytes // 1)) // granule_bytes) * granule_bytes


def weigh_quantized(num_weights: int, bits: int, rows: int, *, double_quant: bool, granule_bytes: int) -> int:
    """Returns the bytes of one quantised linear layer, its constants included.

    4 bit: half a byte per weight, an fp32 scale per 64 weights and the code book; with double quantisation a byte per
    scale and an fp32 scale, a code book and an offset for those. 8 bit: a byte per weight and an fp32 scale per row.

    Units: bytes. Source: bitsandbytes 0.50.2, ``Params4bit``, ``QuantState`` and ``Int8Params``.
    """
    if bits == 8:
        parts = [num_weights, 4 * rows]
    else:
        scales = -(-num_weights // _BLOCK)
        parts = [num_weights / 2, _CODE_BYTES]
        if double_quant:
            parts += [scales, 4 * -(-scales // _NESTED_BLOCK), _NESTED_CODE_BYTES, _OFFSET_BYTES]
        else:
            parts.append(4 * scales)
    return sum(round_up(part, granule_bytes) for part in parts)


def weigh_model(
    facts: ModelFacts,
    bytes_per_weight: int,
    *,
    quantized_bits: int | None = None,
    double_quant: bool = True,
    granule_bytes: int = 512,
    score_head: bool = False,
) -> int | None:
    """Returns the bytes of all weights of a model as they are held; ``None`` for an unknown architecture.

    Only linear layers are quantised, those of eyes too: embeddings, norms, the output layer and experts are not.

    Units: bytes. Source: shapes of transformers 5.23 (``forge_cli.facts.weights``), each tensor rounded up; eyes, whose
    shapes are not known, as one.
    """
    layer, outer, family = (
        list_layer_weights(facts),
        list_outer_weights(facts, score_head=score_head),
        find_family(facts),
    )
    if layer is None or outer is None or family is None:
        return None
    packed_eyes = facts.num_other_linear_parameters if quantized_bits else 0
    total = bytes_per_weight * (facts.num_other_parameters - packed_eyes)
    if packed_eyes:
        total += weigh_quantized(packed_eyes, quantized_bits, 0, double_quant=double_quant, granule_bytes=granule_bytes)
    for times, weights in ((facts.num_hidden_layers, layer), (1, outer)):
        for weight in weights:
            if quantized_bits and weight.kind == "linear" and weight.name == "weight" and not family.own_linear:
                rows = weight.shape[1 if family.transposed else 0]
                total += times * weigh_quantized(
                    weight.size, quantized_bits, rows, double_quant=double_quant, granule_bytes=granule_bytes
                )
            else:
                total += times * round_up(bytes_per_weight * weight.size, granule_bytes)
    return total


def weigh_tensors(tensors: Tensors, bytes_per_weight: float, granule_bytes: int = 512) -> int:
    """Returns the bytes of tensors in one number format. Units: bytes. Source: sizes, each rounded up."""
    return sum(times * round_up(size * bytes_per_weight, granule_bytes) for size, times in tensors.items())


def weigh_optimizer(
    tensors: Tensors, optim: str, trained_bytes: int, granule_bytes: int = 512, embeddings: Tensors | None = None
) -> int:
    """Returns the bytes of the optimizer's states on the device.

    AdamW: two states in the weights' format and a step counter. 8 bit: two bytes per weight and two fp32 scales per
    256 weights, tensors below 4096 weights in fp32. Lion has one state instead of two. Paged: as the others, but states
    of tensors of at least 100,000 weights are host memory that the device borrows; only their scales count. Adafactor:
    fp32 sums of rows and columns, taken here as those of a square matrix. SGD: none.

    Args:
        tensors: Trained tensors.
        optim: A value of ``training.optim``.
        trained_bytes: Bytes per trained weight.
        granule_bytes: Sizes are rounded up to a multiple of this.
        embeddings: Those of them that are embeddings: 8-bit optimizers keep their states in 32 bit.

    Units: bytes. Source: torch 2.13 (``_fused_adamw``), bitsandbytes 0.50.2 (``optimizer.py``), transformers 5.23
    (``Trainer.create_optimizer`` registers embeddings for 32 bit).
    """
    if optim == "sgd":
        return 0
    wide = embeddings if embeddings and optim.endswith("8bit") else {}
    total = 0
    for size, times in tensors.items():
        for kind, count in ((optim, times - wide.get(size, 0)), (optim.replace("8bit", "32bit"), wide.get(size, 0))):
            total += count * sum(round_up(part, granule_bytes) for part in _list_states(size, kind, trained_bytes))
    return total


def _list_states(size: int, optim: str, trained_bytes: int) -> Iterable[float]:
    if optim in ("adamw_torch_fused", "adamw_torch"):
        counter = [4] if optim == "adamw_torch_fused" else []
        return [size * trained_bytes, size * trained_bytes, *counter]
    if optim == "adafactor":
        return [4 * size**0.5, 4 * size**0.5]
    states = 1 if "lion" in optim else 2
    small, paged = size < _EIGHT_BIT_FROM, optim.startswith("paged") and size >= _PAGED_FROM
    if small or optim.endswith("32bit"):
        return [] if paged else [4 * size] * states
    scales = [4 * -(-size // _STATE_BLOCK)] * states
    return scales if paged else [size] * states + scales


def step_transient_bytes(tensors: Tensors, optim: str, trained_bytes: int, *, cuda: bool = True) -> int:
    """Returns what the optimizer needs for the length of its step.

    Plain AdamW takes the root of all second moments at once, on the CPU of one after the other; fused and bitsandbytes'
    kernels work in place. Adafactor squares one gradient at a time.

    Units: bytes. Source: torch 2.13, ``_multi_tensor_adamw``; transformers 5.23, ``Adafactor.step``.
    """
    if optim == "adamw_torch" and not cuda:
        return 2 * trained_bytes * max(tensors, default=0)
    if optim == "adamw_torch":
        return weigh_tensors(tensors, trained_bytes)
    if optim == "adafactor" and tensors:
        return 8 * max(tensors)
    return 0
