"""Where the data that ships with Forge lies, and where Forge keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def data_root() -> Path:
    """Returns the folder that holds ``configs`` and ``recipes``: in the wheel, else in the checkout."""
    return _PACKAGE / "_data" if (_PACKAGE / "_data").is_dir() else _PACKAGE.parent


def assets_root() -> Path:
    """Returns the folder of the embedded model and its data."""
    return _PACKAGE / "assets"


def cache_root() -> Path:
    """Returns where Forge keeps what can be made again: ``$FORGE_CACHE``, or ``~/.cache/forge``."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("FORGE_CACHE") or f"{home}/forge").expanduser()
