"""Rows become tokenised data sets with labels, and a report of what happened to every row."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from datasets import Dataset

from forge_cli.build.rows import Rows, find_format, read_rows
from forge_cli.errors import DataError, Problem
from forge_cli.parts.rendering import (
    IGNORED,
    RowError,
    Tokens,
    render_completion,
    render_messages,
    render_prompt,
    render_text,
)
from forge_cli.schema.data import DataSection
from forge_cli.schema.runspec import RunSpec

LISTED_ROWS = 20


@dataclass
class SplitReport:
    """What became of the rows of one split; tokens are counted after cutting."""

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
        prompt: Rendered text up to where the model is to answer.
        shown: The last thing the user said, for people.
        wanted: The reference answer.
    """

    prompt: str
    shown: str
    wanted: str


@dataclass(frozen=True)
class PreparedData:
    """Data that a trainer can take as it is.

    Attributes:
        train: Columns ``input_ids``, ``labels``, ``rows`` (the number of the source row, once per token).
        eval: Columns ``input_ids``, ``labels``; ``None`` without an evaluation split.
        questions: Evaluation rows as prompts and wanted answers.
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
    train_set, train_report = _tokenize_split("train", train, spec.data, tokenizer, with_rows=True)
    reports, eval_set, questions = [train_report], None, ()
    if held_back is not None:
        eval_set, eval_report = _tokenize_split("eval", held_back, spec.data, tokenizer, with_rows=False)
        questions = tuple(_build_questions(held_back, eval_report.format, tokenizer))
        reports.append(eval_report)
    return PreparedData(train_set, eval_set, questions, tuple(reports))


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


def _tokenize_split(
    split: str, rows: Rows, data: DataSection, tokenizer, *, with_rows: bool
) -> tuple[Dataset, SplitReport]:
    kind = find_format(rows, data.format)
    report = SplitReport(split, kind, len(rows.rows))
    problems: list[Problem] = []
    columns: dict[str, list] = {"input_ids": [], "labels": []} | ({"rows": []} if with_rows else {})
    for row, place in zip(rows.rows, rows.places, strict=True):
        try:
            tokens = _fit(_render_row(row, kind, tokenizer, data.train_on), place, data, report)
        except RowError as error:
            problems.append(Problem(f"{rows.name} {place}", "", str(error)))
            continue
        if tokens is None:
            continue
        columns["input_ids"].append(tokens.input_ids)
        columns["labels"].append(tokens.labels)
        if with_rows:
            # "line 12" or "row 12": the number a person can look up.
            columns["rows"].append([int(place.split()[-1])] * len(tokens.input_ids))
        report.trained_tokens += tokens.num_trained
    _refuse(problems, report, rows, data)
    lengths = sorted(len(ids) for ids in columns["input_ids"])
    if not lengths:
        raise DataError(f"no row is left for {split}", where=rows.name, why=report.line())
    report.rows_kept, report.tokens = len(lengths), sum(lengths)
    report.longest_tokens, report.median_tokens = lengths[-1], lengths[len(lengths) // 2]
    return Dataset.from_dict(columns), report


def _refuse(problems: list[Problem], report: SplitReport, rows: Rows, data: DataSection) -> None:
    """Raises when rows are bad, or too long with ``on_overlong: error``."""
    if problems:
        more = len(problems) - LISTED_ROWS
        listed = problems[:LISTED_ROWS]
        if more > 0:
            listed.append(Problem(rows.name, "", f"and {more} more rows"))
        raise DataError.from_problems(listed)
    if report.overlong_places and data.on_overlong == "error":
        shown = ", ".join(report.overlong_places[:5])
        raise DataError(
            f"{len(report.overlong_places)} of {len(rows.rows)} rows are longer than data.max_length "
            f"{data.max_length}; the longest has {report.longest_tokens} tokens ({shown})",
            where=rows.name,
            why="cutting or dropping them unasked would change what is learned",
            fix=f"raise data.max_length to {report.longest_tokens}, or set data.on_overlong: drop or truncate",
        )


def _fit(tokens: Tokens, place: str, data: DataSection, report: SplitReport) -> Tokens | None:
    """Applies ``data.max_length``; ``None`` drops the row. A cut row gets no end token it did not have."""
    if not tokens.num_trained:
        raise RowError("no token of this row is trained")
    length = len(tokens.input_ids)
    if length <= data.max_length:
        return tokens
    report.overlong_places.append(place)
    report.longest_tokens = max(report.longest_tokens, length)
    if data.on_overlong == "truncate":
        cut = Tokens(tokens.input_ids[: data.max_length], tokens.labels[: data.max_length])
        if any(label != IGNORED for label in cut.labels):
            report.rows_truncated += 1
            return cut
    report.rows_dropped += 1
    return None


def _render_row(row: Mapping[str, object], kind: str, tokenizer, train_on: str) -> Tokens:
    """Renders one row of any format."""
    if kind == "text":
        return render_text(tokenizer, row["text"])
    prompt, completion = _as_messages(row, kind, tokenizer)
    if isinstance(prompt, str):
        return render_completion(tokenizer, prompt, completion, train_on=train_on)
    start = len(prompt) if kind != "messages" else 0
    return render_messages(tokenizer, [*prompt, *completion], train_on=train_on, trained_from=start)


def _as_messages(row: Mapping[str, object], kind: str, tokenizer) -> tuple[list | str, list | str]:
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
    if tokenizer.chat_template:
        return [{"role": "user", "content": question}], [{"role": "assistant", "content": output}]
    return question + "\n\n", output


def _build_questions(rows: Rows, kind: str, tokenizer) -> Sequence[Question]:
    """Turns rows into prompts with a wanted answer: the last assistant turn, or the completion."""
    questions = []
    for row in rows.rows if kind != "text" else ():
        prompt, completion = _as_messages(row, kind, tokenizer)
        if isinstance(prompt, str):
            questions.append(Question(prompt, prompt.strip(), completion.strip()))
            continue
        turns = [*prompt, *completion]
        last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
        if last:
            text = render_prompt(tokenizer, turns[:last])
            questions.append(Question(text, turns[last - 1]["content"], turns[last]["content"].strip()))
    return questions
