"""The run folder: one folder a run, held by one process, never overwritten silently."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from forge_cli.checkpoints.lock import RunLock
from forge_cli.errors import CheckpointError, MachineError
from forge_cli.version import __version__

PLAN_FILE = "plan.yaml"
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
REPORT_FILE = "report.json"
PARTIAL_SUFFIX = ".partial"


@dataclass(frozen=True)
class RunFolder:
    """Where one run keeps its files.

    Attributes:
        path: The folder.
        run_id: Name of the run that no other has; its checkpoints carry it.
        lock: Held while the run lasts.
        replaced: Where the earlier run of this name waits, with ``--overwrite``.
        resumed: The run was there before.
    """

    path: Path
    run_id: str
    lock: RunLock
    replaced: Path | None = None
    resumed: bool = False

    @property
    def plan(self) -> Path:
        """The resolved run file."""
        return self.path / PLAN_FILE

    @property
    def metrics(self) -> Path:
        """One JSON line per optimizer step, evaluation and alarm."""
        return self.path / METRICS_FILE

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of the trainer."""
        return self.path / "checkpoints"

    @property
    def log(self) -> Path:
        """What libraries print, and tracebacks."""
        return self.path / "logs" / "forge.log"

    def read_facts(self) -> dict:
        """Reads what ``run.json`` says about the run."""
        return json.loads((self.path / RUN_FILE).read_text(encoding="utf-8"))

    def note_facts(self, **facts: object) -> None:
        """Adds facts to ``run.json``."""
        text = json.dumps({**self.read_facts(), **facts}, indent=1, ensure_ascii=False)
        write_atomic(self.path / RUN_FILE, text + "\n")

    def settle(self) -> None:
        """Ends the run's claim on its name.

        A run that measured something stays, and the one it replaced goes. One that never began must not hold the
        name: it goes, and the earlier one comes back.
        """
        try:
            if self.resumed or self.metrics.exists():
                if self.replaced:
                    shutil.rmtree(self.replaced, ignore_errors=True)
                return
            shutil.rmtree(self.path, ignore_errors=True)
            if self.replaced:
                self.replaced.rename(self.path)
        finally:
            self.lock.release()


def create_run_folder(output_dir: str, name: str | None, stem: str, plan_text: str, *, overwrite: bool) -> RunFolder:
    """Makes the folder of a new run and writes its plan.

    A run without a name takes the name of its file, and the next free number. A named run that exists is refused.

    Args:
        output_dir: Folder that holds all runs.
        name: Name in the run file.
        stem: Name to fall back on.
        plan_text: Content of ``plan.yaml``.
        overwrite: Replace the earlier run of this name, if it is one.

    Raises:
        MachineError: The run exists, or the folder cannot be made.
    """
    root = Path(output_dir).expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
        replaced = _set_aside(root, name) if name and overwrite and (root / name).exists() else None
        path = _claim(root, name) if name else _claim_next(root, stem)
        folder = RunFolder(path, uuid.uuid4().hex, RunLock(path), replaced)
        folder.log.parent.mkdir(mode=0o700)
        write_atomic(folder.plan, plan_text)
        facts = {"run_id": folder.run_id, "created": datetime.now(UTC).isoformat(), "forge": __version__}
        write_atomic(path / RUN_FILE, json.dumps(facts, indent=1) + "\n")
    except OSError as error:
        raise MachineError(
            f"the run folder cannot be made: {error.strerror}",
            where=str(error.filename or root),
            fix="set output_dir to a folder you may write to",
        ) from error
    return folder


def open_run_folder(path: Path) -> RunFolder:
    """Takes up the folder of a run that was stopped.

    Raises:
        CheckpointError: It is no run of Forge's.
        MachineError: Another process holds it, or it cannot be written.
    """
    run_id = read_run_id(path)
    try:
        lock = RunLock(path)
    except OSError as error:
        raise MachineError(
            f"the run folder cannot be written: {error.strerror}",
            where=str(path),
            fix="make it writable, or copy it to a folder that is",
        ) from error
    return RunFolder(path, run_id, lock, resumed=True)


def read_run_id(path: Path) -> str:
    """Reads which run a folder holds.

    Raises:
        CheckpointError: It is no run of Forge's.
    """
    try:
        return str(json.loads((path / RUN_FILE).read_text(encoding="utf-8"))["run_id"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"this is no run folder: it has no {RUN_FILE} that can be read",
            where=str(path),
            fix="name the folder of a run, as in runs/NAME",
        ) from None


def find_run(output_dir: str, name: str | None, stem: str) -> Path:
    """Finds the run that ``forge train RUN_FILE --resume`` means: the named one, or the latest of its file.

    Raises:
        CheckpointError: There is none.
    """
    root = Path(output_dir).expanduser()
    if name:
        found = [root / name] if (root / name).is_dir() else []
    else:
        runs = [path for path in root.glob(f"{glob.escape(stem)}*") if (path / RUN_FILE).is_file()]
        numbers = {path: re.fullmatch(r"(?:-(\d+))?", path.name[len(stem) :]) for path in runs}
        found = [path for path in runs if numbers[path]]
        found = [max(found, key=lambda path: int(numbers[path][1] or 1))] if found else []
    if not found:
        raise CheckpointError(
            "there is no run to resume",
            where=str(root / (name or stem)),
            why="--resume never starts a run from the beginning",
            fix="leave --resume out to start it",
        )
    return found[0]


def write_atomic(path: Path, text: str) -> None:
    """Writes a text file so that it is either the old one or the new one, never half."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _set_aside(root: Path, name: str) -> Path:
    """Moves an earlier run out of the way. A folder without a plan was not made by Forge and is not ours to move."""
    path = root / name
    if (path / RUN_FILE).is_file():
        RunLock(path).release()  # refuses while another process trains there
    # A process that was killed while it made the folder may have come no further than that.
    is_bare = {one.name for one in path.iterdir()} <= {".lock", "logs", PLAN_FILE + PARTIAL_SUFFIX}
    if not (path / PLAN_FILE).is_file() and not is_bare:
        raise MachineError("--overwrite: this folder is not a run", where=str(path), fix="choose another name")
    aside = root / f".{name}.replaced-{os.getpid()}"
    return path.rename(aside)


def _claim(root: Path, name: str) -> Path:
    path = root / name
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        raise MachineError(
            "this run exists already",
            where=str(path),
            why="its results would be lost",
            fix="use --set name=ANOTHER, --resume to go on with it, or --overwrite to delete it",
        ) from None
    return path


def _claim_next(root: Path, stem: str) -> Path:
    """Makes ``stem``, or ``stem-2``, ``stem-3``, ...; mkdir is the claim, so two runs never share a folder."""
    number = 1
    while True:
        path = root / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir(mode=0o700)
            return path
        except FileExistsError:
            number += 1
