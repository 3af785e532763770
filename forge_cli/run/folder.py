"""The run folder: one folder a run, never overwritten silently."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from forge_cli.errors import MachineError

PLAN_FILE = "plan.yaml"
METRICS_FILE = "metrics.jsonl"
REPORT_FILE = "report.json"
PARTIAL_SUFFIX = ".partial"


@dataclass(frozen=True)
class RunFolder:
    """Where one run keeps its files.

    Attributes:
        path: The folder.
        replaced: Where the earlier run of this name waits, with ``--overwrite``.
    """

    path: Path
    replaced: Path | None = None

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

    def settle(self) -> None:
        """Ends the run's claim on its name.

        A run that measured something stays, and the one it replaced goes. One that never began must not hold the
        name: it goes, and the earlier one comes back.
        """
        if self.metrics.exists():
            if self.replaced:
                shutil.rmtree(self.replaced, ignore_errors=True)
            return
        shutil.rmtree(self.path, ignore_errors=True)
        if self.replaced:
            self.replaced.rename(self.path)


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
        folder = RunFolder(_claim(root, name) if name else _claim_next(root, stem), replaced)
        folder.log.parent.mkdir()
        write_atomic(folder.plan, plan_text)
    except OSError as error:
        raise MachineError(
            f"the run folder cannot be made: {error.strerror}",
            where=str(error.filename or root),
            fix="set output_dir to a folder you may write to",
        ) from error
    return folder


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
    if not (path / PLAN_FILE).is_file():
        raise MachineError("--overwrite: this folder is not a run", where=str(path), fix="choose another name")
    aside = root / f".{name}.replaced-{os.getpid()}"
    return path.rename(aside)


def _claim(root: Path, name: str) -> Path:
    path = root / name
    try:
        path.mkdir()
    except FileExistsError:
        raise MachineError(
            "this run exists already",
            where=str(path),
            why="its results would be lost",
            fix="use --set name=ANOTHER, or --overwrite to delete it",
        ) from None
    return path


def _claim_next(root: Path, stem: str) -> Path:
    """Makes ``stem``, or ``stem-2``, ``stem-3``, ...; mkdir is the claim, so two runs never share a folder."""
    number = 1
    while True:
        path = root / (stem if number == 1 else f"{stem}-{number}")
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1
