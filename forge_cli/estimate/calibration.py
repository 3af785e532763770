"""Fits the two constants of a machine, context and reserve ratio, to the reports of finished runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from forge_cli.estimate.budget import write_calibration
from forge_cli.facts.gpus import match_device
from forge_cli.paths import cache_root


def calibrate_from_reports(folder: Path) -> dict[str, dict[str, float]]:
    """Reads every ``report.json`` below a folder and keeps each GPU's constants.

    Context is what the driver counted beyond what torch had reserved; the reserve ratio is reserved over allocated.
    Nothing else is fitted: the formulas have no free numbers.

    Returns:
        GPU to ``runs``, ``context_bytes`` and ``reserve_ratio``; empty without a measured run.

    Units: bytes and ratio. Source: medians over the runs.
    """
    measured: dict[str, list[tuple[float, float]]] = {}
    for report in _read_reports(folder):
        memory = report.get("memory") or {}
        keys = ("gpu", "allocated_bytes", "reserved_bytes", "device_bytes")
        if not all(memory.get(key) for key in keys):
            continue
        gpu, allocated, reserved, device = (memory[key] for key in keys)
        known = match_device(gpu, memory.get("total_bytes") or 0)
        gpu = known.name if known else gpu
        measured.setdefault(gpu, []).append((max(device - reserved, 0), max(reserved / allocated - 1, 0.0)))
    found = {}
    for gpu, pairs in measured.items():
        context, ratio = round(median(one for one, _ in pairs)), median(one for _, one in pairs)
        write_calibration(cache_root(), gpu, context, ratio)
        found[gpu] = {"runs": len(pairs), "context_bytes": context, "reserve_ratio": ratio}
    return found


def _read_reports(folder: Path) -> Iterator[dict]:
    for file in sorted(folder.glob("**/report.json")):
        try:
            report = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(report, dict):
            yield report
