"""Rows become tokenised data sets with labels, and a report of what happened to every row."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

from datasets import Dataset

from forge_cli.build.rows import LISTED_ROWS, Rows, find_format, read_rows, refuse_rows
from forge_cli.errors import DataError, Problem
from forge_cli.parts.rendering import Message, RenderedRow, Renderer, RowError, Tokens
from forge_cli.schema.data import DataSection
from forge_cli.schema.runspec import RunSpec

BATCH_ROWS = 1000  # tokenised at once


@dataclass
class SplitReport:
    """What became of the rows of one split; tokens are counted after cutting, the first overlong rows are named."""

    name: str
    format: str
    rows_read: int
    rows_kept: int = 0
    rows_dropped: int = 0
    rows_truncated: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest_tokens: int = 0
    median_tokens: int = 0
    overlong_places: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Says it in one line."""
        share = 100 * self.trained_tokens / max(self.tokens, 1)
        lost = [f"{self.rows_dropped} dropped"] if self.rows_dropped else []
        lost += [f"{self.rows_truncated} cut"] if self.rows_truncated else []
        return (
            f"{self.name}: {self.rows_kept} of {self.rows_read} rows ({self.format}"
            f"{', ' + ', '.join(lost) if lost else ''}), {self.tokens} tokens, {share:.0f} % trained, "
            f"median {self.median_tokens}, longest {self.longest_tokens}"
        )


@dataclass(frozen=True)
class Question:
    """A prompt and the answer that is wanted, for generation.

    Attributes:
        prompt: Token ids ``[T]`` up to where the model is to answer.
        shown: The last thing the user said, for people.
        wanted: The reference answer.
    """

    prompt: list[int]
    shown: str
    wanted: str


@dataclass(frozen=True)
class PreparedData:
    """Data that a trainer can take as it is.

    Attributes:
        train: Columns ``input_ids``, ``labels``, ``rows`` (the number of the source row, once per token).
        eval: Columns ``input_ids``, ``labels``; ``None`` without an evaluation split.
        questions: Evaluation rows that are evaluated uncut, as prompts and wanted answers.
        reports: One report per split, training first.
    """

    train: Dataset
    eval: Dataset | None
    questions: tuple[Question, ...]
    reports: tuple[SplitReport, ...]

    def as_dict(self) -> list[dict]:
        """Returns the reports as plain data."""
        return [asdict(report) for report in self.reports]


def prepare_data(spec: RunSpec, tokenizer) -> PreparedData:
    """Reads, splits, renders and tokenises the rows of a plan; needs no model.

    Raises:
        DataError: A row cannot be used; carries the first 20 of them.
    """
    train = read_rows(spec.data.train, spec.data.train_split)
    held_back = _read_eval(spec.data)
    if spec.data.eval_fraction:
        train, held_back = _split(train, spec.data.eval_fraction, spec.seed)
    renderer = Renderer(tokenizer)
    train_set, train_report, _ = _prepare_split("train", train, spec.data, renderer)
    if held_back is None:
        return PreparedData(train_set, None, (), (train_report,))
    eval_set, eval_report, questions = _prepare_split("eval", held_back, spec.data, renderer)
    return PreparedData(train_set, eval_set, tuple(questions), (train_report, eval_report))


def _read_eval(data: DataSection) -> Rows | None:
    if data.eval:
        return read_rows(data.eval, data.eval_split or "train")
    return read_rows(data.train, data.eval_split) if data.eval_split else None


