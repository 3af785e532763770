"""Answers the prompts of a file with a run's model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from forge_cli.data.conversation import check_order, read_turns
from forge_cli.data.reading import BadRow, describe_place, find_files, read_file
from forge_cli.errors import DataError, Problem
from forge_cli.parts.turns import RowError, describe_value
from forge_cli.redaction import printable
from forge_cli.results.ask import Asker
from forge_cli.run.answers import generate_answers

SHOWN_FAULTS = 20
# Batches whose prompts are sorted by length together: little padding, and answers come all the while.
_WINDOW_BATCHES = 8
_SAY_EVERY_SECONDS = 5.0


class Prompt(NamedTuple):
    """A row and what is asked.

    Attributes:
        row: The row as it stands in its file.
        ids: Token ids ``[T]``.
        has_answer: The row ends with an answer, which is left out.
    """

    row: Mapping[str, object]
    ids: list[int]
    has_answer: bool


def read_prompts(path: Path, asker: Asker, max_new_tokens: int) -> list[Prompt]:
    """Reads and encodes the rows of a file: ``prompt``, ``messages``, or a line of a ``.txt``.

    Raises:
        DataError: There is no row, or some cannot be asked; lists the first of them.
    """
    prompts: list[Prompt] = []
    problems: list[Problem] = []
    for place, row in _read_rows(path):
        if isinstance(row, BadRow):
            problems.append(Problem(printable(place), "", printable(row.what), fix=row.fix))
            continue
        try:
            prompts.append(_encode(row, asker, max_new_tokens))
        except RowError as error:
            problems.append(Problem(printable(place), "", printable(str(error))))
    if problems:
        more = len(problems) - SHOWN_FAULTS
        rest = [Problem("", "", f"and {more} more bad rows")] if more > 0 else []
        raise DataError.from_problems([*problems[:SHOWN_FAULTS], *rest])
    if not prompts:
        raise DataError("there is no prompt in it", where=str(path), fix='write rows such as {"prompt": "..."}')
    return prompts


def _read_rows(path: Path) -> Iterator[tuple[str, Mapping[str, object] | BadRow]]:
    for file in find_files(str(path)):
        for row in read_file(file):
            if isinstance(row, BadRow):
                yield describe_place(file, row.number, row.column), row
            elif file.kind == "txt":  # one row, as a text to train on is
                lines = enumerate(str(row.values["text"]).split("\n"), row.number)
                yield from ((describe_place(file, n), {"prompt": one.strip()}) for n, one in lines if one.strip())
            else:
                yield describe_place(file, row.number), row.values


def _encode(row: Mapping[str, object], asker: Asker, max_new_tokens: int) -> Prompt:
    name = next((one for one in ("messages", "conversations", "prompt") if row.get(one) is not None), None)
    if name is None:
        raise RowError(f"has neither prompt nor messages; its columns are {', '.join(row) or 'none'}")
    value, has_answer = row[name], False
    if isinstance(value, list):
        value = read_turns(value, name)
        check_order(value)
        while value and value[-1]["role"] == "assistant":
            value, has_answer = value[:-1], True
    elif name != "prompt" or not isinstance(value, str):
        raise RowError(f"{name} is {describe_value(value)}, not {'text or ' * (name == 'prompt')}a list of turns")
    if not value or (isinstance(value, str) and not value.strip()):
        raise RowError(f"{name} asks nothing")
    tools, options = row.get("tools") or None, row.get("chat_template_kwargs") or None
    if not isinstance(tools or [], list) or not isinstance(options or {}, Mapping):
        raise RowError("tools is not a list, or chat_template_kwargs is not a mapping")
    ids = asker.encode(value, tools, options)
    if asker.positions and len(ids) + max_new_tokens > asker.positions:
        raise RowError(
            f"has {len(ids)} tokens; with {max_new_tokens} of an answer these are more than the model's "
            f"{asker.positions} positions; lower --max-new-tokens, or shorten it"
        )
    return Prompt(row, ids, has_answer)


def answer_prompts(
    asker: Asker,
    prompts: list[Prompt],
    *,
    max_new_tokens: int,
    batch_rows: int,
    base: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, object]]:
    """Yields every row with its ``answer``, in their order, as they are ready.

    Args:
        asker: The model.
        prompts: From :func:`read_prompts`.
        max_new_tokens: Longest answer.
        batch_rows: Prompts that are answered at once, at most 32.
        base: Ask the base.
        say: Receives progress.
    """
    said, window = time.perf_counter(), batch_rows * _WINDOW_BATCHES
    for start in range(0, len(prompts), window):
        rows = prompts[start : start + window]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        answers: dict[int, str] = {}
        for first in range(0, len(order), batch_rows):
            batch = order[first : first + batch_rows]
            with asker.choosing(base) as model:
                ids = [rows[i].ids for i in batch]
                answers |= zip(batch, generate_answers(model, asker.tokenizer, ids, max_new_tokens), strict=True)
            if time.perf_counter() - said > _SAY_EVERY_SECONDS:
                said = time.perf_counter()
                say(f"answered {start + len(answers)} of {len(prompts)}")
        yield from ({**one.row, "answer": answers[i]} for i, one in enumerate(rows))
