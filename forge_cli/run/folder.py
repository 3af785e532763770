"""The run folder: one folder a run, held by one process, never overwritten silently."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from forge_cli.checkpoints.lock import RunLock, find_holder
from forge_cli.checkpoints.store import CheckpointStore
from forge_cli.errors import CheckpointError, MachineError
from forge_cli.run.ranks import Rank, name_file, read_rank
from forge_cli.run.replaced import (
    ReplacedRun,
    claiming,
    delete_replaced,
    list_replaced,
    recover_replaced,
    set_aside,
)
from forge_cli.version import __version__

PLAN_FILE = "plan.yaml"
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
REPORT_FILE = "report.json"
PAGE_FILE = "report.html"
ASKING_FILE = "chat.json"
PARTIAL_SUFFIX = ".partial"


@dataclass(frozen=True)
class RunFolder:
    """Where one run keeps its files.

    Attributes:
        path: The folder.
        run_id: Name of the run that no other has; its checkpoints carry it.
        lock: Held while the run lasts.
        replaced: The earlier run of this name, with ``--overwrite``.
        resumed: The run was there before.
        rank: The process; only the first one of a run holds the lock and writes.
    """

    path: Path
    run_id: str
    lock: RunLock | None
    replaced: ReplacedRun | None = None
    resumed: bool = False
    rank: Rank = field(default_factory=read_rank)

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
        return name_file(self.path / "logs" / "forge.log", self.rank)

    def read_facts(self) -> dict:
        """Reads what ``run.json`` says about the run."""
        return json.loads((self.path / RUN_FILE).read_text(encoding="utf-8"))

    def note_facts(self, **facts: object) -> None:
        """Adds facts to ``run.json``."""
        if not self.rank.is_main:
            return
        text = json.dumps({**self.read_facts(), **facts}, indent=1, ensure_ascii=False)
        write_atomic(self.path / RUN_FILE, text + "\n")

    def settle(self) -> None:
        """Ends the run's claim on its name.

        A run that measured something stays, and the one it replaced goes. One that never began must not hold the
        name: it goes, and the earlier one comes back.
        """
        if self.lock is None:
            return
        try:
            if self.resumed or has_begun(self.path):
                if self.replaced:
                    self.replaced.delete()
                delete_replaced(self.path)
                return
            # Renamed first: where Ctrl-C ends the deletion, half a folder does not hold the name.
            gone = self.path.rename(self.path.with_name(f".{self.path.name}.gone-{os.getpid()}"))
            shutil.rmtree(gone, ignore_errors=True)
            if self.replaced:
                self.replaced.put_back()
        finally:
            self.lock.release()


def has_begun(path: Path) -> bool:
    """Tells whether a run has left anything of worth."""
    names = (METRICS_FILE, "checkpoints/step-*", "adapter*", "model*")
    return any(next(path.glob(name), None) for name in names)


def _is_worthless(path: Path) -> bool:
    """Tells whether a folder is a run that never began."""
    return _is_run(path) and not has_begun(path)


def _is_run(path: Path) -> bool:
    # A process that was killed while it made the folder may have come no further than that.
    bare = {".lock", "logs", PLAN_FILE + PARTIAL_SUFFIX}
    return (path / PLAN_FILE).is_file() or {one.name for one in path.iterdir()} <= bare


def create_run_folder(output_dir: str, name: str | None, stem: str, plan_text: str, *, overwrite: bool) -> RunFolder:
    """Makes the folder of a new run and writes its plan.

    A run without a name takes the name of its file, and the next free number. A named run that exists is refused.

    Args:
        output_dir: Folder that holds all runs.
        name: Name in the run file.
        stem: Name to fall back on.
        plan_text: Content of ``plan.yaml``.
        overwrite: Replace the earlier run of this name (or of the file's), if it is one.

    Raises:
        MachineError: The run exists, or the folder cannot be made.
    """
    root = Path(output_dir).expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as undo:
            with claiming(root):
                name = name or (stem if overwrite else None)
                replaced = _make_way(root / name, overwrite) if name else None
                if replaced:
                    undo.callback(replaced.put_back)
                path = _claim(root, name) if name else _claim_next(root, stem)
                undo.callback(shutil.rmtree, path, ignore_errors=True)
                folder = RunFolder(path, uuid.uuid4().hex, RunLock(path), replaced)
                undo.callback(folder.lock.release)
            folder.log.parent.mkdir(mode=0o700)
            write_atomic(folder.plan, plan_text)
            places = {"path": str(path.resolve()), "started_in": os.getcwd()}
            facts = {"run_id": folder.run_id, "created": datetime.now(UTC).isoformat(), "forge": __version__, **places}
            write_atomic(path / RUN_FILE, json.dumps(facts, indent=1) + "\n")
            undo.pop_all()
    except OSError as error:
        raise MachineError(
            f"the run folder cannot be made: {error.strerror}",
            where=str(error.filename or root),
            fix="set output_dir to a folder you may write to",
        ) from error
    return folder


def open_run_folder(path: Path, *, break_lock: bool = False) -> RunFolder:
    """Takes up the folder of a run that was stopped.

    Args:
        path: The folder.
        break_lock: As for :class:`RunLock`.

    Raises:
        CheckpointError: It is no run of Forge's.
        MachineError: Another process holds it, or it cannot be written.
    """
    run_id = read_run_id(path)
    try:
        lock = RunLock(path, break_lock=break_lock)
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
        kept = list_replaced(path)
        raise CheckpointError(
            f"this is no run folder: it has no {RUN_FILE} that can be read",
            where=str(path),
            why=f"a run of this name was being replaced and is kept in {kept[0]}" if kept else "",
            fix=f"put it back with: forge resume {path}" if kept else "name the folder of a run, as in runs/NAME",
        ) from None


def recover_run(path: Path) -> str:
    """Puts a run back that was moved aside for one that was killed before it began; returns what a user should know.

    Call it before a run is opened.
    """
    if not list_replaced(path):
        return ""
    with contextlib.suppress(OSError), claiming(path.parent):
        if kept := recover_replaced(path, _is_worthless):
            return f"{path.name} is back from {kept.name}: what was to replace it ended before it began"
    return ""


def write_atomic(path: Path, text: str) -> None:
    """Writes a text file so that it is either the old one or the new one, never half."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _make_way(path: Path, overwrite: bool) -> ReplacedRun | None:
    """Moves an earlier run out of the way. A folder without a plan was not made by Forge and is not ours to move."""
    recover_replaced(path, _is_worthless)
    if not (overwrite and path.exists()):
        return None
    if not _is_run(path):
        raise MachineError("--overwrite: this folder is not a run", where=str(path), fix="choose another name")
    return set_aside(path)


def _claim(root: Path, name: str) -> Path:
    path = root / name
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        raise MachineError(
            f"this run exists already{_describe(path)}",
            where=str(path),
            why="its results would be lost",
            fix="use --set name=ANOTHER, --resume to go on with it, or --overwrite to delete it",
        ) from None
    return path


def _describe(path: Path) -> str:
    """Writes which run a folder holds, how far it came and who has it."""
    parts = []
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        facts = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
        parts.append(f"run {facts['run_id'][:8]} of {facts['created'][:16]}")
    saved = CheckpointStore(path / "checkpoints", "").list_paths()
    parts += [f"saved up to {saved[0].name}"] if saved else []
    holder = find_holder(path)
    parts += [f"in use by {holder}"] if holder else []
    return f" ({', '.join(parts)})" if parts else ""


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
