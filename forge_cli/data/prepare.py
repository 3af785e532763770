"""From the sources of a run file to token ids on disk, and the report of what became of every row."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from forge_cli.data.choosing import HELD_BACK, choose_rows
from forge_cli.data.judging import judge_split
from forge_cli.data.outcomes import Limits, Question
from forge_cli.data.packing import count_sequences, count_steps
from forge_cli.data.reading import DataFile, find_files, fingerprint_file
from forge_cli.data.report import DataReport, SplitCounter, SplitReport, describe_both
from forge_cli.data.scan import Place, Scan, explain_change, find_place, read_again, scan_rows
from forge_cli.data.store import TokenFolder, find_tokens, iterate_questions
from forge_cli.data.tokenizing import tokenize_rows
from forge_cli.parts.rendering import Renderer
from forge_cli.schema.data import list_sources
from forge_cli.schema.runspec import RunSpec

# Raise it when rows become other tokens than before.
VERSION = 3
_SAY_EVERY_SECONDS = 5.0
_SHOWN_FAULTS = 3
Say = Callable[[str], None]


@dataclass(frozen=True)
class TokenSet:
    """Token ids on disk.

    Attributes:
        folder: ``train.arrow`` and ``eval.arrow``: ``input_ids`` and ``labels``, or ``prompt_ids`` and the ids of
            the answers; ``row`` and ``length``.
        report: What became of every row.
        places: Of each split, its source files, and the number before the first row of each.
        identity: What decides which tokens come out, by name; the folder is called by its fingerprint.
    """

    folder: Path
    report: DataReport
    places: Mapping[str, Sequence[Place]]
    identity: Mapping[str, str]

    @property
    def questions(self) -> tuple[Question, ...]:
        """Evaluation rows as prompts and wanted answers."""
        return self.load_questions()

    def load_questions(self, most: int | None = None) -> tuple[Question, ...]:
        """Loads the first questions, or all of them."""
        return tuple(islice(iterate_questions(self.folder), most))

    def name_row(self, split: str, row: int) -> str:
        """Writes where a row stands, given the number that its tokens carry."""
        return find_place(self.places[split], row)


def prepare_tokens(spec: RunSpec, tokenizer, say: Say = lambda text: None) -> TokenSet:
    """Reads, judges and tokenises all rows of a run, or finds the tokens that an earlier run left.

    Args:
        spec: The run file.
        tokenizer: Of the model.
        say: Receives progress.

    Raises:
        DataError: Rows cannot be used or are lost; says which and why.
        MachineError: The disk is full.
    """
    began = time.perf_counter()
    identity = identify_data(spec, tokenizer)
    fingerprint = fingerprint_data(identity)
    folder, manifest, why = find_tokens(fingerprint)
    if why:
        say(f"tokens of an earlier run are made again: {why}")
    if folder is None:
        size = sum(file.path.stat().st_size for _, file, _ in _list_files(spec) if file.path)
        with TokenFolder(fingerprint, size) as target:
            report, places = _make_tokens(spec, tokenizer, target, say, began)
            _check_unchanged(spec, identity)
            folder = target.commit({**report.as_dict(), "places": places})
    else:
        report = DataReport.from_dict({k: v for k, v in manifest["report"].items() if k != "places"})
        report.from_cache = True
        places = manifest["report"]["places"]
    _count_steps(spec, report)
    located = {
        split: tuple(Place(base, DataFile(name, path and Path(path), kind)) for base, (name, path, kind) in files)
        for split, files in places.items()
    }
    return TokenSet(folder, report, located, identity)


def _list_files(spec: RunSpec) -> list[tuple[str, DataFile, str]]:
    sides = {"data.train": spec.data.train, "data.eval": spec.data.eval}
    return [
        (setting, file, source.split)
        for setting, value in sides.items()
        for source in list_sources(value)
        for file in find_files(source.path)
    ]


def _digest_files(spec: RunSpec) -> dict[str, str]:
    """Returns the digest of every source file, by the setting that names it and its name."""
    digests: dict[str, str] = {}
    for setting, file, split in _list_files(spec):
        key = f"{setting} {file.name}" + (f" {split}" if file.path is None else "")
        if key not in digests:
            digests[key] = fingerprint_file(file, split)
    return digests


def identify_data(spec: RunSpec, tokenizer) -> dict[str, str]:
    """Names all that decides which tokens come out, each with its version or digest, so that a change can be named."""
    import tokenizers
    import transformers

    data = spec.data.model_dump(mode="json", exclude={"train", "eval", "packing", "padding_free", "streaming"})
    sources = [
        [one.model_dump(mode="json") for one in list_sources(value)] for value in (spec.data.train, spec.data.eval)
    ]
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    return _digest_files(spec) | {
        "settings": _digest([sources, data, spec.seed, spec.method]),
        "tokenizer": _digest([tokenizer.backend_tokenizer.to_str(), special]),
        "chat template": _digest(tokenizer.chat_template),
        "rules": str(VERSION),
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def fingerprint_data(identity: Mapping[str, str]) -> str:
    """Returns the one digest of what :func:`identify_data` names."""
    return _digest([*identity.items()])


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=20).hexdigest()


def _check_unchanged(spec: RunSpec, identity: Mapping[str, str]) -> None:
    """Refuses tokens of a file that somebody wrote to meanwhile, or that was not there before."""
    for key, digest in _digest_files(spec).items():
        if identity.get(key) != digest:
            raise explain_change(key.partition(" ")[2])


def _make_tokens(
    spec: RunSpec, tokenizer, target: TokenFolder, say: Say, began: float
) -> tuple[DataReport, dict[str, list]]:
    scans = [scan_rows("train", list_sources(spec.data.train), spec.data, spec.method)]
    if spec.data.eval is not None:
        scans.append(scan_rows("eval", list_sources(spec.data.eval), spec.data, spec.method))
    scan_seconds = time.perf_counter() - began
    if scan_seconds > _SAY_EVERY_SECONDS:
        say(f"read {scans[0].num_rows} rows ({scans[0].kind}) in {scan_seconds:.0f} s")
    renderer = Renderer(tokenizer)
    counters: dict[str, SplitCounter] = {}
    choices = [choose_rows(scan, spec.data, spec.seed) for scan in scans]
    target.num_rows = sum(count > 0 for copies in choices for count in copies)
    for scan, copies in zip(scans, choices, strict=True):
        _tokenize_scan(spec, scan, copies, renderer, target, counters, say)
    for counter in counters.values():
        counter.finish()
    for scan in scans:
        scan.bad.settle(scan.num_rows)
    for counter in counters.values():
        judge_split(counter.report, spec.data, tokenizer, target)
    unused = sorted({column for scan in scans for column in scan.unused})
    report = DataReport([one.report for one in counters.values()], unused_columns=unused)
    report.fingerprint = target.fingerprint
    report.scanned_bytes, report.scan_seconds = target.input_bytes, round(scan_seconds, 3)
    report.tokenize_seconds = round(time.perf_counter() - began - scan_seconds, 3)
    if "eval" in counters:
        report.rows_in_both, report.in_both_places = describe_both(counters["train"], counters["eval"])
    if spec.method == "sft":
        _count_sequences(report, counters["train"], spec.data.max_length)
    report.system_prompt = scans[0].system_prompt
    report.has_plain_prompts = scans[0].has_plain_prompts and bool(tokenizer.chat_template)
    places = {
        name: [(base, (file.name, file.path and str(file.path), file.kind)) for base, file in scan.places]
        for name in counters
        for scan in (scans[-1] if name == "eval" else scans[0],)
    }
    return report, places


def _tokenize_scan(
    spec: RunSpec,
    scan: Scan,
    copies,
    renderer: Renderer,
    target: TokenFolder,
    counters: dict[str, SplitCounter],
    say: Say,
) -> None:
    """Tokenises the rows of one scan and sorts them into their splits."""
    data = spec.data
    limits = Limits(scan.kind, data.train_on, data.max_length, data.on_overlong)
    shares: dict[int, int] = {}  # of the rows under way, by number
    total = sum(scan.counts)
    splits = [scan.name] + (["eval"] if HELD_BACK in copies else [])
    for name in splits:
        report = SplitReport(name, scan.kind, scan.num_rows, data.max_length)
        counters[name] = SplitCounter(report, scan.describe, target.open_digests())
    counters[scan.name].report.rows_bad = scan.bad.count
    writers = {name: target.open_split(name) for name in splits}

    def choose() -> Iterator[tuple[int, dict, bool]]:
        for place, (_, number, values) in enumerate(read_again(scan)):
            if count := copies[place]:
                shares[number] = count
                yield number, values, count == HELD_BACK or scan.name == "eval"

    said = time.perf_counter()
    done = 0
    # Closed at once on failure: it holds processes and signals.
    with contextlib.closing(tokenize_rows(choose(), renderer, limits, total)) as outcomes:
        for outcome in outcomes:
            count = shares.pop(outcome.number)
            done += 1
            if time.perf_counter() - said > _SAY_EVERY_SECONDS:
                said = time.perf_counter()
                say(f"tokenised {done} of {total} rows ({100 * done / total:.0f} %)")
            name, count = ("eval", 1) if count == HELD_BACK else (scan.name, count)
            if outcome.status == "bad":
                scan.refuse(outcome.number, outcome.what)
                counters[name].report.rows_bad += 1
                continue
            counters[name].add(outcome, count)
            for columns in outcome.columns:
                writers[name].add(columns, outcome.number, count)
            target.rows_done += 1
            if outcome.question:
                target.add_question(outcome.question)
    shown = scan.bad.list_problems()[:_SHOWN_FAULTS]
    counters[scan.name].report.bad_places = [f"{one.where}: {one.what}" for one in shown]
    _count_rows(scan, copies, counters, splits)


def _count_rows(scan: Scan, copies, counters: dict[str, SplitCounter], splits: list[str]) -> None:
    """Accounts for the rows that were not tokenised: they are left out on purpose."""
    held = copies.count(HELD_BACK)
    left_out = copies.count(0)
    report = counters[scan.name].report
    report.rows_unused = left_out + held
    if len(splits) > 1:
        counters["eval"].report.rows_read = held


def _count_sequences(report: DataReport, train: SplitCounter, max_length: int) -> None:
    """Counts the sequences that packing would make."""
    counts = [train.lengths[length] for length in range(max(train.lengths, default=0) + 1)]
    report.packed_sequences = count_sequences(counts, max_length)
    report.packed_ratio = report.splits[0].tokens / (report.packed_sequences * max_length)


def _count_steps(spec: RunSpec, report: DataReport) -> None:
    """Counts the steps of an epoch, with and without packing."""
    training = spec.training
    batch = training.per_device_train_batch_size, training.gradient_accumulation_steps
    report.steps_unpacked = report.steps_per_epoch = count_steps(report.splits[0].rows_kept, *batch)
    if report.packed_sequences:
        report.steps_packed = count_steps(report.packed_sequences, *batch)
        if spec.data.packing:
            report.steps_per_epoch = report.steps_packed
