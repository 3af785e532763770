"""Prepares a process to work on a run's model; imported before anything that imports torch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from forge_cli.data.hub import hub_or_copies
from forge_cli.results.find import Run
from forge_cli.run.process import library_logs, prepare_process, translated_errors


@contextlib.contextmanager
def working_on(run: Run) -> Iterator[None]:
    """Prepares the process for a run's model: what libraries say goes to the run's log, failures become Forge's own.

    Use it around everything that loads or asks a model.
    """
    prepare_process()
    log = run.path / "logs" / "results.log"
    with (
        translated_errors(
            log, lambda: "close what else uses this memory", "make room, or write elsewhere with --output"
        ),
        library_logs(log),
    ):
        yield


@contextlib.contextmanager
def asking(run: Run, note: Callable[[str], None], *, needs_hub: bool = False) -> Iterator[None]:
    """Prepares the process; the hub is asked once, and only if the run or the caller needs it."""
    with working_on(run), contextlib.nullcontext() if needs_hub else hub_or_copies(run.plan.spec, note):
        yield
