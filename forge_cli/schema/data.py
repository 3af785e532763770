"""Which rows are trained on, and what of them counts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from forge_cli.schema.section import MOST_ROWS, MOST_TOKENS, Section

Format = Literal[
    "auto",
    "messages",
    "conversations",
    "prompt_completion",
    "instruction",
    "text",
    "tokens",
    "preference",
    "unpaired_preference",
]


class Source(Section):
    """One place that rows come from; a text in its place is its path."""

    path: str = Field(
        min_length=1,
        description="A file or glob (.jsonl, .json, .csv, .tsv, .txt, .parquet, .arrow; .gz and .zst too), "
        "hf://org/name@revision (also org/name/subset), or forge:NAME.",
    )
    split: str = Field(default="train", description="Split of a hub data set.")
    rows: int | None = Field(
        default=None, ge=1, le=MOST_ROWS, description="Take this many of its rows, drawn by the seed."
    )
    weight: float = Field(
        default=1.0, gt=0, le=1000, description="How often a row is seen per epoch: 2 is twice, 0.5 a drawn half."
    )
    columns: dict[str, str] = Field(
        default={}, description="Forge's name for a column: its name in the file ({prompt: question})."
    )


def _tag(value: object) -> str:
    kinds = {dict: "source", Source: "source", list: "list", tuple: "list"}
    return kinds.get(type(value), "text")


_One = Annotated[str, Field(min_length=1), Tag("text")] | Annotated[Source, Tag("source")]
_Item = Annotated[_One, Discriminator(_tag)]
Sources = Annotated[_One | Annotated[list[_Item], Field(min_length=1), Tag("list")], Discriminator(_tag)]


def list_sources(value: str | Source | list | None) -> list[Source]:
    """Returns what ``data.train`` or ``data.eval`` names as a list of sources."""
    items = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    # Nothing to check: the text was one of the choices of ``Sources``.
    return [one if isinstance(one, Source) else Source.model_construct(path=one) for one in items]


def write_sources(value: str | Source | list | None) -> object:
    """Returns the shortest plain data that says the same as ``data.train`` or ``data.eval``."""
    plain = [one.model_dump(exclude_defaults=True) for one in list_sources(value)]
    short = [one["path"] if list(one) == ["path"] else one for one in plain]
    return short[0] if len(short) == 1 else short or None


class DataSection(Section):
    """Training and evaluation rows."""

    train: Sources = Field(description="Training rows: a path, a source ({path: ..., rows: 500}), or a list of them.")
    eval: Sources | None = Field(default=None, description="Evaluation rows, given like train.")
    eval_fraction: float | None = Field(
        default=None, gt=0, lt=1, description="Share of the training rows held back for evaluation (0 to 1)."
    )
    eval_rows: int | None = Field(
        default=None, ge=1, le=MOST_ROWS, description="Number of training rows held back for evaluation."
    )
    format: Format = Field(
        default="auto", description="Shape of the rows. auto: decided from the columns of all rows, and printed."
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error", description="What to do with a row that cannot be read or rendered. Counts are always printed."
    )
    max_bad_ratio: float = Field(
        default=0.01, ge=0, le=1, description="Largest share of bad rows that on_bad_row: skip may skip (0 to 1)."
    )
    max_length: int = Field(default=2048, ge=8, le=MOST_TOKENS, description="Longest row, in tokens.")
    on_overlong: Literal["error", "drop", "truncate", "split"] = Field(
        default="error",
        description="What to do with a row longer than max_length; split goes on in a new row (text and tokens only).",
    )
    max_lost_ratio: float = Field(
        default=0.01, ge=0, le=1, description="Largest share of rows that on_overlong may drop or cut (0 to 1)."
    )
    packing: bool = Field(default=False, description="Pack several rows into one sequence; they do not see each other.")
    padding_free: bool = Field(
        default=False, description="Join the rows of a batch instead of padding them; they do not see each other."
    )
    train_on: Literal["assistant", "last_assistant", "all"] = Field(
        default="assistant",
        description="Which tokens are trained: all assistant turns and their end token, the last turn only, or all.",
    )
    streaming: bool = Field(
        default=False,
        description="Tokenise while training instead of before: for rows that outgrow the disk. They are mixed within "
        "a buffer, so shuffle a sorted file first.",
    )
