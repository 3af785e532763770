"""What ends a run: too many rows lost, nothing trained, nothing that ends an answer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from forge_cli.data.report import SplitReport
from forge_cli.errors import DataError
from forge_cli.schema.data import DataSection
from forge_cli.units import count_of

if TYPE_CHECKING:
    from forge_cli.data.store import TokenFolder

SHOWN_PLACES = 5
_BAR = 40


def judge_split(report: SplitReport, data: DataSection, tokenizer, target: TokenFolder) -> None:
    """Ends the run when a split is not what anybody would want to train on.

    Args:
        report: What became of its rows.
        data: The section.
        tokenizer: To show a row in words.
        target: The rows themselves.

    Raises:
        DataError: Rows are too long and the run file does not say what to do with them, more answers are lost than
            it allows, no row is left, no token is trained, or no row trains an end token.
    """
    lost = report.rows_dropped + report.rows_truncated + report.rows_split
    if lost and (data.on_overlong == "error" or (data.on_overlong == "split" and report.rows_dropped)):
        _refuse_overlong(report, data, lost)
    if not report.rows_kept:
        raise DataError(
            f"no row is left for {report.name}: of {report.rows_read} that were read, "
            f"{count_of(report.rows_bad, 'is', 'are')} bad, {count_of(report.rows_unused, 'is', 'are')} left out or "
            f"held back, and of {report.rows_dropped} no answer fits into "
            f"data.max_length {data.max_length}",
            where=report.name,
            why=f"{count_of(report.rows_dropped, 'row is', 'rows are')} longer; the longest has "
            f"{report.longest_tokens} tokens",
            fix=f"raise data.max_length to {report.longest_tokens}" if report.rows_dropped else "mend the bad rows",
        )
    refuse_losses(report, data.max_length, data.max_lost_ratio)
    if (
        report.format == "unpaired_preference"
        and report.name == "train"
        and report.rows_wanted in (0, report.rows_kept)
    ):
        raise DataError(
            f"{'the only answer is' if report.rows_kept == 1 else f'all {report.rows_kept} answers are'} "
            f"{'wanted' if report.rows_wanted else 'unwanted'}",
            where=report.name,
            why="there is nothing to tell apart",
            fix="add rows with the other label",
        )
    if not report.trained_tokens:
        raise DataError(
            f"0 trained tokens in {count_of(report.rows_kept, 'row', 'rows')} of {report.name}",
            where=report.name,
            why="all labels are masked, so nothing would be learned",
            fix="look at rows with `forge data preview`",
        )
    whole = report.rows_used - report.rows_dropped - report.rows_truncated
    if whole > 0 and report.rows_without_end >= whole and report.format == "tokens":
        raise DataError(
            "no row trains an end token; the first one reads\n" + _show_first(report, tokenizer, target),
            where=report.name,
            why="the model would never learn to stop",
            fix=f"end rows with a trained {tokenizer.eos_token!r}",
        )


def refuse_losses(report: SplitReport, max_length: int, max_lost_ratio: float) -> None:
    """Ends the run when more answers are lost than the run file allows.

    Raises:
        DataError: They are.
    """
    if report.rows_lost / report.rows_used > max_lost_ratio:
        share = 100 * report.rows_lost / report.rows_used
        raise DataError(
            f"{_count_share(report, report.rows_lost, 'loses all or part of its', 'lose all or part of their')} answer "
            f"at data.max_length {max_length} ({share:.1f} %, {_list_places(report)})",
            where=report.name,
            why="what is cut is never learned, and an answer that is cut has no end",
            fix=f"raise data.max_length ({report.longest_tokens} keeps all), or allow it with data.max_lost_ratio: "
            f"{math.ceil(share) / 100:g}\n{render_histogram(report)}",
        )


def _refuse_overlong(report: SplitReport, data: DataSection, lost: int) -> None:
    if data.on_overlong == "split":
        raise DataError(
            f"{_count_share(report, report.rows_dropped, 'is', 'are')} longer than data.max_length {data.max_length} "
            f"and cannot be split, as the format is {report.format} ({_list_places(report)})",
            where=report.name,
            why="the rest of an answer would be trained without its question",
            fix="split is for text and tokens; use on_overlong: truncate or drop, or raise data.max_length to "
            f"{report.longest_tokens}",
        )
    raise DataError(
        f"{_count_share(report, lost, 'is', 'are')} longer than data.max_length {data.max_length}; "
        f"the longest has {report.longest_tokens} tokens ({_list_places(report)})",
        where=report.name,
        why="cutting or dropping them unasked would change what is learned",
        fix=f"raise data.max_length to {report.longest_tokens}, or set data.on_overlong: drop or truncate",
    )


def _count_share(report: SplitReport, count: int, one: str, many: str) -> str:
    """Writes ``1 of 4 rows is``, ``2 of 4 rows are``."""
    return f"{count} of {count_of(report.rows_used, 'row', 'rows')} {one if count == 1 else many}"


def _list_places(report: SplitReport) -> str:
    count = report.rows_dropped + report.rows_truncated + report.rows_split
    return ", ".join(report.overlong_places[:SHOWN_PLACES]) + (", ..." if count > SHOWN_PLACES else "")


def render_histogram(report: SplitReport) -> str:
    """Draws how many rows have which length before cutting, and where ``max_length`` falls."""
    most = max((count for _, count in report.histogram), default=1)
    lines = [
        (end, f"  up to {end:>7} tokens {count:>9} {'#' * round(_BAR * count / most)}")
        for end, count in report.histogram
    ]
    if report.max_length:
        lines.append((report.max_length, f"  -- data.max_length {report.max_length} --"))
    return "\n".join(line.rstrip() for _, line in sorted(lines, key=lambda one: one[0]))


def _show_first(report: SplitReport, tokenizer, target: TokenFolder) -> str:
    import pyarrow as pa

    writer = target.writers[report.name]
    writer.close()
    with writer.path.open("rb") as file:
        row = pa.ipc.open_stream(file).read_next_batch().slice(0, 1).to_pylist()[0]
    marks = "".join("^" if label != -100 else "." for label in row["labels"][-40:])
    text = tokenizer.decode(row["input_ids"][-40:])
    return f"  ...{text!r}\n  last {len(marks)} tokens, ^ is trained: {marks}"
