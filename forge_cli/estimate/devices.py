"""The devices that a run is compared with: a GPU of the table, one of a given size, or the one that is visible."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from forge_cli.errors import ConfigError
from forge_cli.estimate.budget import CONTEXT_BYTES, Device, make_budget, read_calibration
from forge_cli.estimate.memory import MemoryEstimate
from forge_cli.facts.gpus import Gpu, find_gpu, list_gpus, match_device, parse_memory
from forge_cli.paths import cache_root
from forge_cli.units import MIB

if TYPE_CHECKING:
    from forge_cli.schema.runspec import RunSpec

_QUERY = ("--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
_MOST_NAMES = 3


def choose_device(gpu: str | None, memory: str | None) -> Device | None:
    """Returns the GPU of a name, one of a size, or the visible one; ``None`` where there is none.

    Raises:
        ConfigError: Both are given, or one cannot be read.
    """
    if gpu is not None and memory is not None:
        raise ConfigError("--gpu and --memory both say what a run has to fit into", fix="give one of them")
    if gpu is not None:
        return _calibrated(from_gpu(find_gpu(gpu)))
    if memory is not None:
        return Device(memory, parse_memory(memory))
    return find_visible()


def list_devices(spec: RunSpec | None = None) -> list[Device]:
    """Lists the GPUs of the table; with a run's settings, those that can compute it."""
    return [_calibrated(from_gpu(gpu)) for gpu in list_gpus() if spec is None or not find_obstacle(spec, gpu)]


def find_obstacle(spec: RunSpec, gpu: Gpu) -> str:
    """Says which format or kernel a run asks for that a GPU does not have; empty if it has all of them.

    Source: bf16 and FlashAttention 2 both need compute capability 8.0 (Ampere) or newer.
    """
    if spec.training.precision == "bf16" and not gpu.has_bf16:
        return "no bfloat16"
    if spec.model.attn_implementation == "flash_attention_2" and not gpu.has_bf16:
        return "no flash_attention_2"
    return ""


def check_device(spec: RunSpec, gpu: Gpu) -> None:
    """Refuses a GPU that cannot compute a run.

    Raises:
        ConfigError: Says what to write instead.
    """
    obstacle = find_obstacle(spec, gpu)
    if obstacle == "no bfloat16":
        raise ConfigError(
            f"{gpu.name} has no bfloat16, but training.precision is bf16", fix="write training.precision: fp16 or auto"
        )
    if obstacle:
        raise ConfigError(
            f"{gpu.name} cannot run flash_attention_2",
            why="it needs Ampere or newer",
            fix="write model.attn_implementation: sdpa or auto",
        )


def from_gpu(gpu: Gpu) -> Device:
    """Makes a device of a GPU's facts."""
    return Device(gpu.name, gpu.usable_bytes, gpu.context_bytes, gpu=gpu)


def find_visible() -> Device | None:
    """Asks the driver's own tool for the first GPU; torch stays unloaded."""
    import shutil
    import subprocess

    if shutil.which("nvidia-smi") is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    try:
        printed = subprocess.run(
            ["nvidia-smi", *_QUERY], capture_output=True, text=True, timeout=5, check=True
        ).stdout.splitlines()
        name, _, total = printed[0].rpartition(",")
        known = match_device(name.strip(), int(total) * MIB)
        return _calibrated(from_gpu(known) if known else Device(name.strip(), int(total) * MIB, CONTEXT_BYTES))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def smallest_that_fit(estimate: MemoryEstimate, devices: list[Device]) -> str:
    """Names the smallest of some devices that hold an estimate; empty if none does."""
    fitting = [device for device in devices if make_budget(estimate, device).fits]
    fitting.sort(key=lambda one: one.usable_bytes)
    return ", ".join(device.name for device in fitting[:_MOST_NAMES])


def _calibrated(device: Device) -> Device:
    found = read_calibration(cache_root(), device.name)
    return device._replace(
        context_bytes=int(found.get("context_bytes", device.context_bytes)),
        reserve_ratio=found.get("reserve_ratio", device.reserve_ratio),
    )
