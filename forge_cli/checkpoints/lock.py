"""One process a run folder: a lock that the kernel frees when its holder dies, however that happens."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from forge_cli.errors import MachineError

LOCK_FILE = ".lock"


class RunLock:
    """Holds a run folder until :meth:`release` or the end of the process.

    Args:
        folder: The run folder.

    Raises:
        MachineError: Another process holds it; names its pid, host and since when.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self._descriptor: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = self._read_holder()
            os.close(self._descriptor)
            self._descriptor = None
            raise MachineError(
                f"the run folder is in use by {holder}",
                where=str(folder),
                why="two processes would write over each other's checkpoints",
                fix="wait for it, stop it, or give this run another name",
            ) from None
        # A worker process that outlives this one must not hold on to the folder.
        os.register_at_fork(after_in_child=self._close)
        self._write_holder()

    def _read_holder(self) -> str:
        with contextlib.suppress(OSError, ValueError, KeyError):
            holder = json.loads(os.pread(self._descriptor, 4096, 0))
            age = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
            return f"process {holder['pid']} on {holder['host']} since {age}"
        return "another process"

    def _write_holder(self) -> None:
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def release(self) -> None:
        """Frees the folder."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, 0)
            self._close()
