"""Where the data that ships with Forge lies, in a wheel and in a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def data_root() -> Path:
    """Returns the folder that holds ``configs`` and ``recipes``: in the wheel, else in the checkout."""
    return _PACKAGE / "_data" if (_PACKAGE / "_data").is_dir() else _PACKAGE.parent


def assets_root() -> Path:
    """Returns the folder of the embedded model and its data."""
    return _PACKAGE / "assets"
