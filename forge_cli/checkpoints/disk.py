"""Room on a disk: what a save needs, what is free, and what to say when it does not fit."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from forge_cli.units import format_bytes

# No room, over quota, over the size limit of a file, broken; no longer ours to write; a server that is gone.
DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ENODEV, errno.ENXIO),
)


def count_free_bytes(path: Path) -> int:
    """Returns what this user may still write to the disk that holds a folder, or will hold it; 0 if it is gone."""
    while not path.exists():
        path = path.parent
    try:
        stat = os.statvfs(path)
    except OSError:
        return 0
    # Some disks on a network do not know their size.
    return stat.f_bavail * stat.f_frsize if stat.f_blocks else sys.maxsize


def describe_shortage(needed_bytes: int, path: Path, reason: str = "") -> str:
    """Writes needed and free bytes, as for an error."""
    needed, free = format_bytes(needed_bytes), format_bytes(count_free_bytes(path))
    return f"{reason + '; ' if reason else ''}it needs {needed} ({needed_bytes} bytes), and {free} are free"
