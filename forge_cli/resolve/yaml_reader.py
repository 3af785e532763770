"""YAML text to plain data, with the place of every key.

Built on PyYAML's events: its constructors would run tags, resolve YAML 1.1 booleans and expand aliases without
bound. Size, depth and the number of values are checked before anything is built.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from forge_cli.errors import ConfigError, Problem
from forge_cli.resolve.wording import printable, show
from forge_cli.resolve.yaml_builder import Builder, KeyPath, Position

if TYPE_CHECKING:
    import re

__all__ = ["MAX_BYTES", "Document", "KeyPath", "Position", "parse_value", "read_yaml", "read_yaml_text"]

MAX_BYTES = 1_000_000
_FORBIDDEN = "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]"


@dataclass
class Document:
    """A YAML file as read.

    Attributes:
        file: Its name, as the user wrote it.
        data: What it says. Values that could not be read hold their text, and are in ``broken``.
        positions: Where every key stands, and every item of a list. Settings behind an alias have no entry.
        problems: What is wrong with it but did not keep the rest from being read.
        broken: Paths of the values that ``problems`` is about.
    """

    file: str
    data: dict
    positions: dict[KeyPath, Position]
    problems: list[Problem] = field(default_factory=list)
    broken: set[KeyPath] = field(default_factory=set)

    def where(self, path: KeyPath) -> str:
        """Returns ``file:line:column`` of a path, or of its nearest ancestor that has a place."""
        while path and path not in self.positions:
            path = path[:-1]
        position = self.positions.get(path)
        return f"{self.file}:{position.line}:{position.column}" if position else self.file


def read_yaml(path: Path) -> Document:
    """Reads a YAML file.

    Args:
        path: A regular file of at most 1 MB.

    Returns:
        The document; faults that did not stop the reading are in its ``problems``.

    Raises:
        ConfigError: The file cannot be read, or its text is not YAML.
    """
    file = printable(str(path))
    if path.suffix in (".jsonl", ".csv", ".parquet", ".arrow") and path.is_file():
        raise ConfigError("these are rows, not a run file", where=file, fix=f"write one with: forge init --data {file}")
    return read_yaml_text(read_bytes(path, file), file)


def read_bytes(path: Path, file: str) -> bytes:
    """Reads a regular file of at most ``MAX_BYTES``; refuses folders, pipes and devices."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ConfigError("this is a folder", where=file, fix="name the YAML file inside it")
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError("this is a pipe or a device", where=file, fix="only regular files are read")
        if status.st_size > MAX_BYTES:
            raise _too_big(file, status.st_size)
        with path.open("rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError("no such file", where=file, fix=_near_file(path)) from None
    except ValueError:
        raise ConfigError("a file name cannot hold a NUL character", where=file) from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=file) from None


def _near_file(path: Path) -> str:
    from forge_cli.resolve.nearness import find_near_file

    near = find_near_file(path)
    if not near and path.name == "run.yaml":
        return "write one with: forge init"
    return f"did you mean {near}?" if near else "check the path; it is taken relative to the working directory"


def _too_big(file: str, size_bytes: int) -> ConfigError:
    return ConfigError(
        f"the file has {size_bytes} bytes; a run file has at most {MAX_BYTES}", where=file, fix="is it a data file?"
    )


def read_yaml_text(text: str | bytes, file: str) -> Document:
    """Reads a YAML mapping from text; see :func:`read_yaml`."""
    builder = Builder(_decode(text, file), file)
    data = builder.build_root()
    if not isinstance(data, dict):
        raise ConfigError.from_problems([*builder.problems, _root_problem(data, file)])
    return Document(file, data, builder.positions, builder.problems, builder.broken)


def parse_value(text: str) -> object:
    """Reads the value of ``--set path=value``: the same words and brackets as in a file.

    Raises:
        ConfigError: The text is not a YAML value, or a word that needs quotes.
    """
    document = read_value(text, "--set")
    if document.problems:
        raise ConfigError.from_problems(document.problems)
    return document.data["value"]


def read_value(text: str, file: str) -> Document:
    """Reads one value of any type, as ``{"value": ...}``, with problems collected."""
    builder = Builder(_decode(text, file), file, root=("value",))
    value = builder.build_root()
    return Document(file, {"value": value}, {}, [_without_place(one, file) for one in builder.problems], builder.broken)


def _without_place(problem: Problem, file: str) -> Problem:
    return Problem(file, problem.path.removeprefix("value"), problem.what, problem.why, problem.fix)


def _decode(text: str | bytes, file: str) -> str:
    """Turns bytes into text: UTF-8 with or without a byte order mark, and nothing unprintable."""
    if isinstance(text, bytes):
        if len(text) > MAX_BYTES:
            raise _too_big(file, len(text))
        if text[:2] in (b"\xff\xfe", b"\xfe\xff") or (text[:1] and b"\0" in text[:2]):
            raise ConfigError("the file is UTF-16 text", where=f"{file}:1:1", fix="save it as UTF-8")
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            place = _place_after(text[: error.start].decode(), file)
            what = f"byte 0x{error.object[error.start]:02x} (number {error.start}) is not UTF-8 text"
            raise ConfigError(what, where=place, fix="save the file as UTF-8") from None
    elif len(text) > MAX_BYTES:
        raise _too_big(file, len(text))
    # Almost every file passes the cheap test, which also fails on tabs and the like.
    if not text.replace("\n", "").isprintable() and (match := _find_forbidden(text)):
        offset = len(text[: match.start()].encode(errors="surrogatepass"))
        what = f"control character U+{ord(match.group()):04X} (byte {offset})"
        place = _place_after(text[: match.start()], file)
        raise ConfigError(what, where=place, fix="remove it, or write it as an escape in quotes")
    return text.removeprefix("\ufeff")


def _place_after(before: str, file: str) -> str:
    return f"{file}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"


def _find_forbidden(text: str) -> re.Match[str] | None:
    import re

    return re.search(_FORBIDDEN, text)


def _root_problem(data: object, file: str) -> Problem:
    """Says what stands at the top of a file instead of settings."""
    where = f"{file}:1:1"
    if data is None:
        return Problem(where, "", "the file is empty or holds comments only", fix="write at least model: and data:")
    if isinstance(data, list):
        return Problem(where, "", "the file holds a list", fix="write settings (key: value), without the dashes")
    if isinstance(data, str) and ":" in data and " " not in data:
        return Problem(where, "", f"the file holds one word, {show(data)}", fix="put a space after the colon")
    return Problem(where, "", f"the file holds one value, {show(data)}", fix="write settings: key: value")
