"""Token ids and labels of one row: which tokens hold a character that is trained."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

from forge_cli.parts.turns import BREAK, RowError, Span

IGNORED = -100


@dataclass(frozen=True)
class Tokens:
    """A tokenised row.

    Attributes:
        input_ids: Token ids ``[T]``.
        labels: The same ids where the token is trained, else -100 ``[T]``.
        is_parted: Joined, prompt and answer would be other tokens at their border than apart, as they are here.
    """

    input_ids: list[int]
    labels: list[int]
    is_parted: bool = False

    @property
    def num_trained(self) -> int:
        """Number of trained tokens."""
        return len(self.labels) - self.labels.count(IGNORED)


@dataclass(frozen=True)
class RenderedRow:
    """A row as text, before it is tokenised.

    Attributes:
        text: The whole text; breaks inside it keep the text of special tokens from becoming the tokens.
        spans: Characters that are trained, as (first, behind the last).
        from_template: The chat template wrote all special tokens; otherwise the tokenizer adds its begin token, and
            an end token follows.
        border: Where a plain prompt ends; 0 without one.
    """

    text: str
    spans: tuple[Span, ...]
    from_template: bool
    border: int = 0


def label_tokens(
    ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span], control: Collection[int] = ()
) -> list[int]:
    """Labels the tokens that hold a character of a span. Shapes: ``ids [T]`` to labels ``[T]``."""
    labels = [IGNORED] * len(ids)
    # Many tokenizers leave spaces out of a token's offsets: a token begins where the text so far was covered.
    covered = list(accumulate((end for _, end in offsets), max))
    for first, last in spans:
        start, stop = bisect_right(covered, first), bisect_left(covered, last) + 1
        # A control token that takes white space from an answer's start is no part of the answer.
        while start < stop and offsets[start][0] < first and ids[start] in control:
            start += 1
        # The bytes of one character may be several tokens.
        while stop < len(ids) and offsets[stop][0] < last == offsets[stop][1]:
            stop += 1
        labels[start:stop] = ids[start:stop]
    return labels


def drop_breaks(text: str, tokens: Tokens, offsets: Sequence[Span]) -> Tokens:
    """Takes the tokens of breaks out again."""
    if BREAK not in text:
        return tokens
    kept = []
    for index, (start, end) in enumerate(offsets):
        if BREAK not in text[start:end]:
            kept.append(index)
        elif end - start != 1:
            raise RowError("the tokenizer joins the text of a special token with a break, so it cannot stay text")
    return Tokens([tokens.input_ids[i] for i in kept], [tokens.labels[i] for i in kept])


def take_answer(text: str, ids: Sequence[int], offsets: Sequence[Span]) -> list[int]:
    """Takes the tokens behind the break that a text begins with, which keeps the answer apart from what it follows."""
    # What a tokenizer puts before every text (a space) covers nothing but the break.
    start = next((i for i, (_, end) in enumerate(offsets) if end > 1), len(ids))
    if start < len(ids) and offsets[start][0] < 1:
        raise RowError(
            "prompt and answer share a token that this tokenizer cannot part; begin the answer with the space or line "
            "break that the prompt ends with"
        )
    return drop_breaks(text, Tokens(list(ids[start:]), list(ids[start:])), offsets[start:]).input_ids
