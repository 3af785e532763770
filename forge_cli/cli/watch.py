"""``forge watch``: the view of a run from another terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

_LOOK_SECONDS = 0.5
# A run that is started again with --overwrite is away for a moment.
_MOST_LOOKS_GONE = 6
_SILENT_SECONDS = 60.0
_WIDTH = 100


def watch(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN]", help="Run folder or name; default: the newest.", show_default=False),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print where the run stands, and end.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Write lines, also in a terminal.")] = False,
) -> None:
    """Follow a run that another process trains.

    Ctrl-C ends the watching and never the run. Exit code 0 if the run goes on or is finished, 14 if its process ended
    before it was.
    """
    from forge_cli.results.find import choose_run
    from forge_cli.results.follow import Follower

    path = choose_run(run).path
    follower = Follower(path)
    try:
        if once:
            sight = follower.look()
            progress = _gather(path, sight.records)
            print(_describe(path, sight, progress, follower.seconds_silent()))
        else:
            sight, progress = _follow(follower, plain=plain)
    except KeyboardInterrupt:
        print("no longer watching; the run is not touched", file=sys.stderr)
        return
    if sight.state == "finished":
        print("\n".join(_say_verdict(path)))
    if sight.state in ("ended", "gone"):
        raise _refuse(path, sight, progress)


def _follow(follower, *, plain: bool):
    """Draws a run until it ends; returns the last sight of it and where it stood."""
    from forge_cli.cli.live import LiveReporter, can_draw
    from forge_cli.run.reporter import PlainReporter

    path, sight = follower.path, follower.look()
    progress = _gather(path, sight.records)
    is_live = not plain and sys.stdout.isatty() and can_draw()
    # Lines are what this command was asked for; where nobody reads them any more, it ends.
    view = LiveReporter() if is_live else PlainReporter(_find_every_steps(path), sys.stdout)
    if not is_live:
        print(_describe(path, sight, progress, follower.seconds_silent()), flush=True)
    view.start(progress.num_steps)
    try:
        view.take_up(progress, follower.seconds_silent())
        num_gone = 0
        while sight.state == "running" or (sight.state == "gone" and num_gone < _MOST_LOOKS_GONE):
            view.note = _describe_state(path, sight, follower.seconds_silent())
            time.sleep(_LOOK_SECONDS)
            sight = follower.look()
            num_gone = num_gone + 1 if sight.state == "gone" else 0
            if sight.is_other:
                progress = _gather(path, sight.records)
                view.take_up(progress, follower.seconds_silent())
                view.say(f"the records start anew, at step {progress.step}: resumed, or another run")
                continue
            _expect(path, progress)
            for record in sight.records:
                view.record(record)
            if sight.records:  # they come in bursts: the time is theirs, not that of reading them
                view.take_up(progress, follower.seconds_silent())
        view.note = _describe_state(path, sight, 0)
    finally:
        view.finish()
    return sight, progress


def _gather(path: Path, records: list[dict]):
    """Gathers where a run stands; how many steps it has is in ``run.json``, or in its plan."""
    from forge_cli.errors import ForgeError
    from forge_cli.results.find import Run
    from forge_cli.run.reporter import Progress

    progress = Progress()
    with contextlib.suppress(ForgeError, OSError):  # a run that is just being made
        progress.num_steps = Run(path).plan.spec.training.max_steps or 0
    _expect(path, progress)
    for record in records:
        progress.take(record)
    return progress


def _expect(path: Path, progress) -> None:
    """Takes over what the run itself expects, as soon as it has written that."""
    from forge_cli.results.find import Run

    expected = {} if progress.expected else Run(path).facts.get("expected")
    if expected and isinstance(expected, dict):
        progress.expected, progress.num_steps = expected, int(expected.get("num_steps") or progress.num_steps)


def _find_every_steps(path: Path) -> int:
    from forge_cli.errors import ForgeError
    from forge_cli.results.find import Run

    try:
        return Run(path).plan.spec.logging.logging_steps
    except (ForgeError, OSError):
        return 1


def _describe(path: Path, sight, progress, silent_seconds: float) -> str:
    """Writes where a run stands, line by line."""
    from forge_cli.cli.live import draw_rows

    note = _describe_state(path, sight, silent_seconds)
    left = progress.seconds_left() if sight.state == "running" else None
    rows = draw_rows(progress, _WIDTH, left_seconds=left, note=note, pictures=False)
    return "\n".join(f"{label:8}{text}" for label, text in rows)


def _describe_state(path: Path, sight, silent_seconds: float) -> str:
    from forge_cli.redaction import printable
    from forge_cli.run.reporter import format_clock

    name = printable(str(path))
    if sight.state == "running":
        silent = f", silent for {format_clock(silent_seconds)}" if silent_seconds > _SILENT_SECONDS else ""
        return f"{name}{silent}, {sight.holder}"
    return f"{name}, {sight.state}" if sight.state == "finished" else f"{name}, not finished, and no process has it"


def _say_verdict(path: Path) -> list[str]:
    from forge_cli.results.find import Run
    from forge_cli.run.summary import find_page, verdict

    try:
        lines = verdict(Run(path).report)
    except (KeyError, TypeError):
        lines = ["it is finished, and its report.json cannot be read"]
    return ["", *lines, f"report   {find_page(path)}"]


def _refuse(path: Path, sight, progress):
    """Builds the error of a run that does not go on."""
    from forge_cli.errors import WorkerDied

    if sight.state == "gone":
        return WorkerDied("the run is gone: it ended before its first step", where=str(path), fix="start it again")
    of = f" of {progress.num_steps}" if progress.num_steps else ""
    if any((path / "checkpoints").glob("step-*")):
        why, fix = "what it saved is whole", f"go on with it: forge resume {path}"
    else:
        why, fix = "it saved no checkpoint", "start it again, with --overwrite if it has a name"
    return WorkerDied(
        f"the run ended at step {progress.step}{of}, before it was finished", where=str(path), why=why, fix=fix
    )


FUNCTIONS = {"watch": watch}
