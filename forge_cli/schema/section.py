"""The base of every section of a run file."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# No number is without bounds: what lies beyond these is a slip of the hand, and would end in a library's overflow.
MOST_STEPS = 100_000_000
MOST_ROWS = 1_000_000_000_000
MOST_TOKENS = 10_000_000  # as many as the longest context of a published model
MOST_IN_BATCH = 1_000_000
LARGEST_FACTOR = 1e6
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]


class Section(BaseModel):
    """A frozen group of settings that refuses what it does not know.

    ``strict`` keeps ``"3"`` from becoming ``3``: YAML already told text from numbers. ``defer_build`` builds
    one validator, for the whole run file, when it is first used: half the start-up time of `forge config`.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), defer_build=True
    )
