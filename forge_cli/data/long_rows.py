"""Rows far longer than the longest row allowed: their beginnings are tokenised, and the rest is only counted.

A tokenizer takes some 500 bytes per token while it works, so that a row of a few megabytes would take gigabytes only to
be left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from forge_cli.data.outcomes import Limits, Outcome
from forge_cli.parts.labels import RenderedRow, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A beginning: enough for twice the longest row unless tokens are very long.
BEGINNING_CHARACTERS = 2**16
_CHARACTERS_PER_TOKEN = 16


def shorten(rows: list[RenderedRow], limits: Limits) -> list[RenderedRow]:
    """Cuts the texts of a row to their beginnings if one is very long; returns the same list if none is."""
    most = max(BEGINNING_CHARACTERS, _CHARACTERS_PER_TOKEN * limits.max_length)
    if limits.on_overlong == "split" or all(len(row.text) <= 2 * most for row in rows):
        return rows
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


def _count_tokens(text: str, tokenizer: PreTrainedTokenizerFast) -> int:
    """Counts piece by piece; where pieces meet, there may be a few more tokens than the whole would have."""
    pieces = (text[at : at + BEGINNING_CHARACTERS] for at in range(0, len(text), BEGINNING_CHARACTERS))
    return sum(len(tokenizer.backend_tokenizer.encode(one, add_special_tokens=False)) for one in pieces)