def _split(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Holds a share of the rows back, by a seeded draw; both parts keep their order."""
    count = max(1, round(len(rows.rows) * fraction))
    if count >= len(rows.rows):
        raise DataError(
            f"data.eval_fraction {fraction} of {len(rows.rows)} rows leaves nothing to train on", where=rows.name
        )
    held = set(random.Random(seed).sample(range(len(rows.rows)), count))

    def part(keep: bool) -> Rows:
        chosen = [i for i in range(len(rows.rows)) if (i in held) == keep]
        return Rows(rows.name, [rows.rows[i] for i in chosen], [rows.places[i] for i in chosen])

    return part(False), part(True)


def _prepare_split(
    split: str, rows: Rows, data: DataSection, renderer: Renderer
) -> tuple[Dataset, SplitReport, list[Question]]:
    """Prepares one split: training rows carry their numbers, evaluation rows become questions as well."""
    kind = find_format(rows, data.format)
    report = SplitReport(split, kind, len(rows.rows))
    problems: list[Problem] = []
    questions: list[Question] = []
    columns: dict[str, list] = {"input_ids": [], "labels": []} | ({"rows": []} if split == "train" else {})
    for row, place, result in _tokenize_rows(rows, kind, renderer, data.train_on):
        if isinstance(result, RowError):
            problems.append(Problem(f"{rows.name} {place}", "", str(result)))
            continue
        tokens = _fit(result, place, data, report)
        if tokens is None:
            continue
        columns["input_ids"].append(tokens.input_ids)
        columns["labels"].append(tokens.labels)
        report.trained_tokens += tokens.num_trained
        if split == "train":
            # "line 12" or "row 12": the number a person can look up.
            columns["rows"].append([int(place.split()[-1])] * len(tokens.input_ids))
        elif tokens is result and (question := _build_question(row, kind, renderer)):
            questions.append(question)
    if problems:
        refuse_rows(rows.name, problems)
    _refuse_overlong(report, rows, data)
    lengths = sorted(len(ids) for ids in columns["input_ids"])
    if not lengths:
        raise DataError(
            f"no row is left for {split}: no answer fits into data.max_length {data.max_length}",
            where=rows.name,
            why=f"all {len(rows.rows)} rows are longer; the longest has {report.longest_tokens} tokens",
            fix=f"raise data.max_length, to {report.longest_tokens} to keep all",
        )
    report.rows_kept, report.tokens = len(lengths), sum(lengths)
    report.longest_tokens, report.median_tokens = lengths[-1], lengths[len(lengths) // 2]
    return Dataset.from_dict(columns), report, questions


def _tokenize_rows(
    rows: Rows, kind: str, renderer: Renderer, train_on: str
) -> Iterator[tuple[Mapping[str, object], str, Tokens | RowError]]:
    """Yields every row, its place, and its tokens or what is wrong with it."""
    for start in range(0, len(rows.rows), BATCH_ROWS):
        batch = rows.rows[start : start + BATCH_ROWS]
        results: list[RenderedRow | RowError] = []
        for row in batch:
            try:
                results.append(_render_row(row, kind, renderer, train_on))
            except RowError as error:
                results.append(error)
        tokenized = renderer.tokenize([result for result in results if isinstance(result, RenderedRow)])
        for row, place, result in zip(batch, rows.places[start:], results, strict=False):
            yield row, place, result if isinstance(result, RowError) else next(tokenized)


def _refuse_overlong(report: SplitReport, rows: Rows, data: DataSection) -> None:
    """Raises when rows are too long with ``on_overlong: error``."""
    if report.overlong_places and data.on_overlong == "error":
        more = ", ..." if report.rows_dropped > 5 else ""
        raise DataError(
            f"{report.rows_dropped} of {len(rows.rows)} rows are longer than data.max_length {data.max_length}; "
            f"the longest has {report.longest_tokens} tokens ({', '.join(report.overlong_places[:5])}{more})",
            where=rows.name,
            why="cutting or dropping them unasked would change what is learned",
            fix=f"raise data.max_length to {report.longest_tokens}, or set data.on_overlong: drop or truncate",
        )


def _fit(tokens: Tokens, place: str, data: DataSection, report: SplitReport) -> Tokens | None:
    """Applies ``data.max_length``; ``None`` drops the row. A cut row gets no end token it did not have."""
    length = len(tokens.input_ids)
    if length <= data.max_length:
        return tokens
    if len(report.overlong_places) < LISTED_ROWS:
        report.overlong_places.append(place)
    report.longest_tokens = max(report.longest_tokens, length)
    if data.on_overlong == "truncate":
        cut = Tokens(tokens.input_ids[: data.max_length], tokens.labels[: data.max_length])
        if cut.num_trained:
            report.rows_truncated += 1
            return cut
    report.rows_dropped += 1
    return None


def _render_row(row: Mapping[str, object], kind: str, renderer: Renderer, train_on: str) -> RenderedRow:
    """Renders one row of any format."""
    if kind == "text":
        return renderer.render_text(row["text"])
    prompt, completion = _as_messages(row, kind, renderer)
    if isinstance(prompt, str):
        return renderer.render_completion(prompt, completion, train_on=train_on)
    return renderer.render_messages([*prompt, *completion], train_on=train_on, trained_from=len(prompt))


def _as_messages(row: Mapping[str, object], kind: str, renderer: Renderer) -> tuple[list | str, list | str]:
    """Returns (prompt, completion) as lists of messages, or as text where the row is plain text."""
    if kind == "messages":
        if not isinstance(row["messages"], list):
            raise RowError("messages is not a list of turns")
        return [], row["messages"]
    if kind == "prompt_completion":
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return prompt, completion
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise RowError("prompt and completion must both be text or both be lists of turns")
        return prompt, completion
    instruction, extra, output = row["instruction"], row.get("input") or "", row["output"]
    if not all(isinstance(text, str) for text in (instruction, extra, output)):
        raise RowError("instruction, input and output must be text")
    question = f"{instruction}\n\n{extra}" if extra else instruction
    if renderer.tokenizer.chat_template:
        return [{"role": "user", "content": question}], [{"role": "assistant", "content": output}]
    return question + "\n\n", output


def _build_question(row: Mapping[str, object], kind: str, renderer: Renderer) -> Question | None:
    """Turns a row into a prompt with a wanted answer: the completion, or the last assistant turn."""
    if kind == "text":
        return None
    prompt, completion = _as_messages(row, kind, renderer)
    if isinstance(prompt, str):
        return Question(renderer.encode_prompt(prompt), prompt.strip(), completion.strip())
    turns: list[Message] = [*prompt, *completion]
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    if not last:
        return None
    return Question(renderer.encode_prompt(turns[:last]), turns[last - 1]["content"], turns[last]["content"].strip())
