"""The run that another one replaces: moved out of the way, and deleted only when the new one has measured something.

A process that is killed in between leaves it under another name; the next command about that run puts it back.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from forge_cli.checkpoints.lock import RunLock
from forge_cli.errors import MachineError


@dataclass(frozen=True)
class ReplacedRun:
    """A run that was moved out of the way.

    Attributes:
        home: Where it was.
        path: Where it is.
        lock: Held as long as it is there, which tells others that its replacement lives.
    """

    home: Path
    path: Path
    lock: RunLock

    def put_back(self) -> None:
        """Gives it its name back."""
        self.path.rename(self.home)
        self.lock.release()

    def delete(self) -> None:
        """Deletes it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.lock.release()


def set_aside(path: Path) -> ReplacedRun:
    """Moves a run out of the way.

    Raises:
        MachineError: Another process trains there.
    """
    lock = RunLock(path)
    try:
        return ReplacedRun(path, path.rename(path.with_name(f".{path.name}.replaced-{os.getpid()}")), lock)
    except OSError:
        lock.release()
        raise


def list_replaced(home: Path) -> list[Path]:
    """Lists what was moved out of the way of a run."""
    return sorted(home.parent.glob(f".{glob.escape(home.name)}.replaced-*"))


def recover_replaced(home: Path, is_worthless: Callable[[Path], bool]) -> Path | None:
    """Puts a run back whose replacement was killed before it began; returns where the run had been kept.

    Args:
        home: Where it belongs.
        is_worthless: Tells whether a folder is a run that never began.
    """
    for aside in list_replaced(home):
        with contextlib.suppress(MachineError, OSError), contextlib.ExitStack() as held:
            held.callback(RunLock(aside).release)  # refused while the run lives that replaces it
            if home.exists() and is_worthless(home):
                held.callback(RunLock(home).release)
                shutil.rmtree(home)
            if not home.exists():
                aside.rename(home)
                return aside
    return None


def delete_replaced(home: Path) -> None:
    """Deletes what a run replaced that has begun since."""
    for aside in list_replaced(home):
        with contextlib.suppress(MachineError, OSError):
            lock = RunLock(aside)
            shutil.rmtree(aside, ignore_errors=True)
            lock.release()


@contextlib.contextmanager
def claiming(root: Path) -> Iterator[None]:
    """Lets one process at a time decide who gets a name; where a disk knows no locks, mkdir alone decides."""
    descriptor = os.open(root, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
