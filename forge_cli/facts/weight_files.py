"""The weight files of a local folder, judged by their index, sizes and headers: no weight is read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from forge_cli.errors import ModelError

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
# Source: safetensors' own limit, and the sizes of its types in bits.
_MAX_HEADER_BYTES = 100_000_000
_BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16}
_BITS |= {"U16": 16, "I8": 8, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8}
_BITS |= {"F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
_GIT_LFS = b"version https://git-lfs"
_MOST_JSON_BYTES = 64 * 1024 * 1024
_COPY_AGAIN = "copy the file again"

Header = dict[str, dict[str, Any]]


def list_weight_files(folder: Path) -> list[Path]:
    """Lists the files that transformers reads the weights from.

    Raises:
        ModelError: The index names files that are not there.
    """
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    index = folder / INDEX
    if not index.is_file():
        return [file for file in sorted(folder.glob("*.safetensors")) if not file.name.startswith("adapter_")]
    named = read_json_object(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(one, str) and one == Path(one).name for one in named.values()):
        raise _damaged(index, "holds no map from weights to files of this folder")
    shards = sorted(set(named.values()))
    missing = [one for one in shards if not (folder / one).is_file()]
    if missing:
        raise ModelError(
            f"{len(missing)} of {len(shards)} weight files are missing: {', '.join(missing[:5])}",
            where=str(index),
            why="the weights in them would start at random",
            fix="download the missing files into the folder",
        )
    return [folder / one for one in shards]


def read_headers(folder: Path) -> Header:
    """Reads the headers of all weight files of a folder; tensor name to type and shape.

    Raises:
        ModelError: A file is missing, cut off, too long, or not in safetensors format.
    """
    return {name: entry for file in list_weight_files(folder) for name, entry in read_header(file).items()}


def read_header(file: Path) -> Header:
    """Reads the header of a safetensors file (eight bytes of length, then JSON) and compares it with the file's size.

    Raises:
        ModelError: The file is cut off, too long, or something else.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(64)
            _refuse_other_formats(file, start)
            length = int.from_bytes(start[:8], "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise _damaged(file, f"is {size} bytes, its header alone says {8 + length}")
            stream.seek(8)
            text = stream.read(length)
    except OSError as error:
        raise _damaged(file, f"cannot be read ({error.strerror})") from None
    header = _parse_object(text, file)
    header.pop("__metadata__", None)
    wanted = 8 + length + _measure_tensors(header, file)
    if size != wanted:
        raise _damaged(file, f"is {size} bytes, its header says {wanted}")
    return header


def read_json_object(file: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        ModelError: It cannot be read, is far too big, or holds something else.
    """
    try:
        with file.open("rb") as stream:
            text = stream.read(_MOST_JSON_BYTES + 1)
    except OSError as error:
        raise _damaged(file, f"cannot be read ({error.strerror})") from None
    if len(text) > _MOST_JSON_BYTES:
        raise _damaged(file, f"is over {_MOST_JSON_BYTES} bytes")
    _refuse_other_formats(file, text[:64])
    return _parse_object(text, file)


def _parse_object(text: bytes, file: Path) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, json.JSONDecodeError) else "not UTF-8, or nested too deep"
        raise _damaged(file, f"is cut off or not what its name says ({reason})") from None
    if not isinstance(found, dict):
        raise _damaged(file, "holds no mapping")
    return found


def _refuse_other_formats(file: Path, start: bytes) -> None:
    """Refuses what downloads leave in the place of a file."""
    if start.startswith(_GIT_LFS):
        raise ModelError(
            "this is a Git LFS pointer, not the file itself",
            where=str(file),
            why="the repository was cloned without its big files",
            fix="run `git lfs pull` in the folder",
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ModelError(
            "this is a web page, not the file itself",
            where=str(file),
            why="a page with an error or a login was saved under its name",
            fix="download it again with `hf download`",
        )


def _measure_tensors(header: dict[str, Any], file: Path) -> int:
    """Adds up the bytes of all tensors, which have to lie one behind the other."""
    stretches = []
    for name, entry in header.items():
        kind, shape, place = (
            (entry.get(key) for key in ("dtype", "shape", "data_offsets")) if isinstance(entry, dict) else [None] * 3
        )
        if not (kind in _BITS and _holds_counts(shape) and _holds_counts(place) and len(place) == 2):
            raise _damaged(file, f"has no sound entry for {name} in its header")
        if (place[1] - place[0]) * 8 != math.prod(shape) * _BITS[kind]:
            raise _damaged(file, f"gives {name} {place[1] - place[0]} bytes, which its shape and type contradict")
        stretches.append(tuple(place))
    end = 0
    for start, stop in sorted(stretches):
        if start != end:
            raise _damaged(file, "has tensors that overlap, or gaps between them")
        end = stop
    return end


def _holds_counts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, int) and one >= 0 for one in value)


def _damaged(file: Path, what: str) -> ModelError:
    return ModelError(
        f"{file.name} {what}", where=str(file), why="a damaged file gives a damaged model", fix=_COPY_AGAIN
    )
