"""What became of the rows, counted."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from forge_cli.data.outcomes import Columns, Outcome
from forge_cli.data.repeats import RowDigests, find_in_both, find_repeats
from forge_cli.units import count_of

LISTED_PLACES = 20
_SHOWN_PAIRS = 3
PERCENTILES = (5, 25, 50, 75, 95, 99)
_BARS = 12


@dataclass
class SplitReport:
    """What became of the rows of one split.

    Attributes:
        name: ``train`` or ``eval``.
        format: Format of its rows.
        rows_read: Rows in the files, bad ones included.
        max_length: Longest row that is kept whole, in tokens; 0 if there is none.
        rows_bad: Rows that could not be read or rendered, and were skipped.
        rows_unused: Rows that a cap or a weight left out, or that the other split took.
        rows_used: Rows that were tokenised, each counted once: those that were kept and those that were too long.
        rows_kept: Rows that are trained, repeats included.
        rows_dropped: Rows that were too long.
        rows_truncated: Rows that were cut.
        rows_split: Rows that go on in further rows.
        rows_wanted: Rows whose answer is marked as wanted, repeats included.
        rows_lost: Rows that lost all or part of an answer by dropping or cutting.
        rows_untrained: Rows that are kept and have no trained token.
        rows_without_end: Rows that are kept whole and train no end token.
        rows_escaped: Rows that hold the text of a special token, which was kept as text.
        rows_parted: Rows whose prompt and answer were tokenised apart, as a token would have held text of both.
        rows_prompt_found: Pairs of text without a prompt, of which the common beginning was taken for it.
        rows_duplicate: Rows whose tokens equal those of an earlier one.
        tokens: Tokens that are left.
        trained_tokens: Those of them that are trained.
        longest_tokens: Longest row, before cutting.
        bad_places: Of the first kinds of bad rows: where the first one stands, why it is bad, and how many are like it.
        overlong_places: Where the first overlong rows stand.
        duplicate_places: Pairs of places, the first of them.
        percentiles: Percentile to length in tokens, after cutting.
        histogram: Upper end of a range of lengths to the number of rows in it: of all tokenised rows, before cutting.
            ``max_length`` is one of the ends if rows are longer and shorter.
    """

    name: str
    format: str
    rows_read: int
    max_length: int = 0
    rows_bad: int = 0
    rows_unused: int = 0
    rows_used: int = 0
    rows_kept: int = 0
    rows_dropped: int = 0
    rows_truncated: int = 0
    rows_split: int = 0
    rows_wanted: int = 0
    rows_lost: int = 0
    rows_untrained: int = 0
    rows_without_end: int = 0
    rows_escaped: int = 0
    rows_parted: int = 0
    rows_prompt_found: int = 0
    rows_duplicate: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest_tokens: int = 0
    bad_places: list[str] = field(default_factory=list)
    overlong_places: list[str] = field(default_factory=list)
    duplicate_places: list[list[str]] = field(default_factory=list)
    percentiles: dict[str, int] = field(default_factory=dict)
    histogram: list[list[int]] = field(default_factory=list)

    @property
    def median_tokens(self) -> int:
        """Length of the middle row."""
        return self.percentiles.get("50", 0)

    def count_repeats(self) -> int:
        """Counts the rows that a weight adds; rows that go on in further rows hide it."""
        return 0 if self.rows_split else max(0, self.rows_kept + self.rows_dropped - self.rows_used)

    def line(self) -> str:
        """Says it in one line."""
        share = 100 * self.trained_tokens / max(self.tokens, 1)
        counts = {"bad": self.rows_bad, "dropped": self.rows_dropped, "cut": self.rows_truncated}
        lost = "".join(f", {count} {name}" for name, count in counts.items() if count)
        return (
            f"{self.name}: {self.rows_kept} of {count_of(self.rows_read, 'row', 'rows')} ({self.format}{lost}), "
            f"{count_of(self.tokens, 'token', 'tokens')}, "
            f"{share:.0f} % trained, median {self.median_tokens}, longest {self.longest_tokens}"
        )


@dataclass
class DataReport:
    """What became of all rows.

    Attributes:
        splits: Training first.
        rows_in_both: Evaluation rows whose tokens equal those of a training row.
        in_both_places: Pairs of places (evaluation, training), the first of them.
        unused_columns: Columns that nothing read.
        has_plain_prompts: Prompts are text although the tokenizer has a chat template.
        system_prompt: What all conversations begin with, if they do.
        packed_sequences: Sequences with packing; 0 where it makes no sense.
        packed_ratio: Share of a packed sequence that holds tokens (0 to 1).
        steps_per_epoch: Optimizer steps as the run is set.
        steps_unpacked: Optimizer steps without packing.
        steps_packed: Optimizer steps with it; 0 where it makes no sense.
        fingerprint: Of rows, tokenizer, template and settings.
        from_cache: The tokens were there already.
        scanned_bytes: Size of the files.
        scan_seconds: Time of the first pass.
        tokenize_seconds: Time of the second.
    """

    splits: list[SplitReport]
    rows_in_both: int = 0
    in_both_places: list[list[str]] = field(default_factory=list)
    unused_columns: list[str] = field(default_factory=list)
    has_plain_prompts: bool = False
    system_prompt: str | None = None
    packed_sequences: int = 0
    packed_ratio: float = 0.0
    steps_per_epoch: int = 0
    steps_unpacked: int = 0
    steps_packed: int = 0
    fingerprint: str = ""
    from_cache: bool = False
    scanned_bytes: int = 0
    scan_seconds: float = 0.0
    tokenize_seconds: float = 0.0

    def as_dict(self) -> dict[str, object]:
        """Returns plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> DataReport:
        """Builds a report from what :meth:`as_dict` returned."""
        return cls(**{**values, "splits": [SplitReport(**one) for one in values["splits"]]})


