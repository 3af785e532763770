"""Lets fake tensors on the CPU take the paths, and need the memory, of real ones on a CUDA GPU.

Fake ``cuda`` tensors abort a process whose torch was built without CUDA, so a trace computes with fake CPU tensors, and
what differs between the two is mended here: questions about values, autocast's lists, dropout and workspaces.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# Source: torch 2.13, ATen/autocast_mode.h, AT_FORALL_FP32; those that decoder models use. The CPU's list lacks them.
_FLOAT32 = {"exp", "log", "log1p", "reciprocal", "rsqrt", "pow", "__pow__", "softplus", "layer_norm", "rms_norm"}
# AT_FORALL_FP32_SET_OPT_DTYPE: the input stays 16 bit, the result is float32.
_FLOAT32_RESULT = {"softmax", "log_softmax", "cumsum", "cumprod", "prod", "sum"}
_HALVES = (torch.bfloat16, torch.float16)


class KnownValues(TorchDispatchMode):
    """Answers what only values could: all masks are true, all numbers are 1, all booleans true.

    So every token is trained, every padding mask is full, every gradient is finite, and no activation an outlier.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is aten._local_scalar_dense.default:
            dtype = args[0].dtype
            return True if dtype is torch.bool else 1.0 if dtype.is_floating_point else 1
        if function is aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long)
        if function is aten.index.Tensor and _is_mask(args[1]):
            mask = args[1][0]
            return args[0].new_empty((mask.numel(), *args[0].shape[mask.dim() :]))
        if function in (aten.index_put.default, aten._index_put_impl_.default) and _is_mask(args[1]):
            return args[0] if function is aten._index_put_impl_.default else torch.empty_like(args[0])
        if str(function) in _WITHOUT_OUTLIERS:
            return _WITHOUT_OUTLIERS[str(function)](*args)
        if function is aten._grouped_mm.default and args[0].dtype not in _HALVES:
            return _multiply_groups(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


class CudaAutocast(TorchFunctionMode):
    """Applies CUDA's autocast rules where the CPU's differ, and CUDA's dropout."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name == "scaled_dot_product_attention":
            # CUDA's kernels draw dropout inside; the CPU's would leave its fast path for it.
            kwargs["dropout_p"] = 0.0
        elif function is torch.nn.functional.dropout:
            return _drop_out(*args, **kwargs)
        elif name in _FLOAT32 | _FLOAT32_RESULT and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                if name in _FLOAT32:
                    return function(*map(_to_float, args), **{key: _to_float(one) for key, one in kwargs.items()})
                if args[0].dtype in _HALVES and kwargs.get("dtype") is None:
                    kwargs["dtype"] = torch.float32
                return function(*args, **kwargs)
        return function(*args, **kwargs)


def _quantize_rows(a: torch.Tensor, threshold: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(a, dtype=torch.int8), a.new_empty(len(a), dtype=torch.float32), a.new_empty(0).long()


def _multiply_int8(a: torch.Tensor, ca: torch.Tensor, cb: torch.Tensor, *rest) -> tuple[torch.Tensor, torch.Tensor]:
    return a.new_empty((*ca.shape[:-1], cb.shape[0])), a.new_empty(0)


# bitsandbytes multiplies columns with outliers apart; how many there are is a question of values.
_WITHOUT_OUTLIERS = {
    "bitsandbytes.int8_vectorwise_quant.default": _quantize_rows,
    "bitsandbytes.int8_mixed_scaled_mm.default": _multiply_int8,
}


def convert_fake(module: torch.nn.Module, *args, **kwargs) -> torch.nn.Module:
    """Does for fake weights what ``Module.to`` does: that swaps tensors, which somebody looks at here."""
    _, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    for tensor in [*module.parameters(), *module.buffers()] if dtype is not None else ():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return module


def keep_cuda_autocast(layer: torch.nn.Module) -> None:
    """Lets the parts of a layer enter the mode by themselves: autograd leaves it outside when it recomputes them."""
    for part in layer.children():
        part.forward = _inside_cuda_autocast(part.forward)


def _inside_cuda_autocast(forward: Callable) -> Callable:
    @functools.wraps(forward)
    def entered(*args, **kwargs):
        with CudaAutocast():
            return forward(*args, **kwargs)

    return entered


def _multiply_groups(a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, *rest, **options) -> torch.Tensor:
    # Float32 is multiplied group by group; only the shape function of fake tensors refuses it.
    groups = [len(offs)] if a.dim() == b.dim() == 2 else []
    return a.new_empty((*groups, a.shape[-2], b.shape[-1]))


def _is_mask(indices: list) -> bool:
    return len(indices) == 1 and indices[0] is not None and indices[0].dtype is torch.bool


def _to_float(value: object) -> object:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _HALVES else value


def _drop_out(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    # CUDA keeps one byte per element for the backward pass, where the CPU keeps a mask in x's format.
    return torch.native_dropout(x, p, training)[0] if training and p > 0 else x


def cuda_workspaces() -> dict[str, Callable[[tuple, dict], int]]:
    """Lists what operations allocate inside themselves on a CUDA GPU, by the name of their CPU counterpart.

    Units: bytes. Source: torch 2.13 flash_api.cpp (backward: gradients of queries in float32, a float32 per head and
    token, keys' and values' gradients for all heads); bitsandbytes 0.50 backends/cuda/ops.py (a 4-bit layer is
    unpacked before a multiplication of more than 64 to 256 rows, depending on the GPU; the product of 8-bit numbers
    is made in 32 bit, then in fp16).
    """
    return {
        "aten._scaled_dot_product_flash_attention_for_cpu_backward": _flash_backward_bytes,
        # The softmax in float32, and which rows are empty.
        "aten._safe_softmax": lambda args, kwargs: 5 * args[0].numel(),
        "bitsandbytes.gemm_4bit": lambda args, kwargs: _unpacking_bytes(args, kwargs, 256, 2),
        "bitsandbytes.int8_mixed_scaled_mm": _int8_product_bytes,
        "bitsandbytes.int8_vectorwise_quant": lambda args, kwargs: 3 * args[0].numel(),
    }


def cpu_workspaces() -> dict[str, Callable[[tuple, dict], int]]:
    """Lists the same for the CPU, as far as it matters.

    Units: bytes. Source: bitsandbytes 0.50 backends/default/ops.py: a 4-bit layer is always unpacked.
    """
    return {"bitsandbytes.gemm_4bit": lambda args, kwargs: _unpacking_bytes(args, kwargs, 0, 1)}


def _flash_backward_bytes(args: tuple, kwargs: dict) -> int:
    query, key = args[1], args[2]
    batch, heads, length, width = query.shape
    if query.dtype not in _HALVES:
        return 0
    rounded = -(-length // 128) * 128
    expanded = 2 * batch * heads * key.shape[2] * width * query.element_size() if key.shape[1] < heads else 0
    return 4 * batch * heads * rounded * (-(-width // 32) * 32 + 1) + expanded


def _int8_product_bytes(args: tuple, kwargs: dict) -> int:
    rows, outputs = args[1].numel() // args[1].shape[-1], args[2].shape[0]
    return rows * outputs * (4 if args[0].dtype is torch.float16 else 4 + 2)


def _unpacking_bytes(args: tuple, kwargs: dict, most_rows: int, num_scales: int) -> int:
    inputs, shape, block = args[0], args[2], args[4]
    if inputs.numel() // inputs.shape[-1] <= most_rows:
        return 0
    blocks = -(-math.prod(shape) // block)
    # With double quantisation the scales are unpacked, and then shifted, in float32; CUDA's code keeps both.
    scales = num_scales * 4 * blocks if _has_nested_scales(args, kwargs) else 0
    return math.prod(shape) * inputs.element_size() + scales


def _has_nested_scales(args: tuple, kwargs: dict) -> bool:
    """Whether scales are quantised too: ``absmax_8bit`` by name, or the eighth argument."""
    return (kwargs.get("absmax_8bit") if len(args) < 8 else args[7]) is not None
