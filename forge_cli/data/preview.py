"""Rows as they are trained: text, which tokens count, and which are special."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from forge_cli.parts.labels import IGNORED

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
        number: Number of its source row.
        part: ``""``, ``chosen``, ``rejected``, ``wanted`` or ``unwanted``.
        stretches: Its tokens, in order.
    """

    split: str
    number: int
    part: str
    stretches: list[Stretch]


def read_trained_rows(
    folder: Path, tokenizer, *, rows: Sequence[int] | None = None, count: int = 3
) -> Iterator[TrainedRow]:
    """Reads rows from the very tokens that a trainer gets.

    Args:
        folder: Of :class:`forge_cli.data.prepare.TokenSet`.
        tokenizer: That made them.
        rows: Numbers of source rows, in both splits; ``None`` takes the first of the training split.
        count: How many of them, without ``rows``.
    """
    import pyarrow as pa

    found = 0
    for split in ("train", "eval"):
        path = folder / f"{split}.arrow"
        if not path.exists() or (rows is None and found >= count):
            continue
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_stream(file).read_all()
        numbers = table["row"].to_pylist()
        chosen = range(min(count, len(numbers))) if rows is None else [i for i, n in enumerate(numbers) if n in rows]
        for index in chosen:
            found += 1
            yield from _split_row(split, table.slice(index, 1).to_pylist()[0], tokenizer)


def _split_row(split: str, row: dict, tokenizer) -> Iterator[TrainedRow]:
    number = row["row"]
    if "input_ids" in row:
        trained = [label != IGNORED for label in row["labels"]]
        yield TrainedRow(split, number, "", list(_stretch(row["input_ids"], trained, tokenizer)))
        return
    if "completion_ids" in row:
        answers = {"wanted" if row["label"] else "unwanted": row["completion_ids"]}
    else:
        answers = {"chosen": row["chosen_ids"], "rejected": row["rejected_ids"]}
    for part, ids in answers.items():
        trained = [False] * len(row["prompt_ids"]) + [True] * len(ids)
        yield TrainedRow(split, number, part, list(_stretch([*row["prompt_ids"], *ids], trained, tokenizer)))


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


def render_terminal(row: TrainedRow, place: str, *, colour: bool) -> str:
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
    return f"{_head(row, place)}\n{text if colour else text.replace(']][[', '')}"


def _show_character(character: str) -> str:
    """Writes line breaks and tabs as they are, and escapes what would control the terminal."""
    if character == "\n":
        return "⏎\n"
    return character if character.isprintable() or character == "\t" else ascii(character)[1:-1]


def render_html(rows: Sequence[tuple[TrainedRow, str]], title: str) -> str:
    """Renders rows as a page of its own, with nothing loaded from elsewhere."""
    body = []
    for row, place in rows:
        spans = []
        for one in row.stretches:
            kinds = " ".join(k for k, on in (("trained", one.is_trained), ("special", one.is_special)) if on)
            text = html.escape("".join(_show_character(character) for character in one.text))
            spans.append(f'<span class="{kinds}" title="{" ".join(map(str, one.ids[:40]))}">{text}</span>')
        body.append(f"<h2>{html.escape(_head(row, place))}</h2>\n<pre>{''.join(spans)}</pre>")
    return _PAGE.format(title=html.escape(title), style=_STYLE, rows="\n".join(body))


def _head(row: TrainedRow, place: str) -> str:
    tokens = sum(len(one.ids) for one in row.stretches)
    trained = sum(len(one.ids) for one in row.stretches if one.is_trained)
    part = f" {row.part}" if row.part else ""
    return f"{row.split} {place}{part}: {tokens} tokens, {trained} trained"


def describe_row(row: TrainedRow, place: str) -> dict[str, object]:
    """Returns a row as plain data."""
    return {
        "split": row.split,
        "row": row.number,
        "place": place,
        "part": row.part,
        "stretches": [one._asdict() for one in row.stretches],
    }
