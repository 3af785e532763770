"""GPUs by name: ``configs/gpus.yaml``."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from forge_cli.errors import ConfigError
from forge_cli.paths import data_root
from forge_cli.units import GIB, MIB

_SIZES = {"k": 1, "m": 2, "g": 3, "t": 4}


class Gpu(NamedTuple):
    """One kind of GPU.

    Attributes:
        name: Its name in Forge, such as ``rtx-4090``.
        aliases: Other names.
        device: What torch calls it, or the start of that.
        memory_bytes: Memory on the box.
        usable_bytes: What torch can see of it.
        context_bytes: What a process takes before its first tensor, outside torch's counters.
        bandwidth_bytes: Bytes per second from and to its memory, by the data sheet.
        peak_flops: Operations per second of dense 16-bit matrix products with fp32 sums, by the data sheet.
        has_bf16: Whether it computes in bf16; else the peak is of fp16.
        source: Where ``usable_bytes`` comes from.
    """

    name: str
    aliases: tuple[str, ...]
    device: str
    memory_bytes: int
    usable_bytes: int
    context_bytes: int
    bandwidth_bytes: float
    peak_flops: float
    has_bf16: bool
    source: str


def list_gpus() -> list[Gpu]:
    """Lists every known GPU, in the order of the file."""
    import yaml

    path = os.path.join(data_root(), "configs", "gpus.yaml")
    with open(path, encoding="utf-8") as stream:
        entries = yaml.load(stream, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return [
        Gpu(
            name=name,
            aliases=tuple(fields.get("aliases", ())),
            device=fields["device"],
            memory_bytes=round(fields["memory_gib"] * GIB),
            usable_bytes=round(fields["usable_gib"] * GIB),
            context_bytes=fields["context_mib"] * MIB,
            bandwidth_bytes=fields["bandwidth_gbs"] * 1e9,
            peak_flops=fields["tflops"] * 1e12,
            has_bf16=fields.get("bf16", True),
            source=fields["source"],
        )
        for name, fields in entries.items()
    ]


def find_gpu(name: str) -> Gpu:
    """Finds a GPU by name, alias or what torch calls it; case, spaces, dashes and the maker's name do not matter.

    Raises:
        ConfigError: There is none of that name; names near ones.
    """
    gpus, wanted = list_gpus(), _plain(name)
    known = {_plain(label): gpu for gpu in gpus for label in (gpu.device, *gpu.aliases, gpu.name)}
    if wanted in known:
        return known[wanted]
    import difflib

    near = difflib.get_close_matches(wanted, known, n=6, cutoff=0.5)
    names = list(dict.fromkeys(known[one].name for one in near))[:3]
    raise ConfigError(
        f"{name} is no known GPU",
        why="its memory, bandwidth and peak come from configs/gpus.yaml",
        fix=f"did you mean {' or '.join(names)}? Else give its memory: --memory 24GiB"
        if names
        else f"one of {', '.join(gpu.name for gpu in gpus)}; or give its memory: --memory 24GiB",
    )


def match_device(device: str, total_bytes: int) -> Gpu | None:
    """Finds the GPU that torch sees; None for an unknown one, or one of another size (a laptop's).

    Args:
        device: What ``torch.cuda.get_device_name`` says.
        total_bytes: The total of ``torch.cuda.mem_get_info``.
    """
    fitting = [
        gpu
        for gpu in list_gpus()
        if _plain(device).startswith(_plain(gpu.device)) and abs(gpu.usable_bytes - total_bytes) < 0.1 * total_bytes
    ]
    return max(fitting, key=lambda gpu: len(gpu.device), default=None)


def parse_memory(text: str) -> int:
    """Reads an amount of memory: ``16GiB``, ``24 GB``, ``512M``.

    Returns:
        Bytes; ``GiB`` and ``G`` are powers of 1024, ``GB`` of 1000.

    Raises:
        ConfigError: It is no amount.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt])(i?b?)\s*", text.casefold())
    if found is None or found[3] == "i" or float(found[1]) == 0:
        raise ConfigError(
            f"{text!r} is no amount of memory",
            why="it takes a number and a unit",
            fix="write it like 16GiB (powers of 1024) or 16GB (powers of 1000)",
        )
    base = 1000 if found[3] == "b" else 1024
    return round(float(found[1]) * base ** _SIZES[found[2]])


def _plain(name: str) -> str:
    """Strips what people write or leave out: makers, series, spaces and dashes."""
    return re.sub(r"nvidia|geforce|tesla|amd|instinct|[\s_-]", "", name.casefold())
