"""Rows far longer than the longest row allowed: of what is cut or left out the beginning is tokenised, and the rest is
only counted; a text that is to be split is tokenised piece by piece.

A tokenizer takes some 500 bytes per token while it works, so that a row of a few megabytes would take gigabytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from forge_cli.data.outcomes import Limits, Outcome
from forge_cli.parts.labels import RenderedRow, Tokens
from forge_cli.parts.rendering import Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A beginning: enough for twice the longest row unless tokens are very long.
PIECE_CHARACTERS = 2**14
_CHARACTERS_PER_TOKEN = 16
_BORDER = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")


def shorten(rows: list[RenderedRow], limits: Limits) -> list[RenderedRow]:
    """Cuts the texts of a row to their beginnings if one is very long; returns the same list if none is.

    Returns an empty list for a text that :func:`tokenize_in_pieces` is for.
    """
    most = max(PIECE_CHARACTERS, _CHARACTERS_PER_TOKEN * limits.max_length)
    if all(len(row.text) <= 2 * most for row in rows):
        return rows
    if limits.on_overlong == "split" and limits.kind == "text":
        return []
    return [
        replace(
            row,
            text=row.text[:most],
            spans=tuple((first, min(last, most)) for first, last in row.spans if first < most),
            border=min(row.border, most),
        )
        for row in rows
    ]


def is_too_long(whole: list[RenderedRow], begun: list[RenderedRow], tokens: list[Tokens], limits: Limits) -> bool:
    """Tells whether beginnings have so many tokens that the whole row cannot fit.

    It may: of many spaces, some tokenizers make one token, or none.
    """
    pairs = zip(whole, begun, tokens, strict=True)
    return all(
        len(one.input_ids) >= 2 * limits.max_length for row, part, one in pairs if len(part.text) < len(row.text)
    )


def can_be_cut(tokens: Sequence[Tokens]) -> bool:
    """Tells whether beginnings train something, and a pair two different things."""
    is_alike = len(tokens) == 2 and tokens[0].input_ids == tokens[1].input_ids
    return all(one.num_trained for one in tokens) and not is_alike


def complete(
    outcome: Outcome,
    whole: list[RenderedRow],
    begun: list[RenderedRow],
    tokens: list[Tokens],
    tokenizer: PreTrainedTokenizerFast,
) -> Outcome:
    """Adds to what became of the beginnings what the rest has: its tokens, and whether an answer is lost."""
    length, is_lost = 0, outcome.is_lost
    for row, part, one in zip(whole, begun, tokens, strict=True):
        length = max(length, len(one.input_ids) + _count_tokens(row.text[len(part.text) :], tokenizer))
        is_lost |= any(outcome.status == "dropped" or last > len(part.text) for _, last in row.spans)
    return outcome._replace(length=length, is_lost=is_lost, has_end=outcome.has_end and not is_lost)


def tokenize_in_pieces(row: RenderedRow, renderer: Renderer) -> Tokens:
    """Tokenises running text piece by piece: the same tokens as of the whole, but perhaps where pieces meet.

    They meet before white space, where tokenizers begin a token too, unless there is none.
    """
    end = renderer.tokenizer.eos_token_id
    input_ids, labels, start = [], [], 0
    while start < len(row.text):
        piece = row.text[start : start + PIECE_CHARACTERS]
        if start + len(piece) < len(row.text) and (space := _find_border(piece)):
            piece = piece[:space]
        # Only the first is given the begin token.
        (one,) = renderer.tokenize([RenderedRow(piece, ((0, len(piece)),), from_template=start > 0)])
        length = len(one.input_ids) - (start == 0 and one.input_ids[-1] == end)
        input_ids += one.input_ids[:length]
        labels += one.labels[:length]
        start += len(piece)
    return Tokens([*input_ids, end], [*labels, end])


def _find_border(piece: str) -> int:
    """Returns the last place, not at the start, where a single space stands between two letters; 0 if there is none."""
    found = [one.start() for one in _BORDER.finditer(piece, len(piece) // 2)]
    return found[-1] if found else 0


def _count_tokens(text: str, tokenizer: PreTrainedTokenizerFast) -> int:
    """Counts piece by piece; where pieces meet, there may be a few more tokens than the whole would have."""
    pieces = (text[at : at + PIECE_CHARACTERS] for at in range(0, len(text), PIECE_CHARACTERS))
    return sum(len(tokenizer.backend_tokenizer.encode(one, add_special_tokens=False)) for one in pieces)
