"""The base of every section of a run file."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen group of settings that refuses what it does not know.

    ``strict`` keeps ``"3"`` from becoming ``3``: YAML already told text from numbers. ``defer_build`` builds
    one validator, for the whole run file, when it is first used: half the start-up time of `forge config`.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), defer_build=True
    )
