"""The data report for people."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from forge_cli.data.judging import render_histogram
from forge_cli.data.report import DataReport, SplitReport
from forge_cli.resolve.wording import printable
from forge_cli.units import count_of, format_bytes

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
        lines += ["", f"row length of {report.splits[0].name}, before cutting", render_histogram(report.splits[0])]
    return "\n".join([*lines, *_describe_batches(report), *list_notes(report), _describe_origin(report)])


def render_table(splits: Sequence[Mapping[str, object]]) -> list[str]:
    """Renders splits, as :meth:`DataReport.as_dict` returns them, as the lines of a Markdown table."""
    columns = {
        "split": "name",
        "format": "format",
        "rows read": "rows_read",
        "bad": "rows_bad",
        "kept": "rows_kept",
        "dropped": "rows_dropped",
        "cut": "rows_truncated",
        "tokens": "tokens",
        "trained tokens": "trained_tokens",
        "median": "percentiles",
        "longest": "longest_tokens",
    }
    rows = [
        [split[key].get("50", 0) if key == "percentiles" else split[key] for key in columns.values()]
        for split in splits
    ]
    rule = ["---"] * len(columns)
    return [f"| {' | '.join(map(str, row))} |" for row in ([*columns], rule, *rows)]


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
    notes = [note for split in report.splits for note in _list_split_notes(split)]
    if report.has_plain_prompts:
        notes.append(
            "note: prompts are text and are trained as they stand, without the chat template; a chat model wants lists "
            "of turns, or columns instruction and output"
        )
    if report.rows_in_both:
        pairs = ", ".join(f"{one} = {other}" for one, other in report.in_both_places)
        rows = count_of(report.rows_in_both, "evaluation row is", "evaluation rows are")
        notes.append(f"note: {rows} trained on as well ({pairs})")
    if report.unused_columns:
        notes.append(f"note: columns that nothing reads: {', '.join(report.unused_columns)}")
    return [printable(note) for note in notes]


def _list_split_notes(split: SplitReport) -> list[str]:
    def say(count: int, one: str, many: str) -> None:
        if count:
            notes.append(f"note: {count_of(count, f'row of {split.name} {one}', f'rows of {split.name} {many}')}")

    notes: list[str] = []
    pairs = ", ".join(f"{one} = {other}" for one, other in split.duplicate_places)
    say(split.rows_duplicate, f"repeats an earlier one ({pairs})", f"repeat earlier ones ({pairs})")
    places = f" ({'; '.join(split.bad_places)})" if split.bad_places else ""
    say(split.rows_bad, f"was skipped{places}", f"were skipped{places}")
    kept = "the text of special tokens; it stays text"
    say(split.rows_escaped, f"holds {kept}", f"hold {kept}")
    if split.rows_parted:
        notes.append(
            f"note: in {count_of(split.rows_parted, 'row', 'rows')} of {split.name} a token would hold the end of the "
            "prompt and the start of the answer; they are tokenised apart, as the model will be asked. Better end "
            "prompts with a line break, or begin answers with the space that prompts end with"
        )
    if split.rows_prompt_found:
        notes.append(
            f"note: {count_of(split.rows_prompt_found, 'pair', 'pairs')} of {split.name} without a prompt: what both "
            "texts begin with, cut back to the end of a word, is taken for it; a column prompt says where answers begin"
        )
    say(split.rows_untrained, "has no trained token", "have no trained token")
    say(split.rows_without_end, "trains no end token at its end", "train no end token at their end")
    return notes


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
