"""Attention written out in Python, as the families write it ("eager"), in sizes only.

Local variables have the names and the lifetimes of the original, because what a name still holds is memory.
"""

from __future__ import annotations

from forge_cli.estimate.kernels import Heads
from forge_cli.estimate.operations import FP32, Operations
from forge_cli.estimate.tape import Tensor


def run_eager(
    ops: Operations,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    heads: Heads,
    *,
    style: str = "llama",
    sinks: Tensor | None = None,
    ordered: bool = False,
) -> tuple[Tensor, Tensor]:
    """Runs attention with all its weights in memory.

    Args:
        ops: Operations on the tape.
        query: Queries.
        key: Keys.
        value: Values.
        mask: Mask of numbers.
        heads: Shape.
        style: ``llama``, ``gemma2`` (capped), ``gpt_oss`` (with sinks) or ``gpt2``.
        sinks: A number per head (gpt-oss).
        ordered: Queries and keys lie head by head in memory already.

    Returns:
        Output and weights; the caller keeps the weights as long as the original's callers do.

    Source: transformers 5.23, ``eager_attention_forward`` of the models.
    """
    times, size = heads.queries // heads.keys, query.itemsize
    key_states = ops.gather(key, key.numel * times) if times > 1 else key
    value_states = ops.gather(value, value.numel * times) if times > 1 else value
    attn_weights = ops.scale(_multiply_heads(ops, query, key_states, heads, ordered, ordered or times > 1))
    if style == "gemma2":
        attn_weights = ops.scale(attn_weights)
        attn_weights = ops.unary(attn_weights, saves_output=True)
        attn_weights = ops.scale(attn_weights)
    attn_weights = ops.add(attn_weights, mask)
    if sinks is not None:
        # A column per head that takes up probability, and is dropped again.
        rows, numel = heads.batch * heads.queries * heads.length, attn_weights.numel
        combined_logits = ops.join([attn_weights, ops.expand(sinks, rows)])
        combined_logits = _subtract_highest(ops, combined_logits, rows)
        probs = ops.unary(combined_logits, saves_output=True)
        scores = ops.slice(probs, numel)
        attn_weights = ops.cast(scores, value.itemsize)
    elif style == "gpt2":
        attn_weights = ops.unary(ops.to_full(attn_weights), saves_output=True)
    else:
        attn_weights = _soften(ops, attn_weights, FP32)
    attn_weights = ops.cast(attn_weights, value.itemsize if sinks is not None or style == "gpt2" else size)
    values = _lay_out(ops, value_states, heads, times > 1)
    return ops.copy(ops.matmul(ops.to_compute(attn_weights), values, query.numel)), attn_weights


def run_falcon_eager(
    ops: Operations, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, heads: Heads, *, has_alibi: bool
) -> tuple[Tensor, Tensor]:
    """Falcon's own: one head of keys is broadcast; with alibi three tensors of scores live side by side.

    Source: transformers 5.23, ``FalconAttention.forward``.
    """
    size, cells = query.itemsize, heads.batch * heads.queries * heads.length**2
    repeat = ops.gather if heads.batch > 1 else ops.expand
    repeats = heads.keys < heads.queries

    def lay_out(x: Tensor) -> Tensor:
        x = ops.to_compute(x)
        return repeat(x, query.numel) if repeats else _lay_out(ops, x, heads, is_ordered=False)

    attention_scores = ops.matmul(_lay_out(ops, query, heads, is_ordered=False), lay_out(key), cells)
    if has_alibi:
        matmul_result = attention_scores
        attention_scores = ops.cast(matmul_result, FP32)
        attention_logits = ops.add(attention_scores, None)
        attention_logits = _scale_in_place(ops, attention_logits)
        attention_probs = _soften(ops, ops.add(attention_logits, mask), size)
    else:
        attention_scores = _scale_in_place(ops, attention_scores)
        attention_scores = attention_probs = _soften(ops, ops.add(attention_scores, mask), size)
    return ops.copy(ops.matmul(ops.to_compute(attention_probs), lay_out(value), query.numel)), attention_probs


def _multiply_heads(
    ops: Operations, query: Tensor, key: Tensor, heads: Heads, query_ordered: bool, key_ordered: bool
) -> Tensor:
    cells = heads.batch * heads.queries * heads.length**2
    return ops.matmul(_lay_out(ops, query, heads, query_ordered), _lay_out(ops, key, heads, key_ordered), cells)


def _lay_out(ops: Operations, x: Tensor, heads: Heads, is_ordered: bool) -> Tensor:
    """Batches of matrices lie one after the other: what lies token by token is copied, but for one sequence."""
    x = ops.to_compute(x)
    return x if is_ordered or heads.batch == 1 else ops.copy(x)


def _soften(ops: Operations, x: Tensor, itemsize: int) -> Tensor:
    """``softmax(x, dtype=...)``: a copy in that format, then the softmax.

    Source: torch 2.13, ``aten/native/SoftMax.cpp``: only fp16 is cast inside the kernel.
    """
    return ops.unary(ops.cast(x, itemsize), saves_output=True)


def _scale_in_place(ops: Operations, x: Tensor) -> Tensor:
    numel, size = x.numel, x.itemsize
    (y,) = ops.tape.apply((x,), [(numel, size)], lambda g: [ops.new(numel, size)], view_of=x)
    return y


def _subtract_highest(ops: Operations, x: Tensor, rows: int) -> Tensor:
    numel, size = x.numel, x.itemsize
    indices = ops.new(rows, 8)
    (highest,) = ops.tape.apply((x,), [(rows, size)], lambda g: [ops.new(numel, size)], (indices,))
    return ops.add(x, highest)
