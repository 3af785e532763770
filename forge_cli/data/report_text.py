"""The data report for people."""

from __future__ import annotations

from collections.abc import Callable

from forge_cli.data.judging import render_histogram
from forge_cli.data.report import DataReport, SplitReport
from forge_cli.resolve.wording import printable
from forge_cli.units import format_bytes

# What a row of the table says, and whether it is left out when it is 0 everywhere.
_LINES: list[tuple[str, Callable[[SplitReport], object], bool]] = [
    ("format", lambda one: one.format, False),
    ("rows read", lambda one: one.rows_read, False),
    ("  bad, skipped", lambda one: one.rows_bad, True),
    ("  left out or held back", lambda one: one.rows_unused, True),
    ("  dropped, too long", lambda one: one.rows_dropped, True),
    ("rows kept", lambda one: one.rows_kept, False),
    ("  seen again by weight", lambda one: one.count_repeats(), True),
    ("  wanted answers", lambda one: one.rows_wanted, True),
    ("  cut, too long", lambda one: one.rows_truncated, True),
    ("  split, too long", lambda one: one.rows_split, True),
    ("  answers lost in part or whole", lambda one: one.rows_lost, True),
    ("  duplicates of an earlier row", lambda one: one.rows_duplicate, False),
    ("  with text of special tokens", lambda one: one.rows_escaped, True),
    ("  without a trained token", lambda one: one.rows_untrained, False),
    ("  without a trained end token", lambda one: one.rows_without_end, False),
    ("tokens", lambda one: one.tokens, False),
    ("  trained", lambda one: f"{one.trained_tokens:,} ({100 * one.trained_tokens / max(one.tokens, 1):.0f} %)", False),
    ("row length, tokens: 5 %", lambda one: one.percentiles.get("5", 0), False),
    ("  median", lambda one: one.median_tokens, False),
    ("  95 %", lambda one: one.percentiles.get("95", 0), False),
    ("  longest, before cutting", lambda one: one.longest_tokens, False),
]


def render_report(report: DataReport, *, with_histogram: bool = False) -> str:
    """Renders what became of the rows: a table with a column per split, then what to know.

    Args:
        report: The report.
        with_histogram: Draw the row lengths of the training split as well.
    """
    rows = [("", *(split.name for split in report.splits))]
    for label, read, is_optional in _LINES:
        # A stream is tokenised while training: until then only its rows are known.
        values = [read(one) if one.tokens or label in ("format", "rows read") else "later" for one in report.splits]
        if not is_optional or any(values):
            rows.append((label, *(f"{value:,}" if isinstance(value, int) else str(value) for value in values)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    lines = [line.rstrip() for line in lines]
    if with_histogram:
        lines += ["", f"row length of {report.splits[0].name}", render_histogram(report.splits[0])]
    return "\n".join([*lines, *_describe_batches(report), *list_notes(report), _describe_origin(report)])


def _describe_batches(report: DataReport) -> list[str]:
    if not report.steps_per_epoch:
        return []
    if not report.packed_sequences:
        return [f"optimizer steps per epoch: {report.steps_per_epoch:,}"]
    return [
        f"optimizer steps per epoch: {report.steps_per_epoch:,} ({report.steps_unpacked:,} without packing, "
        f"{report.steps_packed:,} with: {report.packed_sequences:,} sequences, {100 * report.packed_ratio:.0f} % full)"
    ]


def list_notes(report: DataReport) -> list[str]:
    """Lists what is allowed but may not be meant."""
    notes = []
    for split in report.splits:
        if split.duplicate_places:
            pairs = ", ".join(f"{one} = {other}" for one, other in split.duplicate_places)
            notes.append(f"note: {split.rows_duplicate} rows of {split.name} repeat earlier ones ({pairs})")
        if split.bad_places:
            notes.append(f"note: {split.rows_bad} rows of {split.name} were skipped ({'; '.join(split.bad_places)})")
        if split.rows_escaped:
            notes.append(
                f"note: {split.rows_escaped} rows of {split.name} hold the text of special tokens; it stays text"
            )
        if split.rows_untrained:
            notes.append(f"note: {split.rows_untrained} rows of {split.name} have no trained token")
        if split.rows_without_end:
            notes.append(f"note: {split.rows_without_end} rows of {split.name} train no end token at their end")
    if report.has_plain_prompts:
        notes.append(
            "note: prompts are text and are trained as they stand, without the chat template; a chat model wants lists "
            "of turns, or columns instruction and output"
        )
    if report.rows_in_both:
        pairs = ", ".join(f"{one} = {other}" for one, other in report.in_both_places)
        notes.append(f"note: {report.rows_in_both} evaluation rows are trained on as well ({pairs})")
    if report.unused_columns:
        notes.append(f"note: columns that nothing reads: {', '.join(report.unused_columns)}")
    return [printable(note) for note in notes]


def _describe_origin(report: DataReport) -> str:
    if report.from_cache:
        return f"tokens of an earlier run are used ({report.fingerprint[:12]})"
    if not report.scanned_bytes:
        return ""
    mib = report.scanned_bytes / 2**20
    return (
        f"{format_bytes(report.scanned_bytes)} read at {mib / max(report.scan_seconds, 1e-3):.0f} MiB/s, "
        f"tokenised at {mib / max(report.tokenize_seconds, 1e-3):.1f} MiB/s"
    )
