"""One process a run folder: a lock that the kernel frees when its holder dies, however that happens.

Where a disk is shared between machines, the kernel of one may not see the locks of another. So the file also says who
holds it, and its time of change is renewed while it is held: a holder on another host counts until it has been silent
for ten minutes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path

from forge_cli.errors import MachineError

LOCK_FILE = ".lock"
HEARTBEAT_SECONDS = 60.0
SILENT_SECONDS = 600.0
# Disks that know no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class RunLock:
    """Holds a run folder until :meth:`release` or the end of the process.

    Args:
        folder: The run folder.
        break_lock: Take it though a process on another host may still hold it. One on this host that lives is never
            robbed.

    Raises:
        MachineError: Another process holds it; names its pid, host and since when.
        OSError: The file cannot be written.
    """

    def __init__(self, folder: Path, *, break_lock: bool = False) -> None:
        self.path = folder / LOCK_FILE
        self._descriptor: int | None = None
        self._ended = threading.Event()
        if self.path.is_symlink():
            why = "what it points to would be written to"
            raise MachineError("the lock is a symbolic link", where=str(self.path), why=why, fix="remove it")
        while self._descriptor is None:
            self._open(folder, break_lock)
        # A worker process that outlives this one must not hold on to the folder.
        os.register_at_fork(after_in_child=self._close)
        self._write_holder()
        threading.Thread(target=self._beat, name="forge-lock", daemon=True).start()

    def _open(self, folder: Path, break_lock: bool) -> None:
        """Takes the lock; not if the file was replaced meanwhile, as a lock on a deleted file guards nothing."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            is_held = _try_lock(descriptor)
            holder = _read_holder(descriptor)
            age = time.time() - os.fstat(descriptor).st_mtime
            if is_held or (_may_live(holder, age, is_held) and not break_lock):
                raise _refuse(folder, holder, age, is_held)
            if os.path.samestat(os.fstat(descriptor), os.stat(self.path, follow_symlinks=False)):
                self._descriptor, descriptor = descriptor, -1
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _write_holder(self) -> None:
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)

    def _beat(self) -> None:
        """Shows other hosts that this process lives."""
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError, TypeError):
                os.utime(self._descriptor)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def release(self) -> None:
        """Frees the folder."""
        self._ended.set()
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)
            self._close()


def _try_lock(descriptor: int) -> bool | None:
    """Locks an open file; tells whether another process holds it, ``None`` where the disk knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return False


def _read_holder(descriptor: int) -> dict:
    """Reads who wrote the file last and did not let go; empty if nobody did, or nobody can tell."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(os.pread(descriptor, 4096, 0))
        return {"pid": int(found["pid"]), "host": str(found["host"]), "since": float(found["since"])}
    return {}


def _may_live(holder: dict, age_seconds: float, is_held: bool | None) -> bool:
    """Tells whether a holder may live whose lock the kernel does not show."""
    if not holder:
        return False
    if holder["host"] != socket.gethostname():
        return age_seconds < SILENT_SECONDS
    # Where the kernel shows locks, a holder on this host without one is dead, whoever has its number now.
    return is_held is None and holder["pid"] != os.getpid() and Path(f"/proc/{holder['pid']}").exists()


def find_holder(folder: Path) -> str:
    """Names the process that seems to hold a folder, without touching its lock; empty if none does."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            holder, age = _read_holder(descriptor), time.time() - os.fstat(descriptor).st_mtime
        finally:
            os.close(descriptor)
        return _name(holder) if _may_live(holder, age, None) else ""
    return ""


def _name(holder: dict) -> str:
    if not holder:
        return "another process"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
    return f"process {holder['pid']} on {holder['host']} since {since}"


def _refuse(folder: Path, holder: dict, age_seconds: float, is_held: bool | None) -> MachineError:
    fix = "wait for it, stop it, or give this run another name"
    if not is_held and holder["host"] != socket.gethostname():
        left = max(1, round((SILENT_SECONDS - age_seconds) / 60))
        fix = f"if that process is gone, wait {left} minutes, or resume with --break-lock"
    return MachineError(
        f"the run folder is in use by {_name(holder)}",
        where=str(folder),
        why="two processes would write over each other's checkpoints",
        fix=fix,
    )
