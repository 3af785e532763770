"""``forge verify``: read a run's checkpoints to the last byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def verify(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Run folder; default: the newest run.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check every checkpoint of a run; exit 13 if the latest cannot be used."""
    from forge_cli.checkpoints.store import Checkpoint, CheckpointStore, refuse_broken
    from forge_cli.checkpoints.store import verify as verify_checkpoint
    from forge_cli.results.find import choose_run
    from forge_cli.run.folder import read_run_id
    from forge_cli.units import format_bytes

    run = run if run and run.is_dir() else choose_run(run).path
    run_id = read_run_id(run)
    store = CheckpointStore(run / "checkpoints", run_id)
    found = [verify_checkpoint(path, run_id) for path in store.list_paths()]
    sound = [one for one in found if isinstance(one, Checkpoint)]
    broken = [one for one in found if not isinstance(one, Checkpoint)]
    if as_json:
        entries = [{"step": one.step, "path": one.path.name, "reason": getattr(one, "reason", None)} for one in found]
        print(json.dumps({"run_id": run_id, "checkpoints": entries}, indent=1))
    else:
        for one in found:
            print(f"{one.path.name}  {_describe(one, format_bytes)}")
    if not sound or found[0] in broken:
        raise refuse_broken(broken, store.root) if not sound else _refuse_latest(broken[0], sound[0])


def _describe(one, format_bytes) -> str:
    if reason := getattr(one, "reason", None):
        return f"BROKEN: {reason}"
    files = one.manifest.files
    return f"sound: {len(files)} files, {one.manifest.num_tensors} tensors, {format_bytes(one.manifest.num_bytes)}"


def _refuse_latest(latest, sound):
    from forge_cli.errors import CheckpointError

    return CheckpointError(
        f"the latest checkpoint cannot be used: {latest.reason}",
        where=str(latest.path),
        why=f"a resumed run would go on from {sound.path.name} and do {latest.step - sound.step} steps again",
        fix="resume all the same, or restore the checkpoint from a backup",
    )


FUNCTIONS = {"verify": verify}
