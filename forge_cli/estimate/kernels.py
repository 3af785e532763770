"""Attention by torch's fused kernels, or by its own composition of operations where none of them can run."""

from __future__ import annotations

from typing import NamedTuple

from forge_cli.estimate.operations import FP32, Operations
from forge_cli.estimate.tape import Tensor

# Widest head for which the grouped form of the kernels, and flash attention, can be used.
WIDEST_HEAD = 256


class Heads(NamedTuple):
    """Shape of one attention.

    Attributes:
        batch: Sequences.
        length: Tokens of each.
        queries: Query heads.
        keys: Key and value heads.
        width: Width of a head.
    """

    batch: int
    length: int
    queries: int
    keys: int
    width: int


def run_sdpa(
    ops: Operations,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    heads: Heads,
    *,
    repeats: bool = True,
    ordered: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` as transformers calls it, and the order of dimensions it returns.

    Args:
        ops: Operations on the tape.
        query: Queries.
        key: Keys.
        value: Values.
        mask: Mask; None for causal attention.
        heads: Shape.
        repeats: Keys and values are repeated where the kernels cannot take fewer of them than queries; otherwise
            they are broadcast (Falcon).
        ordered: Queries lie head by head in memory; then so does the result, which is copied.

    Source: transformers 5.23, ``sdpa_attention.py``; torch 2.13, ``sdp_utils.cpp`` and ``attention.cpp``.
    """
    is_grouped = heads.queries != heads.keys
    if is_grouped and repeats and (mask is not None or heads.width > WIDEST_HEAD):
        times = heads.queries // heads.keys
        key, value = ops.gather(key, key.numel * times), ops.gather(value, value.numel * times)
        is_grouped = False
    half = (ops.formats.compute_bytes if ops.formats.autocast else query.itemsize) == 2
    if is_grouped and (not repeats or (ops.formats.cuda and not half)):
        return ops.copy(_compose(ops, query, key, value, mask, heads))
    is_flash = not ops.formats.cuda or (half and mask is None and heads.width <= WIDEST_HEAD)
    output = _run_kernel(ops, query, key, value, mask, heads, is_flash=is_flash)
    # The memory-efficient kernel always returns the order of the projections.
    return ops.copy(output) if ordered and is_flash else output


def run_flash(ops: Operations, query: Tensor, key: Tensor, value: Tensor, heads: Heads) -> Tensor:
    """The flash-attn package. Source: transformers 5.23, ``flash_attention.py``; flash-attn 2, ``flash_api.cpp``."""
    return _run_kernel(ops, query, key, value, None, heads, is_flash=True)


def _run_kernel(
    ops: Operations,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    heads: Heads,
    *,
    is_flash: bool,
) -> Tensor:
    query, key, value, mask = _cast_inputs(ops, query, key, value, mask)
    size, sizes = query.itemsize, (query.numel, key.numel, value.numel)
    rows = heads.batch * heads.queries * heads.length

    def backward(g):
        found = [ops.new(n, size) for n in sizes]
        workspace = [ops.new(n, s) for n, s in _list_workspace(heads, size, is_flash)] if ops.formats.cuda else []
        del workspace
        return found

    save = (query, key, value) if mask is None else (query, key, value, mask)
    output, _ = ops.tape.apply(
        (query, key, value), [(query.numel, size), (rows, FP32)], backward, save, save_output=True
    )
    return output


def _cast_inputs(ops: Operations, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None):
    """Casts as autocast does; a mask of true and false becomes one of numbers in every layer."""
    query, key, value = ops.to_compute(query), ops.to_compute(key), ops.to_compute(value)
    if mask is not None:
        mask = ops.new(mask.numel, query.itemsize) if mask.itemsize == 1 else ops.to_compute(mask)
    return query, key, value, mask


def _list_workspace(heads: Heads, itemsize: int, is_flash: bool) -> list[tuple[int, int]]:
    """Lists what the backward kernels on CUDA need inside themselves, as (numbers, bytes per number).

    Both gather the queries' gradient in fp32 and keep a number per query; flash attention makes gradients of keys and
    values for all query heads and sums them, the memory-efficient kernel gathers those of wide heads in fp32.

    Units: numbers, bytes per number. Source: torch 2.13, ``flash_api.cpp`` (``mha_bwd``) and ``kernel_backward.h``
    (``workspace_elements_gq``).
    """
    rows = heads.batch * heads.queries * -(-heads.length // 128) * 128
    width = -(-heads.width // 32) * 32
    found = [(rows * width, FP32), (rows, FP32)]
    if is_flash and heads.queries != heads.keys:
        found += [(heads.batch * heads.queries * heads.length * heads.width, itemsize)] * 2
    if not is_flash and heads.width > 128 and itemsize < FP32:
        found += [(rows * width, FP32)] * 2
    return found


def _compose(ops: Operations, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, heads: Heads) -> Tensor:
    """Attention out of single operations, in fp32 and out of autocast's reach.

    Source: torch 2.13, ``_scaled_dot_product_attention_math`` and ``_safe_softmax``.
    """
    query, key, value, mask = _cast_inputs(ops, query, key, value, mask)
    size, whole, cells = query.itemsize, query.numel, heads.batch * heads.queries * heads.length**2
    query_acc, key_acc, value_acc = (ops.cast(one, FP32) for one in (query, key, value))
    scaled = ops.scale(query_acc)
    if mask is None:
        mask = ops.new(heads.length**2, FP32)
    # The rows of one sequence lie as the product wants them, and one head can stand for all.
    copy, repeat = (ops.copy, ops.gather) if heads.batch > 1 else (lambda x: x, ops.expand)
    attn = ops.matmul(copy(scaled), repeat(ops.scale(key_acc), whole), cells)
    attn = ops.add_in_place(attn, mask)
    # Beside the result lie the softmax itself and where it has no row to sum. On the CPU as well, but there nothing
    # that a replay could be compared with sees it.
    inside = [ops.new(cells, FP32), ops.new(cells, 1)] if ops.formats.cuda else []
    attn = ops.unary(attn, saves_output=True)
    del inside
    output = ops.matmul(attn, repeat(value_acc, whole), whole)
    # It returns the weights too, which sdpa drops.
    return (ops.cast(output, size), ops.cast(attn, size))[0]
