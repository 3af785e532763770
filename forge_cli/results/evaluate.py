"""Measures a run's model on rows: loss per token, perplexity, exact match, and tasks of lm-eval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy

from forge_cli.build.data import Question
from forge_cli.data.scan import find_method
from forge_cli.errors import DataError
from forge_cli.parts.labels import IGNORED
from forge_cli.results.ask import Asker
from forge_cli.results.find import Run, check_eval_rows
from forge_cli.results.rows import prepare_rows
from forge_cli.run.answers import generate_answers
from forge_cli.schema.runspec import RunSpec
from forge_cli.units import GIB

_MOST_ROWS = 32
Say = Callable[[str], None]


class Row(NamedTuple):
    """Token ids ``[T]``, and labels ``[T]`` with ``IGNORED`` where nothing counts."""

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class EvaluationRows:
    """What a model is measured on.

    Attributes:
        name: Where the rows come from, in words.
        rows: Longest first.
        questions: For an exact match.
        max_new_tokens: Longest answer to them.
    """

    name: str
    rows: list[Row]
    questions: tuple[Question, ...]
    max_new_tokens: int

    @property
    def num_tokens(self) -> int:
        """Tokens that count: those that something stands before."""
        return sum(label != IGNORED for row in self.rows for label in row.labels[1:])


def load_rows(asker: Asker, data: Path | None, limit: int | None, exact_match: bool, say: Say) -> EvaluationRows:
    """Tokenises the run's evaluation rows, or those of a file, as the run did.

    Of a pair the chosen answer counts, of single answers the wanted ones.

    Args:
        asker: The model.
        data: A file; ``None`` takes the run's own evaluation rows.
        limit: Take the first rows only.
        exact_match: Gather questions as well.
        say: Receives notes.

    Raises:
        DataError: There are no such rows, or they cannot be used.
    """
    spec = asker.run.plan.spec
    prepared = prepare_rows(asker.run, _choose_rows(asker, data), asker.tokenizer, say, data)
    split, report = prepared.eval, prepared.reports[-1]
    if report.rows_truncated or report.rows_dropped:
        left = f"{report.rows_truncated} are cut and {report.rows_dropped} left out"
        say(f"note: of {report.rows_used} rows {left}: they are too long")
    rows = [one for i in range(len(split)) if (one := _read_row(split[i])) is not None][:limit]
    if not any(label != IGNORED for row in rows for label in row.labels[1:]):
        raise DataError("no row holds an answer to measure", where=str(data or "data.eval"))
    questions = prepared.questions[:limit] if exact_match else ()
    if exact_match and not questions:
        raise DataError("--exact-match: no row has a question and an answer", where=str(data or "data.eval"))
    if "chosen_ids" in split.column_names or "completion_ids" in split.column_names:
        say("note: the rows are preferences; of each pair the chosen answer is measured, of single answers the wanted")
    most = spec.report.max_new_tokens if spec.report else 64
    rows.sort(key=lambda row: -len(row.ids))
    return EvaluationRows(str(data) if data else "the run's evaluation rows", rows, questions, most)


def _choose_rows(asker: Asker, data: Path | None) -> RunSpec:
    """Writes the plan's settings of data for an evaluation alone."""
    spec, changes = asker.run.plan.spec, {"packing": False, "padding_free": False, "streaming": False}
    method = spec.method
    if data is not None:
        method = find_method(str(data))
        # There is a limit of the model's and none of the run's: what is longer is measured as far as it goes.
        length = max(spec.data.max_length, asker.positions or 0)
        changes |= {"train": str(data), "eval": str(data), "eval_fraction": None, "eval_rows": None, "format": "auto"}
        changes |= {"max_length": length, "on_overlong": "truncate", "max_lost_ratio": 1.0}
    else:
        check_eval_rows(asker.run)
        if spec.data.streaming:
            changes |= {"train": spec.data.eval}  # the training rows may outgrow the disk
    return spec.model_copy(update={"data": spec.data.model_copy(update=changes), "method": method, "report": None})


def _read_row(columns: dict) -> Row | None:
    """Reads one row of a split; ``None`` for an answer that nobody wants."""
    if "input_ids" in columns:
        return Row(columns["input_ids"], columns["labels"])
    if columns.get("label") is False:
        return None
    prompt, answer = columns["prompt_ids"], columns.get("chosen_ids") or columns["completion_ids"]
    return Row([*prompt, *answer], [IGNORED] * len(prompt) + list(answer))


def measure(asker: Asker, data: EvaluationRows, *, base: bool = False) -> dict[str, float | None]:
    """Measures one set of weights.

    Returns:
        ``loss`` (nats per token), ``perplexity`` and ``exact_match_ratio`` (0 to 1; ``None`` without questions).
    """
    with asker.choosing(base) as model:
        loss = measure_loss(model, data.rows, asker.tokenizer.pad_token_id)
        ratio = None
        if data.questions:
            prompts = [one.prompt for one in data.questions]
            answers = generate_answers(model, asker.tokenizer, prompts, data.max_new_tokens)
            ratio = sum(a == q.wanted for a, q in zip(answers, data.questions, strict=True)) / len(answers)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "exact_match_ratio": ratio}


@torch.inference_mode()
def measure_loss(model: torch.nn.Module, rows: Sequence[Row], pad_id: int) -> float:
    """Returns the mean loss over all tokens that count, in nats: the number that the trainer's evaluation gives.

    Args:
        model: In evaluation mode.
        rows: Longest first.
        pad_id: Token to pad with.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for batch in _cut_batches(rows, GIB // (4 * vocabulary)):
        width = len(batch[0].ids)
        ids = torch.tensor([row.ids + [pad_id] * (width - len(row.ids)) for row in batch])
        labels = torch.tensor([row.labels + [IGNORED] * (width - len(row.ids)) for row in batch])
        mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in batch])
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
        wanted = labels[:, 1:].to(model.device)
        counts = wanted != IGNORED
        losses = cross_entropy(logits[:, :-1][counts].float(), wanted[counts], reduction="none")
        total += losses.double().sum().cpu()
        count += losses.numel()
    return (total / count).item()


def _cut_batches(rows: Sequence[Row], most_tokens: int) -> Iterator[list[Row]]:
    """Cuts rows so that the logits of a batch stay small; a row is never cut."""
    start = 0
    while start < len(rows):
        step = max(1, min(_MOST_ROWS, most_tokens // len(rows[start].ids)))
        yield list(rows[start : start + step])
        start += step


def run_tasks(asker: Asker, tasks: list[str], limit: int | None, *, base: bool = False) -> dict[str, dict]:
    """Hands the model over to lm-eval; returns its figures by task as ``tasks``.

    Raises:
        DataError: It does not know a task, or cannot get its rows.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    try:
        with asker.choosing(base) as model:
            whole = getattr(model, "get_base_model", lambda: model)()  # with its adapters inside
            asked = HFLM(pretrained=whole, tokenizer=asker.tokenizer, batch_size=8)
            found = lm_eval.simple_evaluate(model=asked, tasks=tasks, limit=limit, log_samples=False)
    except (KeyError, ValueError, OSError) as error:
        raise DataError(f"lm-eval: {error}", where="--tasks", fix="`lm-eval ls tasks` lists them") from error
    return {"tasks": found["results"]}


def list_weights(run: Run, *, raw: bool) -> list[str]:
    """Lists which weights of a run are measured: averaged and raw, where there are both."""
    has_both = run.weights("raw") != run.weights()
    return ["raw"] if raw else ["ema", "raw"] if has_both else ["ema"]
