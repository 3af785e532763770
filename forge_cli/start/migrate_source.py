"""A training file of another tool: read with Forge's own reader, cut into its keys, and recognised."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from forge_cli.errors import ConfigError
from forge_cli.paths import data_root
from forge_cli.resolve.wording import printable
from forge_cli.resolve.yaml_reader import Document, KeyPath, read_yaml

TOOLS = ("axolotl", "llama-factory", "trl", "torchtune")
_YES, _NO = ("y", "yes", "on"), ("n", "no", "off")
_REFERENCE = re.compile(r"\$\{([\w.]+)\}")
_MOST_CHARACTERS = 1000  # of a text in which ${...} is replaced, and of what replaces it


class Source(NamedTuple):
    """A file of another tool.

    Attributes:
        document: As Forge's reader gives it, which knows the places.
        data: What it says, with YAML 1.1's booleans and empty values read as its own tool does.
        leaves: Every key that has a value of its own: path to value.
    """

    document: Document
    data: dict
    leaves: dict[KeyPath, object]

    def where(self, key: KeyPath) -> str:
        """Returns ``file:line:column`` of a key."""
        return self.document.where(key)


def read_source(path: Path) -> Source:
    """Reads the file.

    Raises:
        ConfigError: It cannot be read, or holds what no reader should guess at.
    """
    document = read_yaml(path)
    problems = [one for one in document.problems if not _is_habit(one.what)]
    if problems:
        raise ConfigError.from_problems(problems)
    data = _clean(document.data, (), document)
    plain = {".".join(map(str, key)): value for key, value in _iterate_leaves(data, ())}
    leaves = {key: _fill_in(value, plain) for key, value in _iterate_leaves(data, ())}
    return Source(document, data, leaves)


def _is_habit(what: str) -> bool:
    """Tells whether a fault is none in other tools' files: an empty value is null there, and yes is true."""
    return what == "there is no value" or ("to some YAML readers and" in what and not what.startswith("as a key"))


def _clean(value: object, path: KeyPath, document: Document) -> object:
    if isinstance(value, dict):
        return {key: _clean(one, (*path, key), document) for key, one in value.items()}
    if isinstance(value, list):
        return [_clean(one, (*path, index), document) for index, one in enumerate(value)]
    if path not in document.broken or not isinstance(value, str):
        return value
    if value.lower() in (*_YES, *_NO):
        return value.lower() in _YES
    return value or None


def _iterate_leaves(value: object, path: KeyPath) -> Iterator[tuple[KeyPath, object]]:
    if isinstance(value, dict) and (value or not path):
        for key, one in value.items():
            yield from _iterate_leaves(one, (*path, key))
    elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
        for index, one in enumerate(value):
            yield from _iterate_leaves(one, (*path, index))
    else:
        yield path, value


def _fill_in(value: object, plain: dict[str, object]) -> object:
    """Puts what ``${a.b}`` names in its place, one level deep."""
    if not isinstance(value, str) or "${" not in value or len(value) > _MOST_CHARACTERS:
        return value

    def find(match: re.Match[str]) -> str:
        found = plain.get(match.group(1))
        short = isinstance(found, (str, int, float)) and len(str(found)) <= _MOST_CHARACTERS
        return str(found) if short else match.group()

    return _REFERENCE.sub(find, value, count=10)


def show_key(key: KeyPath) -> str:
    """Writes a key as people do: ``datasets[0].path``."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in key]
    return printable("".join(parts).removeprefix("."))


def plain_name(key: KeyPath) -> str:
    """Returns the name a table knows a key by: dotted, without places in lists, ``_`` for ``-``."""
    return ".".join(part.replace("-", "_") for part in key if isinstance(part, str))


def load_table(name: str) -> dict:
    """Reads one file of ``configs/migrate``."""
    return read_yaml(data_root() / "configs" / "migrate" / f"{name}.yaml").data


def recognise(source: Source) -> tuple[str, str]:
    """Finds the tool a file was written for.

    Returns:
        Its name among ``TOOLS``, and the keys that tell.

    Raises:
        ConfigError: It may be of two tools, of none, or a run file already.
    """
    file, names = source.document.file, {plain_name(key) for key in source.leaves}
    names |= {name.split(".")[0] for name in names}
    if {"model.name", "data.train"} <= names:
        raise ConfigError("this is a run file of Forge already", where=file, fix=f"type `forge train {file}`")
    if any(name.endswith("_component_") for name in names):
        return "torchtune", "_component_"
    found = {tool: [mark for mark in load_table(tool)["marks"] if mark in names] for tool in TOOLS}
    first, second = sorted(TOOLS, key=lambda tool: len(found[tool]), reverse=True)[:2]
    if len(found[first]) <= 2 * len(found[second]):
        seen = "; ".join(f"{load_table(tool)['name']}: {', '.join(found[tool])}" for tool in TOOLS if found[tool])
        what = "this may be a file of more than one tool" if seen else "no key tells which tool this file is for"
        raise ConfigError(what, where=file, why=seen, fix=f"name the tool: --from {'|'.join(TOOLS)}")
    shown = ", ".join(found[first][:6])
    return first, shown if len(found[first]) <= 6 else f"{shown} and {len(found[first]) - 6} more"
