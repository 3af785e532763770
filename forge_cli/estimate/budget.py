"""Whether a step fits a device: from allocated bytes to what the device must have."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from forge_cli.estimate.memory import MemoryEstimate
from forge_cli.estimate.setting import Setting
from forge_cli.facts.gpus import Gpu

# The CUDA context and the kernels' code, outside of torch's counters. Source: 0.3 GiB (T4) to 0.6 GiB (H100).
CONTEXT_BYTES = 600 * 1024**2
# What torch reserves beyond what it has allocated. Source: published runs of several tools; sequences of one length
# leave 2 to 6 % in gaps, sequences of many lengths 10 to 20 %, with expandable segments about half of that.
RESERVE_RATIO, RESERVE_RATIO_VARIED = 0.04, 0.08
CALIBRATION_FILE = "calibration.json"


class Device(NamedTuple):
    """What a step has to fit into.

    Attributes:
        name: For the messages.
        usable_bytes: What torch can have of it, the context included.
        context_bytes: What the CUDA context takes of that.
        reserve_ratio: Reserved beyond allocated, as a share (0 to 1); ``None`` chooses by the lengths of the rows.
        gpu: Its facts, for times; ``None`` for a mere size.
    """

    name: str
    usable_bytes: int
    context_bytes: int = CONTEXT_BYTES
    reserve_ratio: float | None = None
    gpu: Gpu | None = None


class Budget(NamedTuple):
    """An estimate beside a device.

    Attributes:
        estimate: The estimate.
        device: The device.
        reserved_bytes: What torch will have reserved at the peak.
        needed_bytes: The same with the context: what the device must have.
    """

    estimate: MemoryEstimate
    device: Device
    reserved_bytes: int
    needed_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the device has what is needed, gaps between allocations included."""
        return self.needed_bytes <= self.device.usable_bytes

    @property
    def verdict(self) -> str:
        """``fits``, ``tight`` (allocations fit, the gaps between them may not) or ``too big``."""
        if self.fits:
            return "fits"
        allocated = self.estimate.total_bytes + self.device.context_bytes
        return "tight" if allocated <= self.device.usable_bytes else "too big"


def make_budget(estimate: MemoryEstimate, device: Device) -> Budget:
    """Puts an estimate beside a device.

    Units: bytes. Source: reserved = allocated x (1 + reserve ratio); needed = reserved + context.
    """
    ratio = device.reserve_ratio if device.reserve_ratio is not None else reserve_ratio(estimate.setting)
    reserved = round(estimate.total_bytes * (1 + ratio))
    return Budget(estimate, device, reserved, reserved + device.context_bytes)


def reserve_ratio(setting: Setting) -> float:
    """Returns the share by which reserved exceeds allocated. Units: ratio. Source: the constants of this module."""
    return RESERVE_RATIO_VARIED if setting.padded else RESERVE_RATIO


def read_calibration(folder: Path, gpu: str) -> Mapping[str, float]:
    """Reads the two machine constants that ``forge estimate --calibrate`` found for a GPU; empty without any."""
    try:
        found = json.loads((folder / CALIBRATION_FILE).read_text(encoding="utf-8")).get(gpu, {})
    except (OSError, ValueError, AttributeError):
        return {}
    return {k: v for k, v in found.items() if k in ("context_bytes", "reserve_ratio") and isinstance(v, (int, float))}


def write_calibration(folder: Path, gpu: str, context_bytes: int, ratio: float) -> Path:
    """Keeps the two constants of a GPU beside those of others; atomic."""
    file = folder / CALIBRATION_FILE
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    known[gpu] = {"context_bytes": context_bytes, "reserve_ratio": round(ratio, 4)}
    folder.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".new")
    draft.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, file)
    return file
