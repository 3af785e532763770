"""Which rows are trained on, and what of them counts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from forge_cli.schema.section import Section


class DataSection(Section):
    """Training and evaluation rows."""

    train: str = Field(
        min_length=1,
        description="A .jsonl, .json, .csv or .parquet file, a hub data set (org/name), or forge:quickstart/train.",
    )
    train_split: str = Field(default="train", description="Split of a hub data set to train on.")
    eval: str | None = Field(default=None, description="Evaluation rows: a file, a hub data set or forge:NAME.")
    eval_split: str | None = Field(default=None, description="Split of the hub data set to evaluate on.")
    eval_fraction: float | None = Field(
        default=None, gt=0, lt=1, description="Share of the training rows held back for evaluation (0 to 1)."
    )
    format: Literal["auto", "messages", "prompt_completion", "instruction", "text"] = Field(
        default="auto", description="Shape of the rows. auto: decided from the columns of all rows, and printed."
    )
    max_length: int = Field(default=2048, ge=8, description="Longest row, in tokens.")
    on_overlong: Literal["error", "drop", "truncate"] = Field(
        default="error", description="What to do with a row longer than max_length. Counts are always printed."
    )
    packing: bool = Field(default=False, description="Pack several rows into one sequence; they do not see each other.")
    train_on: Literal["assistant", "last_assistant", "all"] = Field(
        default="assistant",
        description="Which tokens are trained: all assistant turns and their end token, the last turn only, or all.",
    )
