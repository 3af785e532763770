"""Writes the table of ``estimate_gpu.py`` into a page."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from pathlib import Path

_SHORT = {"forward and backward": "fwd/bwd", "optimizer step": "step", "evaluation": "before the first step"}
_NEAR = 0.05


def render_section(head: Mapping, rows: Mapping[str, Mapping]) -> str:
    """Renders head, table and summary as Markdown; the summary is the last paragraph."""
    unit, size = ("MiB", 2**20) if head["on_cpu"] else ("GiB", 2**30)
    columns = ["case", f"predicted {unit}", f"measured {unit}", "error", "phase of the peak", f"reserved {unit}"]
    columns += [f"context {unit}", "tokens/s predicted", "tokens/s measured"]
    lines = [*_describe(head), "", _join(columns), _join(["---"] + ["---:"] * (len(columns) - 1))]
    for name, row in rows.items():
        lines.append(_join(_list_cells(name, row, size)))
    return "\n".join([*lines, "", *_summarise(rows)])


def _describe(head: Mapping) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    place = "CPU, float32, live tensors; an eighth of the length, narrow models"
    if not head["on_cpu"]:
        total = f"{head['total_bytes'] / 2**30:.2f} GiB"
        place = f"{head['gpu']} ({total} visible to torch), driver {head['driver']}, CUDA {head['cuda']}"
    return [f"{place}; {head['date']}.", f"{versions}.", "", f"`{head['command']}`"]


def _list_cells(name: str, row: Mapping, size: int) -> list[str]:
    predicted = f"{row['predicted_bytes'] / size:.2f}"
    if row["status"] != "measured":
        return [name, predicted, f"{row['status']}: {row['reason'].replace('|', '/')}", *[""] * 6]
    phases = [max(row[kind], key=row[kind].__getitem__) for kind in ("predicted_phases", "phases")]
    reserved, device = row.get("reserved_bytes"), row.get("device_bytes")
    speeds = [row[f"{kind}_tokens_per_second"] for kind in ("predicted", "measured")]
    return [
        name,
        predicted,
        f"{row['measured_bytes'] / size:.2f}",
        f"{100 * row['error_ratio']:+.1f} %",
        " / ".join(dict.fromkeys(_SHORT.get(phase, phase) for phase in phases)),
        f"{reserved / size:.2f}" if reserved else "",
        f"{(device - reserved) / size:.2f}" if reserved and device else "",
        *(f"{speed:,.0f}" if speed else "" for speed in speeds),
    ]


def _summarise(rows: Mapping[str, Mapping]) -> list[str]:
    done = {name: row for name, row in rows.items() if row["status"] == "measured"}
    if not done:
        return ["Nothing was measured."]
    errors = {name: abs(row["error_ratio"]) for name, row in done.items()}
    near, worst = sum(error <= _NEAR for error in errors.values()), max(errors, key=errors.__getitem__)
    median = 100 * statistics.median(errors.values())
    parts = [
        f"{near} of {len(errors)} peaks within {_NEAR:.0%}, median error {median:.2f} %, worst "
        f"{100 * errors[worst]:.1f} % ({worst})."
    ]
    for phase in next(iter(done.values()))["predicted_phases"]:
        off = [abs(row["predicted_phases"][phase] / row["phases"][phase] - 1) for row in done.values()]
        parts.append(f"{phase}: median {100 * statistics.median(off):.2f} %, worst {100 * max(off):.1f} %.")
    speeds = [
        row["measured_tokens_per_second"] / row["predicted_tokens_per_second"]
        for row in done.values()
        if row["predicted_tokens_per_second"]
    ]
    if speeds:
        parts.append(
            f"Speed, measured over predicted: median {statistics.median(speeds):.2f}, {min(speeds):.2f} to "
            f"{max(speeds):.2f}."
        )
    missing = len(rows) - len(done)
    return [*parts, *([f"{missing} not measured."] if missing else [])]


def write_page(page: Path, mark: str, section: str) -> None:
    """Puts a section between its two marks in a page, or at the page's end; the page is replaced in one move."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, found, rest = text.partition(begin)
    after = rest.partition(end)[2] if found else "\n"
    draft = page.with_name(page.name + ".new")
    draft.write_text(f"{before if found else text + chr(10)}{begin}\n{section}\n{end}{after}", encoding="utf-8")
    os.replace(draft, page)


def _join(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
