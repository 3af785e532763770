"""The rows of a run that has ended, where it found them, and only if they are still the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from forge_cli.build.data import PreparedData, prepare_data
from forge_cli.errors import DataError
from forge_cli.results.find import Run
from forge_cli.schema.runspec import RunSpec


def prepare_rows(
    run: Run, spec: RunSpec, tokenizer, say: Callable[[str], None] = lambda text: None, data: Path | None = None
) -> PreparedData:
    """Tokenises a run's own rows, or those of a file.

    Args:
        run: The run.
        spec: Its plan, with other settings of data where they are wanted.
        tokenizer: Its tokenizer.
        say: Receives notes.
        data: The file that the plan names instead of the run's own.

    Raises:
        DataError: The files are gone or have changed: other rows would be held back, most of which were trained.
    """
    known = {name: digest for name, digest in run.facts.get("data", {}).items() if name.startswith("data.")}
    if data is not None:
        prepared = prepare_data(spec, tokenizer, say)
        trained = {digest for name, digest in known.items() if name.startswith("data.train")}
        if trained & set(prepared.identity.values()):
            say("note: the run was trained on rows of this file; its loss on them says nothing about others")
        return prepared
    with contextlib.chdir(run.home):
        prepared = prepare_data(spec, tokenizer, say)
    changed = [name for name, digest in known.items() if prepared.identity.get(name, digest) != digest]
    if changed:
        raise DataError(
            f"the rows are no longer those of the run: {', '.join(changed)} changed",
            where=str(run.path),
            why="rows that were trained would pass for held-out ones",
            fix="put the file back, or name other rows: --data FILE",
        )
    return prepared
