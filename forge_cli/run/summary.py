"""The end of a run in words, from its report; needs no torch."""

from __future__ import annotations

import shlex
from pathlib import Path

from forge_cli.run.folder import PAGE_FILE
from forge_cli.units import format_bytes, format_duration

_SHOWN_SAMPLES = 3
_WIDTH = 160


def verdict(report: dict) -> list[str]:
    """Says in at most three lines how the run went."""
    losses, match = report["losses"], report["exact_match_ratio"]
    lines = []
    if losses["eval_before"] is not None:
        line = f"held-out loss {losses['eval_before']:.4f} before, {losses['eval_raw']:.4f} after"
        if losses["eval_ema"] is not None:
            line += f", {losses['eval_ema']:.4f} with EMA weights"
        lines.append(line)
    elif losses["train_first"] is not None:
        lines.append(
            f"training loss {losses['train_first']:.4f} at the first step, {losses['train_last']:.4f} at the last"
        )
    if match["after"] is not None:
        lines.append(
            f"exact answers on the held-out rows: {100 * match['before']:.1f} % before, "
            f"{100 * match['after']:.1f} % after"
        )
    alarms = len(report["alarms"])
    lines.append(
        f"{report['steps']} steps in {format_duration(report['training_seconds'])}, "
        f"{report['tokens_per_second'] or 0:.0f} real tokens/s, peak {format_bytes(report['peak_memory_bytes'])} "
        f"({report['peak_memory_of']}{_estimated(report)}), {alarms} alarm{'' if alarms == 1 else 's'}"
    )
    return lines


def _estimated(report: dict) -> str:
    estimated = report["estimated_memory_bytes"]
    return f", estimated {format_bytes(estimated)}" if estimated else ""


def render_summary(report: dict, folder: Path, program: str = "forge") -> str:
    """Renders the verdict, a few answers before and after, where things are and what to type next.

    Args:
        report: Content of ``report.json``.
        folder: The run folder.
        program: How the user calls Forge.
    """
    lines = ["", *verdict(report), ""]
    for sample in report["samples"][:_SHOWN_SAMPLES]:
        lines += [f"  asked   {_shorten(sample['shown'])}", f"  before  {_shorten(sample['before'])}"]
        lines += [f"  after   {_shorten(sample['after'])}", ""]
    lines += [f"{report['weights']:8} {folder / report['weights']}", f"report   {find_page(folder)}"]
    following = report["next"]
    if following.startswith("forge recipes") and report.get("method", {}).get("name", "reward") != "reward":
        lines.append(f"talk     {program} chat {shlex.quote(str(folder))}")
    if following.startswith("forge "):
        following = program + following.removeprefix("forge")
    return "\n".join([*lines, f"next     {following}"])


def find_page(folder: Path) -> Path:
    """Returns the page of a run; its Markdown twin where the page could not be written."""
    page = folder / PAGE_FILE
    return page if page.exists() else folder / "report.md"


def _shorten(text: str) -> str:
    """Fits a text on one line; control characters of a data row must not reach the terminal."""
    shown = "".join(c if c.isprintable() else " " for c in text).strip()
    shown = shown or "(nothing)"
    return shown if len(shown) <= _WIDTH else shown[: _WIDTH - 3] + "..."
