"""Token ids on disk become data sets that a trainer takes as they are."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from datasets import Dataset, IterableDataset

from forge_cli.data.judging import refuse_losses
from forge_cli.data.outcomes import Limits, Question
from forge_cli.data.packing import pack_lengths
from forge_cli.data.prepare import Say, TokenSet, fingerprint_data, identify_data, prepare_tokens
from forge_cli.data.report import DataReport, SplitCounter, SplitReport
from forge_cli.data.row_tokens import RowTokenizer
from forge_cli.data.scan import Place, Scan, find_place, read_again, scan_rows
from forge_cli.data.stream_order import BUFFER_BYTES, BUFFER_ROWS, mix_rows
from forge_cli.errors import DataError
from forge_cli.parts.labels import IGNORED
from forge_cli.parts.rendering import Renderer
from forge_cli.schema.data import list_sources
from forge_cli.schema.runspec import RunSpec
from forge_cli.units import format_bytes

__all__ = ["PreparedData", "Question", "prepare_data"]


@dataclass(frozen=True)
class PreparedData:
    """Data that a trainer can take as it is.

    Attributes:
        train: ``input_ids`` and ``labels``, or ``prompt_ids`` and the ids of answers; ``row`` (the number of the source
            row) and ``length``. Packed: ``rows`` and ``seq_lengths`` instead.
        eval: The same; ``None`` without evaluation rows.
        questions: Evaluation rows that are evaluated uncut, as prompts and wanted answers.
        report: What became of every row.
        places: Source files of the training rows, and the number before the first row of each.
        identity: What decides which tokens come out, each with its digest: source files by their setting and name
            (``data.train train.jsonl``), settings, tokenizer, template and versions.
    """

    train: Dataset | IterableDataset
    eval: Dataset | None
    questions: tuple[Question, ...]
    report: DataReport
    places: Sequence[Place] = ()
    identity: Mapping[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """One digest of ``identity``; a run goes on with the same rows if it is the same."""
        return fingerprint_data(self.identity)

    @property
    def reports(self) -> tuple[SplitReport, ...]:
        """One report per split, training first."""
        return tuple(self.report.splits)

    def name_rows(self, rows: Sequence[int]) -> list[str]:
        """Writes where rows stand, given the numbers that the data set carries."""
        return [find_place(self.places, row) for row in rows]


def prepare_data(spec: RunSpec, tokenizer, say: Say = lambda text: None) -> PreparedData:
    """Reads, splits, renders and tokenises the rows of a plan; needs no model.

    Raises:
        DataError: Rows cannot be used; carries the first 20 of them.
    """
    if spec.data.streaming:
        return _stream_data(spec, tokenizer, say)
    tokens = prepare_tokens(spec, tokenizer, say)
    train, held_back = (_load(tokens, name) for name in ("train", "eval"))
    if spec.data.packing:
        train = pack_data(train, spec.data.max_length)
    most = spec.report.samples if spec.report and not spec.report.exact_match else None
    places, questions = tokens.places["train"], tokens.load_questions(most)
    return PreparedData(train, held_back, questions, tokens.report, places, tokens.identity)


def _load(tokens: TokenSet, name: str) -> Dataset | None:
    path = tokens.folder / f"{name}.arrow"
    return Dataset.from_file(str(path)) if path.exists() else None


def pack_data(dataset: Dataset, max_length: int) -> Dataset:
    """Packs rows best-fit into sequences of at most ``max_length`` tokens; no token is lost.

    Every row has to fit (``data.on_overlong`` saw to it). ``seq_lengths`` keeps the borders; the first token of a row
    is not trained, as it would be predicted from another row.
    """
    sequences = pack_lengths(dataset["length"][:], max_length)

    def join(batch: dict[str, list]) -> dict[str, list]:
        joined: dict[str, list] = {"input_ids": [], "labels": [], "rows": [], "seq_lengths": []}
        for members in batch["members"]:
            rows = dataset[members]
            joined["input_ids"].append([one for ids in rows["input_ids"] for one in ids])
            joined["labels"].append([one for labels in rows["labels"] for one in (IGNORED, *labels[1:])])
            joined["rows"].append(rows["row"])
            joined["seq_lengths"].append([len(ids) for ids in rows["input_ids"]])
        return joined

    return Dataset.from_dict({"members": sequences}).with_transform(join)


def _stream_data(spec: RunSpec, tokenizer, say: Say) -> PreparedData:
    """Tokenises training rows as they are trained; evaluation rows, which are seen often, before."""
    data = spec.data
    identity = identify_data(spec, tokenizer)
    scan = scan_rows("train", list_sources(data.train), data, spec.method)
    say(
        f"streaming {sum(scan.counts)} rows ({scan.kind}), mixed within a buffer of {BUFFER_ROWS} rows or "
        f"{format_bytes(BUFFER_BYTES)}: their tokens are made while training"
    )
    report = DataReport([SplitReport("train", scan.kind, scan.num_rows, data.max_length, scan.bad.count)])
    held_back, questions = None, ()
    if data.eval is not None:
        alone = data.model_copy(update={"train": data.eval, "eval": None, "streaming": False})
        tokens = prepare_tokens(spec.model_copy(update={"data": alone}), tokenizer, say)
        held_back = _load(tokens, "train")
        tokens.report.splits[0].name = "eval"
        report.splits.append(tokens.report.splits[0])
    limits = Limits(scan.kind, data.train_on, data.max_length, data.on_overlong)
    rows = {
        "scan": scan,
        "report": report.splits[0],
        "make": lambda: RowTokenizer(Renderer(tokenizer), limits),
        "max_lost_ratio": data.max_lost_ratio,
        "seed": spec.seed,
    }
    stream = IterableDataset.from_generator(_generate_rows, gen_kwargs=rows)
    return PreparedData(stream, held_back, questions, report, scan.places, identity)


def _generate_rows(
    scan: Scan, report: SplitReport, make: Callable[[], RowTokenizer], max_lost_ratio: float, seed: int
) -> Iterator[dict[str, object]]:
    """Yields rows, epoch after epoch, and counts what becomes of them; what would end a run before, ends it here."""
    tokenizer = make()
    limits = tokenizer.limits
    # A trainer starts a stream more than once: to look at its columns, and to train.
    known = report.name, report.format, report.rows_read, report.max_length
    vars(report).update(vars(SplitReport(*known, rows_bad=len(scan.skipped))))
    counter = SplitCounter(report, scan.describe)
    for epoch in itertools.count():
        # Text seeds are hashed the same way in every process.
        for _, number, values in mix_rows(read_again(scan), random.Random(f"{seed}:{epoch}")):
            (outcome,) = tokenizer.tokenize([(number, values, False)])
            if outcome.status == "bad":
                scan.refuse(number, outcome.what)
                scan.bad.settle(scan.num_rows)
                report.rows_bad += 1
            elif outcome.status == "dropped" and limits.on_overlong not in ("drop", "truncate"):
                raise DataError(
                    f"the row has {outcome.length} tokens, more than data.max_length {limits.max_length}",
                    where=scan.describe(number),
                    fix="raise data.max_length, or set data.on_overlong: drop or truncate",
                )
            elif not epoch:
                counter.add(outcome, 1)
            for columns in outcome.columns:
                named = {name: list(one) if name.endswith("s") else one for name, one in columns.items()}
                yield {**named, "row": number}
        if not epoch:
            counter.finish()
            refuse_losses(report, limits.max_length, max_lost_ratio)
        if not report.rows_kept:
            raise DataError(
                f"no row is left to train on: none fits into data.max_length {limits.max_length}",
                where=", ".join(source.path for source in scan.sources),
                fix="raise data.max_length",
            )