class SplitCounter:
    """Counts outcomes of one split while they come in; what it holds does not grow with them.

    Args:
        report: The report to fill.
        describe: Writes where the row of a number stands.
        digests: Receives what the rows are; ``None`` is a file of the system's.
    """

    def __init__(self, report: SplitReport, describe: Callable[[int], str], digests: RowDigests | None = None) -> None:
        self.report = report
        self.describe = describe
        self.lengths: Counter[int] = Counter()  # of what is trained
        self.whole_lengths: Counter[int] = Counter()  # of all rows, before cutting
        self.digests = digests or RowDigests()

    def add(self, outcome: Outcome, copies: int) -> None:
        """Counts one row that is trained so many times an epoch."""
        report = self.report
        report.rows_used += 1
        self.whole_lengths[outcome.length] += 1
        report.longest_tokens = max(report.longest_tokens, outcome.length)
        report.rows_escaped += outcome.escaped > 0
        report.rows_parted += outcome.is_parted
        report.rows_prompt_found += outcome.is_prompt_found
        report.rows_lost += outcome.is_lost
        if outcome.status != "kept" and len(report.overlong_places) < LISTED_PLACES:
            report.overlong_places.append(self.describe(outcome.number))
        if outcome.status == "dropped":
            report.rows_dropped += 1
            return
        report.rows_truncated += outcome.status == "cut"
        report.rows_split += outcome.status == "split"
        report.rows_untrained += outcome.trained == 0
        report.rows_without_end += outcome.status != "cut" and not outcome.has_end
        report.trained_tokens += outcome.trained * copies
        for columns in outcome.columns:
            report.rows_kept += copies
            report.rows_wanted += copies * (columns.get("label") is True)
            report.tokens += _count_all(columns) * copies
            self.lengths[count_tokens(columns)] += copies
        self.digests.add(outcome.number, outcome.columns)

    def finish(self) -> None:
        """Computes what needs all rows: percentiles, histogram, repeats."""
        self.report.percentiles = _find_percentiles(self.lengths)
        self.report.histogram = _count_bars(self.whole_lengths, self.report.max_length)
        self.report.rows_duplicate, pairs = find_repeats(self.digests, _SHOWN_PAIRS)
        self.report.duplicate_places = [[self.describe(row) for row in pair] for pair in pairs]


def _find_percentiles(lengths: Counter[int]) -> dict[str, int]:
    """Finds the smallest length that so many per cent of the rows do not exceed."""
    found, below, total = {}, 0, lengths.total()
    wanted = list(PERCENTILES)
    for length in sorted(lengths):
        below += lengths[length]
        while wanted and 100 * below >= wanted[0] * total:
            found[str(wanted.pop(0))] = length
    return found


def _count_bars(lengths: Counter[int], max_length: int) -> list[list[int]]:
    """Counts the rows in ranges of one width, of which one ends at ``max_length``."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    edges = {low + (high - low) * i // _BARS for i in range(1, _BARS + 1)}
    if low <= max_length < high:
        edges.add(max_length)
    bars = dict.fromkeys(sorted(edges), 0)
    ends = list(bars)
    for length, count in lengths.items():
        bars[ends[bisect_left(ends, length)]] += count
    return [[end, count] for end, count in bars.items()]


def _count_all(columns: Columns) -> int:
    """Counts the tokens that a model reads of a row: of a pair, the prompt twice."""
    sizes = {name: len(value) for name, value in columns.items() if name.endswith("_ids")}
    return sum(sizes.values()) + sizes.get("prompt_ids", 0) * (len(sizes) - 2 if "prompt_ids" in sizes else 0)


def count_tokens(columns: dict[str, object]) -> int:
    """Counts the tokens of a row as they stand in a batch: of a pair, the prompt and the longer answer."""
    sizes = {name: len(value) for name, value in columns.items() if name.endswith("_ids")}
    prompt = sizes.pop("prompt_ids", 0)
    return prompt + max(sizes.values())


def describe_both(train: SplitCounter, held_back: SplitCounter) -> tuple[int, list[list[str]]]:
    """Counts evaluation rows that are trained on as well, and names the first of them."""
    count, pairs = find_in_both(held_back.digests, train.digests, _SHOWN_PAIRS)
    return count, [[held_back.describe(row), train.describe(other)] for row, other in pairs]
