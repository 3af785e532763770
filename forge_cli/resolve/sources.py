"""Which names are files, folders, hub names or shipped with Forge."""

from __future__ import annotations

from pathlib import Path

from forge_cli.paths import assets_root

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".zst")
HUB_PREFIX = "hf://"
EMBEDDED_MODEL = "forge-tiny"
EMBEDDED_PREFIX = "forge:"
_PATH_STARTS = ("./", "../", "/", "~")


def is_data_file(name: str) -> bool:
    """Tells whether a data name means a local file rather than a hub data set; it need not exist."""
    if name.startswith((HUB_PREFIX, EMBEDDED_PREFIX)):
        return False
    plain = name.lower()
    for ending in COMPRESSIONS:
        plain = plain.removesuffix(ending)
    return name.startswith(_PATH_STARTS) or is_glob(name) or plain.endswith(DATA_SUFFIXES)


def is_glob(name: str) -> bool:
    """Tells whether a data name is a pattern for several files."""
    return any(one in name for one in "*?[")


def is_embedded_data(name: str) -> bool:
    """Tells whether a data name means data that ships with Forge (``forge:quickstart/train``)."""
    return name.startswith(EMBEDDED_PREFIX)


def find_embedded_data(name: str) -> Path | None:
    """Returns the file behind ``forge:NAME``; ``None`` if there is none."""
    inner = name.removeprefix(EMBEDDED_PREFIX)
    return next((path for known, path in list_embedded_data().items() if known == inner), None)


def list_embedded_data() -> dict[str, Path]:
    """Returns the data that ships with Forge: name after ``forge:`` to file."""
    root = assets_root()
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.glob("*/*.jsonl"))}


def is_model_folder(name: str) -> bool:
    """Tells whether a model name means a local folder; it exists, or is written like a path."""
    try:
        return name.startswith(_PATH_STARTS) or Path(name).is_dir()
    except (OSError, ValueError):  # Too long for the file system.
        return False
