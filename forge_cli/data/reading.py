"""Finds the files of a source and reads their rows, whatever their format."""

from __future__ import annotations

import difflib
import glob
import hashlib
import re
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from forge_cli.data.read_columns import read_columns
from forge_cli.data.read_hub import fingerprint_hub, is_hub_name, read_hub
from forge_cli.data.read_json import read_json
from forge_cli.data.read_row import BadRow, DataFile, Row, describe_place
from forge_cli.data.read_text import open_text, read_csv, read_jsonl, read_tsv, read_txt
from forge_cli.errors import DataError, MachineError
from forge_cli.resolve.nearness import find_near_file
from forge_cli.resolve.sources import (
    COMPRESSIONS,
    DATA_SUFFIXES,
    HUB_PREFIX,
    find_embedded_data,
    is_data_file,
    is_embedded_data,
    is_glob,
    list_embedded_data,
)
from forge_cli.resolve.wording import printable

__all__ = ["BadRow", "DataFile", "Row", "describe_place", "find_files", "fingerprint_file", "read_file"]

_READERS = {"jsonl": read_jsonl, "json": read_json, "csv": read_csv, "tsv": read_tsv, "txt": read_txt}
_KNOWN = f"{', '.join(DATA_SUFFIXES)}, and {' or '.join(COMPRESSIONS)} behind the name of a text file"
_ENDING = re.compile(f"({'|'.join(map(re.escape, DATA_SUFFIXES))})({'|'.join(map(re.escape, COMPRESSIONS))})?$", re.I)
_CUT = "the file seems cut off or damaged; copy or write it again"
# How files begin that are not what their name says.
_POINTER = (b"version https://git-lfs", "a Git LFS pointer and not the data", "run git lfs pull")
_FOREIGN = (
    _POINTER,
    (b"\x1f\x8b", "packed by gzip", "add .gz to its name"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd", "add .zst to its name"),
    (b"PAR1", "a Parquet file", "call it .parquet"),
    (b"ARROW1", "an Arrow file", "call it .arrow"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet", "unpack it, or save it as .csv"),
    (b"\xff\xfe", "UTF-16", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16", "save it as UTF-8"),
)


def find_files(path: str) -> list[DataFile]:
    """Finds the files that the path of a source names; those of a pattern in natural order (``2`` before ``10``).

    ``hf://`` always means the hub. What is written without it is a file or a folder if there is one.

    Raises:
        DataError: There is no such file, it is of no known kind, or a folder or a device; names what is near.
        MachineError: A name of the hub is also a folder, or the file system refuses to be read.
    """
    try:
        return _find(path)
    except PermissionError as error:
        raise MachineError("may not be read", where=printable(path), fix="ask for the right to read it") from error
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"not the name of a file: {reason}", where=printable(path)) from error


def read_file(file: DataFile, split: str = "train") -> Iterator[Row | BadRow]:
    """Reads rows in their order, with bounded memory; ``split`` counts for the hub only.

    A row that cannot be read is yielded as a ``BadRow`` and reading goes on. An empty file has no rows.

    Raises:
        DataError: The file is cut off, damaged or of another format, so that no more rows can be told apart.
        MachineError: The machine cannot read it.
    """
    if file.path is None:
        yield from read_hub(file.name, split)
        return
    try:
        _check_start(file)
        if file.kind in ("parquet", "arrow"):
            yield from read_columns(file.path, file.name)
        else:
            with open_text(file.path) as stream:
                yield from _READERS[file.kind](stream, file.name)
    except (OSError, EOFError, zlib.error) as error:
        # What a system call says has a number; what a reader of packed files says has none.
        if isinstance(error, OSError) and error.errno:
            raise MachineError(f"cannot be read: {error.strerror}", where=file.name) from error
        raise DataError(f"cannot be unpacked: {printable(str(error))}", where=file.name, fix=_CUT) from error


def fingerprint_file(file: DataFile, split: str) -> str:
    """Returns a hex digest of a file's bytes; of a hub data set, of its commit and split."""
    if file.path is None:
        return fingerprint_hub(file.name, split)
    try:
        with file.path.open("rb") as stream:
            return hashlib.file_digest(stream, "blake2b").hexdigest()
    except OSError as error:
        raise MachineError(f"cannot be read: {error.strerror}", where=file.name) from error


def _find(path: str) -> list[DataFile]:
    if is_embedded_data(path):
        known = ", ".join(f"forge:{one}" for one in list_embedded_data())
        local = find_embedded_data(path) or _refuse(path, "no such file", f"known: {known}")
        return [DataFile(path, local, "jsonl")]
    if path.startswith(HUB_PREFIX):
        if not is_hub_name(path):
            _refuse(path, "not the name of a data set", "write hf://org/name[/subset][@revision]")
        return [DataFile(path, None, "hub")]
    local = Path(path).expanduser()
    if local.is_dir():
        _refuse_folder(path, local)
    if local.exists():
        return [_build_file(path, local)]
    if is_glob(path):
        return _expand(path, local)
    near = find_near_file(local)
    if is_hub_name(path) and not is_data_file(path) and not near:
        return [DataFile(path, None, "hub")]
    fix = f"did you mean {printable(near)}?" if near else f"paths start at {printable(str(Path.cwd()))}"
    hub = f" A data set of the hub is written hf://{path}" if is_hub_name(path) else ""
    _refuse(path, "no such file", fix + hub)


def _build_file(name: str, path: Path) -> DataFile:
    """Tells the kind of a file that exists."""
    if not stat.S_ISREG(path.stat().st_mode):
        _refuse(name, "not a regular file", "name the file with the rows")
    plain = Path(path.name.lower())
    packed = plain.suffix in COMPRESSIONS
    suffix = plain.with_suffix("").suffix if packed else plain.suffix
    if suffix not in DATA_SUFFIXES or (packed and suffix in (".parquet", ".arrow")):
        shown = printable("".join(plain.suffixes[-1 - packed :])) or "no suffix"
        _refuse(name, f"{shown} is not a known format", f"use {_KNOWN}")
    return DataFile(name, path, "jsonl" if suffix == ".ndjson" else suffix[1:])


def _expand(pattern: str, local: Path) -> list[DataFile]:
    names = sorted(glob.glob(str(local), recursive=True), key=_order_naturally)
    files = [_build_file(name, Path(name)) for name in names if not Path(name).is_dir()]
    if files:
        return files
    folder = next(parent for parent in local.parents if not is_glob(str(parent)))
    if not folder.is_dir():
        _refuse(pattern, "no file matches", f"there is no folder {printable(str(folder))}")
    near = difflib.get_close_matches(local.name, [one.name for one in folder.iterdir()], n=3, cutoff=0.0)
    holds = printable(", ".join(near)) or "nothing"
    _refuse(pattern, "no file matches", f"{printable(str(folder))} holds {holds}")


def _order_naturally(name: str) -> tuple[list[tuple[int, str]], str]:
    """Orders ``2`` before ``10``, and ``02`` before ``2``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)], name


def _refuse_folder(path: str, folder: Path) -> NoReturn:
    names = sorted((one.name for one in folder.iterdir()), key=_order_naturally)
    endings = Counter(found[0] for name in names if (found := _ENDING.search(name)))
    files = f"{path.rstrip('/')}/*{max(endings, key=endings.get, default='.jsonl')}"
    if is_hub_name(path):
        fix = f"write ./{files} for the files of the folder, or hf://{path} for the hub"
        raise MachineError("ambiguous: a folder, and a name of the hub", where=printable(path), fix=printable(fix))
    script = next((name for name in names if name.endswith(".py")), None)
    what = f"a folder with the script {printable(script)}; scripts are never run" if script else "a folder"
    _refuse(path, what, f"name its files: {printable(files)}")


def _refuse(name: str, what: str, fix: str) -> NoReturn:
    raise DataError(what, where=printable(name), fix=fix)


def _check_start(file: DataFile) -> None:
    """Refuses a file that begins like one of another kind."""
    packed = file.path.suffix.lower() in COMPRESSIONS
    with file.path.open("rb") as stream:
        start = stream.read(64)
    if packed and not start:
        raise DataError("an empty file is not packed", where=file.name, fix=_CUT)
    for begins, what, fix in (_POINTER,) if packed or file.kind in ("parquet", "arrow") else _FOREIGN:
        if start.startswith(begins):
            raise DataError(f"the file is {what}", where=file.name, fix=fix)
