"""Room on a disk: what a save needs, what is free, and what to say when it does not fit."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from forge_cli.units import format_bytes

# No room, over quota, read-only, over the size limit of a file, broken.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


def count_free_bytes(path: Path) -> int:
    """Returns what this user may still write to the disk that holds a folder, or will hold it."""
    while not path.exists():
        path = path.parent
    stat = os.statvfs(path)
    return stat.f_bavail * stat.f_frsize


def describe_shortage(needed_bytes: int, path: Path, reason: str = "") -> str:
    """Writes needed and free bytes, as for an error."""
    needed, free = format_bytes(needed_bytes), format_bytes(count_free_bytes(path))
    return f"{reason + '; ' if reason else ''}it needs {needed} ({needed_bytes} bytes), and {free} are free"
