"""Files that ship with Forge and carry their summary in the first line: presets and recipes."""

from __future__ import annotations

import os

from forge_cli.errors import ConfigError
from forge_cli.paths import data_root


def list_shelf(folder: str, suffixes: tuple[str, ...] = (".yaml",)) -> list[tuple[str, str, str]]:
    """Lists the files of a folder below ``data_root`` as (name, summary, path).

    The summary is the first line, without comment or docstring marks; no YAML is parsed, so listing is quick.
    """
    root = os.path.join(data_root(), folder)
    rows = []
    for file in sorted(os.listdir(root)) if os.path.isdir(root) else ():
        stem, suffix = os.path.splitext(file)
        if suffix in suffixes:
            path = os.path.join(root, file)
            with open(path, encoding="utf-8") as stream:
                summary = stream.readline().strip().lstrip("#").strip('" ').rstrip(".")
            rows.append((stem, summary, path))
    return rows


def find_on_shelf(folder: str, name: str, suffixes: tuple[str, ...] = (".yaml",)) -> str:
    """Returns the path of one file by its name, with or without the suffix.

    Raises:
        ConfigError: There is no such file.
    """
    rows = list_shelf(folder, suffixes)
    for stem, _, path in rows:
        if name in (stem, os.path.basename(path)):
            return path
    import difflib

    kind = os.path.basename(folder)
    near = difflib.get_close_matches(name, [stem for stem, _, _ in rows], n=2, cutoff=0.5)
    raise ConfigError(
        f"there is no {kind.removesuffix('s')} named {name}",
        where=f"forge {kind}",
        fix=f"did you mean {' or '.join(near)}?" if near else f"type `forge {kind} list` for the names",
    )
