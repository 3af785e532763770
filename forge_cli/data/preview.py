"""Rows as they are trained: text, which tokens count, and which are special."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from forge_cli.data.prepare import TokenSet
from forge_cli.data.reading import find_files, read_file
from forge_cli.errors import DataError
from forge_cli.parts.labels import IGNORED
from forge_cli.schema.data import DataSection, Source, list_sources

_GREEN, _DIM, _INVERSE, _RESET = "\033[32m", "\033[2m", "\033[7m", "\033[0m"
_STYLE = """body{font:14px/1.5 ui-monospace,monospace;margin:2rem;max-width:70rem;color:#222;background:#fff}
pre{white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid #ddd;padding:1rem;border-radius:6px;color:#767676}
.trained{background:#d4f2da;color:#0b3d17}.special{outline:1px solid #999;border-radius:3px;font-weight:bold}
h2{font-size:1rem}p{color:#444}"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head><body>
<h1>{title}</h1>
<p><span class="trained">Trained</span> text is what the model learns to write; <span class="special">special
tokens</span> are framed; ⏎ is a line break. Token ids are in the tool tips.</p>
{rows}
</body></html>
"""


class Stretch(NamedTuple):
    """Neighbouring tokens of one kind.

    Attributes:
        text: What they decode to.
        is_trained: They are trained.
        is_special: It is one token that controls the model.
        ids: Their ids.
    """

    text: str
    is_trained: bool
    is_special: bool
    ids: list[int]


class TrainedRow(NamedTuple):
    """One sequence that is trained.

    Attributes:
        split: ``train`` or ``eval``.
        row: Its source row: 1 is the first of the first file.
        place: Where that row stands.
        part: ``""``, ``chosen``, ``rejected``, ``wanted`` or ``unwanted``.
        stretches: Its tokens, in order.
    """

    split: str
    row: int
    place: str
    part: str
    stretches: list[Stretch]


def read_trained_rows(
    tokens: TokenSet, data: DataSection, tokenizer, *, rows: Collection[int] | None = None, count: int = 3
) -> Iterator[TrainedRow]:
    """Reads rows from the very tokens that a trainer gets.

    Args:
        tokens: The tokens.
        data: The section that they were made from.
        tokenizer: That made them.
        rows: Source rows, of both splits; ``None`` takes the first of the training split.
        count: How many of them, without ``rows``.

    Raises:
        DataError: There is no such row; says which there are.
    """
    import pyarrow as pa

    sources = {"train": list_sources(data.train), "eval": list_sources(data.eval or data.train)}
    known = {} if rows is None else {split: _find_rows(sources[split], rows=rows) for split in sources}
    if rows is not None and (missing := {*rows} - {row for one in known.values() for row in one.values()}):
        lasts = {split: sum(1 for _ in _count_rows(sources[split])) for split in sources if getattr(data, split)}
        there = ", ".join(f"{split} has rows 1 to {last}" for split, last in lasts.items())
        raise DataError(f"there is no row {min(missing)}", where="--row", fix=there)
    for split in sources if rows is not None else ("train",):
        path = tokens.folder / f"{split}.arrow"
        if not path.exists():
            continue
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_stream(file).read_all()
        numbers = table["row"].to_pylist()
        if rows is None:
            numbers = numbers[:count]
            known[split] = _find_rows(sources[split], numbers=numbers)
        for index, number in enumerate(numbers):
            if number in known[split]:
                place = known[split][number], tokens.name_row(split, number)
                yield from _split_row(split, *place, table.slice(index, 1).to_pylist()[0], tokenizer)


def _find_rows(
    sources: Sequence[Source], *, rows: Collection[int] = (), numbers: Collection[int] = ()
) -> dict[int, int]:
    """Finds source rows by their count, or by the numbers that their tokens carry; returns number to row."""
    pairs = ((number, row) for row, number in _count_rows(sources) if row in rows or number in numbers)
    return dict(islice(pairs, len({*rows, *numbers})))


def _count_rows(sources: Sequence[Source]) -> Iterator[tuple[int, int]]:
    """Yields count and number of every source row: a file of lines numbers its rows by lines."""
    row = base = last = 0
    for source in sources:
        for file in find_files(source.path):
            for one in read_file(file, source.split):
                row, last = row + 1, one.number
                yield row, base + last
            base, last = base + last, 0


def _split_row(split: str, row: int, place: str, columns: dict, tokenizer) -> Iterator[TrainedRow]:
    if "input_ids" in columns:
        trained = [label != IGNORED for label in columns["labels"]]
        yield TrainedRow(split, row, place, "", list(_stretch(columns["input_ids"], trained, tokenizer)))
        return
    if "completion_ids" in columns:
        answers = {"wanted" if columns["label"] else "unwanted": columns["completion_ids"]}
    else:
        answers = {"chosen": columns["chosen_ids"], "rejected": columns["rejected_ids"]}
    prompt = columns["prompt_ids"]
    for part, ids in answers.items():
        trained = [False] * len(prompt) + [True] * len(ids)
        yield TrainedRow(split, row, place, part, list(_stretch([*prompt, *ids], trained, tokenizer)))


def _stretch(ids: list[int], trained: list[bool], tokenizer) -> Iterator[Stretch]:
    """Joins neighbours of one kind; special tokens stand alone."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    borders = [
        i for i in range(1, len(ids)) if trained[i] != trained[i - 1] or ids[i] in special or ids[i - 1] in special
    ]
    start, before = 0, ""
    for stop in [*borders, len(ids)]:
        # Decoded from the beginning, as some tokenizers drop the space of a first token.
        text = tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False)
        if stop < len(ids):
            text = text.rstrip("\ufffd")  # a character that the border cuts stands behind it
        yield Stretch(text[len(before) :], trained[start], ids[start] in special, ids[start:stop])
        start, before = stop, text


def render_terminal(row: TrainedRow, *, colour: bool) -> str:
    """Renders a row for a terminal: trained text green, or between ``[[`` and ``]]`` without colour."""
    parts = []
    for one in row.stretches:
        text = "".join(_show_character(character) for character in one.text)
        if colour:
            codes = (_GREEN if one.is_trained else _DIM) + (_INVERSE if one.is_special else "")
            parts.append(f"{codes}{text}{_RESET}")
        else:
            parts.append(f"[[{text}]]" if one.is_trained else text)
    text = "".join(parts)
    return f"{_head(row)}\n{text if colour else text.replace(']][[', '')}"


def _show_character(character: str) -> str:
    """Writes line breaks and tabs as they are, and escapes what would control the terminal."""
    if character == "\n":
        return "⏎\n"
    return character if character.isprintable() or character == "\t" else ascii(character)[1:-1]


def render_html(rows: Sequence[TrainedRow], title: str) -> str:
    """Renders rows as a page of its own, with nothing loaded from elsewhere."""
    body = []
    for row in rows:
        spans = []
        for one in row.stretches:
            kinds = " ".join(k for k, on in (("trained", one.is_trained), ("special", one.is_special)) if on)
            text = html.escape("".join(_show_character(character) for character in one.text))
            spans.append(f'<span class="{kinds}" title="{" ".join(map(str, one.ids[:40]))}">{text}</span>')
        body.append(f"<h2>{html.escape(_head(row))}</h2>\n<pre>{''.join(spans)}</pre>")
    return _PAGE.format(title=html.escape(title), style=_STYLE, rows="\n".join(body))


def _head(row: TrainedRow) -> str:
    tokens = sum(len(one.ids) for one in row.stretches)
    trained = sum(len(one.ids) for one in row.stretches if one.is_trained)
    part = f" {row.part}" if row.part else ""
    return f"{row.split} row {row.row}{part}, {row.place}: {tokens} tokens, {trained} trained"


def describe_row(row: TrainedRow) -> dict[str, object]:
    """Returns a row as plain data."""
    return {**row._asdict(), "stretches": [one._asdict() for one in row.stretches]}
