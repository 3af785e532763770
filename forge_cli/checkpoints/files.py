"""Files of a checkpoint: hashed while they are written, forced to the disk, listed in a manifest that comes last.

A safetensors file is written tensor by tensor: the library's own writer wants all of it in memory at once and hashes
nothing. What is written here is read with the library.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from forge_cli import faults

MANIFEST_FILE = "MANIFEST.json"
FORMAT = 1
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class TensorBytes:
    """One tensor to write.

    Attributes:
        name: Its name.
        dtype: Format in the words of safetensors (``F32``, ``BF16``, ``U8``, ...).
        shape: Its shape.
        num_bytes: Its size.
        read: Returns its bytes; called when it is written.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    read: Callable[[], memoryview]


# File name -> its text, or the tensors of a safetensors file.
Content = dict[str, bytes | Sequence[TensorBytes]]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of, and where it belongs.

    Attributes:
        step: Optimizer steps done.
        run_id: Run that wrote it.
        sequence: Counts the checkpoints of a run; tells two of the same step apart.
        files: File name to ``{"bytes": ..., "sha256": ...}``.
        num_tensors: Tensors in all files.
        world_size: Processes of the run.
        plan_digest: Digest of the plan.
        data_fingerprint: Fingerprint of the rows.
        versions: Package to version.
        eval_loss: Latest held-out loss; ``None`` without one.
        parent: Digest of the manifest before this one; empty for the first.
        format: Version of this layout.
    """

    step: int
    run_id: str
    sequence: int
    files: dict[str, dict[str, object]]
    num_tensors: int = 0
    world_size: int = 1
    plan_digest: str = ""
    data_fingerprint: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    eval_loss: float | None = None
    parent: str = ""
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """SHA-256 of the content, which the file carries beside it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(int(entry["bytes"]) for entry in self.files.values())

    def dump(self) -> bytes:
        """Writes it as JSON, with its digest."""
        return (json.dumps({**asdict(self), "digest": self.digest}, indent=1, sort_keys=True) + "\n").encode()


class ManifestError(ValueError):
    """A manifest cannot be used; the text says why."""


def parse_manifest(text: bytes) -> Manifest:
    """Reads what :meth:`Manifest.dump` wrote.

    Raises:
        ManifestError: It is damaged, was edited, or is of a later format.
    """
    try:
        values = json.loads(text)
        digest = values.pop("digest")
        if values.get("format") != FORMAT:
            raise ManifestError(f"has format {values.get('format')!r}; this Forge reads format {FORMAT}")
        manifest = Manifest(**values)
        if not isinstance(manifest.step, int) or manifest.digest != digest or manifest.dump() != text:
            raise ManifestError("was changed after it was written")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError("is damaged") from None
    return manifest


class HashedFile:
    """A new file whose SHA-256 is known when it is closed, and which is on the disk then."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0
        self._digest = hashlib.sha256()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK_BYTES):
            chunk = view[start : start + _CHUNK_BYTES]
            self._digest.update(chunk)
            while chunk:
                chunk = chunk[os.write(self._descriptor, chunk) :]
        self.num_bytes += len(view)

    def close(self, *, sync: bool = True) -> dict[str, object]:
        """Forces the file to the disk; returns its entry in the manifest."""
        try:
            if sync:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)
        return {"bytes": self.num_bytes, "sha256": self._digest.hexdigest()}


def count_content(content: Content) -> int:
    """Returns about how many bytes the files of a checkpoint take."""
    sizes = (len(what) if isinstance(what, bytes) else sum(one.num_bytes for one in what) for what in content.values())
    return sum(sizes)


def write_content(folder: Path, content: Content, step: int) -> dict[str, dict[str, object]]:
    """Writes the files of a checkpoint into an empty folder; returns their entries in the manifest.

    Raises:
        OSError: The disk is full, or cannot be written.
    """
    entries = {}
    for name, what in content.items():
        file = HashedFile(folder / name)
        try:
            faults.reach(f"save:{name}:begin", step)
            _write_half(file, what, lambda name=name: faults.reach(f"save:{name}", step))
        except BaseException:
            file.close(sync=False)
            raise
        entries[name] = file.close()
        faults.reach(f"save:{name}:end", step)
    return entries


def _write_half(file: HashedFile, what: bytes | Sequence[TensorBytes], in_the_middle: Callable[[], object]) -> None:
    """Writes one file, with a place for faults when half of it is written."""
    if isinstance(what, bytes):
        file.write(what[: len(what) // 2])
        in_the_middle()
        file.write(what[len(what) // 2 :])
        return
    file.write(dump_header(what))
    for number, tensor in enumerate(what):
        if number == len(what) // 2:
            in_the_middle()
        file.write(tensor.read())


def dump_header(tensors: Iterable[TensorBytes]) -> bytes:
    """Returns the head of a safetensors file: its length, and where each tensor lies (source: safetensors' README)."""
    header, offset = {}, 0
    for tensor in tensors:
        ends = [offset, offset + tensor.num_bytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": ends}
        offset += tensor.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a regular file.

    Raises:
        OSError: It cannot be read, or is a link.
    """
    digest = hashlib.sha256()
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Forces the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
