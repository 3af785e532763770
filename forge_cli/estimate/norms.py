"""Norms, in sizes only."""

from __future__ import annotations

from forge_cli.estimate.operations import FP32, Operations
from forge_cli.estimate.tape import Tensor


def rms_norm(ops: Operations, x: Tensor, weight: Tensor, width: int, style: str) -> Tensor:
    """RMSNorm as the families write it: in fp32, the weight before or after the cast back.

    Args:
        ops: Operations on the tape.
        x: Input.
        weight: Weight.
        width: Width that is normed.
        style: ``llama`` (cast back, then the weight), ``olmo`` (weight, then back; gpt-oss too) or ``gemma`` (1 + an
            fp32 weight, then back).

    Source: transformers 5.23, ``LlamaRMSNorm``, ``Olmo2RMSNorm`` and ``Gemma2RMSNorm``.
    """
    size = x.itemsize
    hidden_states = ops.cast(x, FP32)
    del x
    variance = ops.mean_last(ops.power(hidden_states), width)
    hidden_states = ops.multiply(hidden_states, ops.unary(ops.add(variance, None), saves_output=True))
    if style == "llama":
        return ops.multiply(weight, ops.cast(hidden_states, size))
    if style == "olmo":
        return ops.cast(ops.multiply(weight, hidden_states), size)
    output = ops.multiply(hidden_states, ops.add(ops.cast(weight, FP32), None))
    return ops.cast(output, size)


def layer_norm(ops: Operations, x: Tensor, weight: Tensor, bias: Tensor, width: int) -> Tensor:
    """``nn.LayerNorm``; under CUDA's autocast it computes in and returns fp32, on the CPU in the input's format.

    Source: torch 2.13, ``native_layer_norm`` (derivatives.yaml) and AT_FORALL_FP32 (autocast_mode.h).
    """
    x, weight, bias = ops.to_full(x), ops.to_full(weight), ops.to_full(bias)
    rows, numel, size = x.numel // width, x.numel, x.itemsize
    shapes = [(one.numel, one.itemsize) if one.needs_grad else None for one in (x, weight, bias)]
    statistics = [ops.new(rows, FP32), ops.new(rows, FP32)]

    def backward(g):
        return [None if shape is None else ops.new(*shape) for shape in shapes]

    (y,) = ops.tape.apply((x, weight, bias), [(numel, size)], backward, (x, *statistics, weight))
    return y
