"""Chooses the device and the number formats of a run, and says why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from forge_cli.errors import MachineError
from forge_cli.schema.runspec import RunSpec

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """Where and in which formats a run computes.

    Attributes:
        device: ``cuda:0``, ``mps`` or ``cpu``.
        device_name: Name of the GPU or ``CPU``.
        dtype: Format of the forward and backward pass.
        autocast_dtype: Format of mixed precision; float32 when there is none.
        weight_dtype: Format the weights are loaded in.
        quantized_dtype: Format that 4-bit weights are multiplied in.
        reason: Why, in words.
    """

    device: str
    device_name: str
    dtype: torch.dtype
    autocast_dtype: torch.dtype
    weight_dtype: torch.dtype
    quantized_dtype: torch.dtype
    reason: str


def choose_compute(spec: RunSpec, local_rank: int = 0) -> Compute:
    """Chooses device and formats: bf16 where the GPU has it, else fp16 with float32 adapters; float32 on the CPU.

    A frozen base is loaded in the compute format. A trained base is loaded in float32 (master weights under mixed
    precision) unless ``model.dtype`` asks for bfloat16.

    Args:
        spec: What to run.
        local_rank: GPU to use, for one of several processes.

    Raises:
        MachineError: The wanted precision does not run on this machine.
    """
    device, name = _find_device(local_rank)
    has_bf16 = device == "cpu" or device == "mps" or torch.cuda.is_bf16_supported(including_emulation=False)
    wanted = spec.training.precision
    if wanted == "auto":
        dtype, reason = _choose_precision(device, has_bf16)
    else:
        dtype, reason = _PRECISIONS[wanted], f"training.precision: {wanted}"
        if dtype is torch.bfloat16 and not has_bf16:
            raise MachineError(
                f"{name} has no bfloat16",
                where="training.precision",
                fix="use training.precision: fp16, fp32 or auto",
            )
        if dtype is torch.float16 and not device.startswith("cuda"):
            raise MachineError(
                "fp16 training needs a CUDA GPU", where="training.precision", fix="use training.precision: auto"
            )
    weight_dtype = _DTYPES.get(spec.model.dtype, dtype if spec.lora else torch.float32)
    autocast_dtype = dtype
    if dtype is torch.float32 and weight_dtype is not torch.float32:
        # Without mixed precision the weights' own format is what is computed in.
        dtype, reason = weight_dtype, f"model.dtype: {spec.model.dtype}, without mixed precision"
    quantized = spec.quantization.bnb_4bit_compute_dtype if spec.quantization else "auto"
    return Compute(device, name, dtype, autocast_dtype, weight_dtype, _DTYPES.get(quantized, dtype), reason)


def _find_device(local_rank: int) -> tuple[str, str]:
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise MachineError(
                f"process {local_rank} of this machine has no GPU: there are {count}",
                where="LOCAL_RANK",
                why="two processes on one GPU are slower than one",
                fix=f"use --num-processes {count}",
            )
        return f"cuda:{local_rank}", torch.cuda.get_device_name(local_rank)
    if torch.backends.mps.is_available():
        return "mps", "Apple GPU"
    return "cpu", "CPU"


def _choose_precision(device: str, has_bf16: bool) -> tuple[torch.dtype, str]:
    if device == "cpu":
        return torch.float32, "float32 on the CPU: bfloat16 is many times slower there"
    if device == "mps":
        return torch.float32, "float32 on an Apple GPU: mixed precision is not tested there"
    if has_bf16:
        return torch.bfloat16, "bfloat16: the GPU has it"
    return torch.float16, "float16 with float32 trained weights: the GPU has no bfloat16"


def dtype_name(dtype: torch.dtype) -> str:
    """Returns ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")
