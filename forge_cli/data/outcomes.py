"""What is asked of rows, and what became of each."""

from __future__ import annotations

from typing import Literal, NamedTuple

Columns = dict[str, object]
Status = Literal["kept", "dropped", "cut", "split", "bad"]


class Limits(NamedTuple):
    """What becomes of rows.

    Attributes:
        kind: Format of the rows.
        train_on: Which turns are trained.
        max_length: Longest row, in tokens.
        on_overlong: What to do with a longer one.
    """

    kind: str
    train_on: str
    max_length: int
    on_overlong: str


class Question(NamedTuple):
    """A prompt and the answer that is wanted, for generation.

    Attributes:
        prompt: Token ids ``[T]`` up to where the model is to answer.
        shown: The last thing the user said, for people.
        wanted: The reference answer.
    """

    prompt: list[int]
    shown: str
    wanted: str


class Outcome(NamedTuple):
    """What became of one row.

    Attributes:
        number: Its number.
        status: What was done with it.
        columns: What is trained: one mapping from column to ids (``array``) per new row; empty if it was dropped.
        length: Tokens before anything was cut.
        trained: Trained tokens that are left.
        is_lost: An answer lost tokens.
        has_end: The last trained token ends an answer.
        escaped: Texts of special tokens that were kept as text.
        is_parted: Prompt and answer were tokenised apart, as a token would have held the border between them.
        is_prompt_found: The row names no prompt; it is the text that both answers begin with.
        question: For generation; only of evaluation rows that were not cut.
        what: What is wrong with a bad row.
    """

    number: int
    status: Status
    columns: tuple[Columns, ...] = ()
    length: int = 0
    trained: int = 0
    is_lost: bool = False
    has_end: bool = False
    escaped: int = 0
    is_parted: bool = False
    is_prompt_found: bool = False
    question: Question | None = None
    what: str = ""
