"""Tokens on disk: one folder per fingerprint, whole or absent, checked before it is used."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TextIO

from forge_cli.data.outcomes import Columns, Question
from forge_cli.data.repeats import RowDigests
from forge_cli.data.report import count_tokens
from forge_cli.errors import MachineError
from forge_cli.paths import cache_root
from forge_cli.units import MIB, format_bytes

MANIFEST = "manifest.json"
QUESTIONS = "questions.jsonl"
_BATCH_ROWS = 1000
_BATCH_BYTES = 4 * MIB
# Of a row, besides its tokens: its number, its length, and where its lists begin.
_NUMBERS_BYTES = 24


class SplitWriter:
    """Writes the rows of one split as an Arrow stream, a thousand or 4 MiB at a time.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size_bytes = 0
        self._rows: list[Columns] = []
        self._held_bytes = 0
        self._writer = None
        self._file = None

    def add(self, columns: Columns, number: int, copies: int) -> None:
        """Adds a row, so many times."""
        row = {**columns, "row": number, "length": count_tokens(columns)}
        tokens = [one for one in columns.values() if isinstance(one, array)]
        size_bytes = copies * (_NUMBERS_BYTES + sum(one.itemsize * len(one) for one in tokens))
        self.size_bytes += size_bytes
        self._held_bytes += size_bytes
        self._rows.extend([row] * copies)
        if len(self._rows) >= _BATCH_ROWS or self._held_bytes >= _BATCH_BYTES:
            self._flush()

    def close(self) -> None:
        """Writes what is left; a second call does nothing."""
        self._flush()
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _flush(self) -> None:
        if not self._rows:
            return
        import pyarrow as pa

        batch = pa.RecordBatch.from_pydict(
            {name: _build_column([r[name] for r in self._rows]) for name in self._rows[0]}
        )
        if self._writer is None:
            self._file = self.path.open("wb")
            self._writer = pa.ipc.new_stream(self._file, batch.schema)
        self._writer.write_batch(batch)
        self._rows, self._held_bytes = [], 0


def _build_column(values: list):
    """Builds an Arrow column of numbers, or of lists of token ids."""
    import numpy as np
    import pyarrow as pa

    if isinstance(values[0], (bool, int)):
        return pa.array(values)
    offsets = np.zeros(len(values) + 1, dtype=np.int32)
    np.cumsum([len(one) for one in values], out=offsets[1:])
    joined = np.frombuffer(b"".join(one.tobytes() for one in values), dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(joined))


class TokenFolder:
    """The tokens of one fingerprint, while they are written.

    Args:
        fingerprint: Of rows, tokenizer, template and settings.
        input_bytes: Size of the files they are made from, for the report.
    """

    def __init__(self, fingerprint: str, input_bytes: int) -> None:
        self.path = cache_root() / "tokens" / fingerprint
        self.partial = self.path.with_name(f".{fingerprint[:16]}.partial-{os.getpid()}")
        self.fingerprint = fingerprint
        self.input_bytes = input_bytes
        self.num_rows = self.rows_done = 0
        self.writers: dict[str, SplitWriter] = {}
        self._digests: list[RowDigests] = []
        self._questions: TextIO | None = None

    def __enter__(self) -> TokenFolder:
        try:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            for left in self.partial.parent.glob(".*.partial-*"):
                if not _is_running(int(left.name.rpartition("-")[2])):
                    shutil.rmtree(left, ignore_errors=True)
        except OSError as error:
            raise self._explain(error) from error
        return self

    def __exit__(self, kind, error, trace) -> None:
        for writer in self.writers.values():
            with contextlib.suppress(OSError):
                writer.close()
        for file in (*self._digests, self._questions):
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()
        if isinstance(error, OSError):
            written = sum(one.stat().st_size for one in self.partial.rglob("*") if one.is_file())
            shutil.rmtree(self.partial, ignore_errors=True)
            raise self._explain(error, written) from error
        shutil.rmtree(self.partial, ignore_errors=True)

    def open_split(self, name: str) -> SplitWriter:
        """Opens the file of a split."""
        self.writers[name] = SplitWriter(self.partial / f"{name}.arrow")
        return self.writers[name]

    def open_digests(self) -> RowDigests:
        """Opens a file beside the tokens that is gone when they are whole."""
        self._digests.append(RowDigests(self.partial))
        return self._digests[-1]

    def add_question(self, question: Question) -> None:
        """Adds a question; they are written as they come, as there may be as many as evaluation rows."""
        if self._questions is None:
            self._questions = (self.partial / QUESTIONS).open("w", encoding="utf-8")
        self._questions.write(json.dumps(question) + "\n")

    def commit(self, report: Mapping[str, object]) -> Path:
        """Closes all files, writes the manifest last and gives the folder its name."""
        for writer in self.writers.values():
            writer.close()
        for file in (*self._digests, self._questions):
            if file is not None:
                file.close()
        files = {one.name: _digest(one) for one in sorted(self.partial.iterdir())}
        manifest = {"fingerprint": self.fingerprint, "files": files, "report": report}
        with (self.partial / MANIFEST).open("w", encoding="utf-8") as file:
            file.write(json.dumps({**manifest, "digest": _digest_manifest(manifest)}, indent=1))
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(self.path, ignore_errors=True)
        try:
            self.partial.rename(self.path)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            # Another run made the same tokens at the same time.
        return self.path

    def _explain(self, error: OSError, written_bytes: int = 0) -> MachineError:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return MachineError(
                f"tokens cannot be written: {error.strerror}", where=str(self.path.parent), fix=_ELSEWHERE
            )
        added_bytes = sum(one.size_bytes for one in (*self.writers.values(), *self._digests))
        needed_bytes = added_bytes * self.num_rows // max(self.rows_done, 1)
        needed = format_bytes(needed_bytes)
        if error.errno != errno.ENOSPC:
            return MachineError(
                f"the system lets no more tokens be written ({error.strerror}): they need about {needed}, "
                f"and {format_bytes(written_bytes)} were written",
                where=str(self.path.parent),
                fix="raise the quota or `ulimit -f`; or " + _ELSEWHERE,
            )
        free_bytes = written_bytes + shutil.disk_usage(next(one for one in self.path.parents if one.exists())).free
        free = format_bytes(free_bytes)
        size = f"about {needed}, and {free} are free"
        if needed_bytes <= free_bytes:
            size = f"more than the {free} that are free"
        return MachineError(
            f"the disk is full: the tokens need {size}",
            where=str(self.path.parent),
            why="the tokens of all rows are kept on disk, so that memory does not have to hold them",
            fix=_ELSEWHERE + ", or write data.streaming: true",
        )


def _is_running(pid: int) -> bool:
    """Tells whether the process that writes a folder is there; a killed one leaves it behind."""
    if os.name == "nt":
        return True  # there, the signal 0 is Ctrl-C
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


_ELSEWHERE = "set FORGE_CACHE to a folder on another disk"


def find_tokens(fingerprint: str) -> tuple[Path | None, dict, str]:
    """Finds tokens that were made before.

    Returns:
        Their folder and their manifest, or ``None`` and why they are not used; both empty if there are none.
    """
    path = cache_root() / "tokens" / fingerprint
    if not path.is_dir():
        return None, {}, ""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["fingerprint"] != fingerprint:
            return None, {}, "they belong to other rows"
        if manifest.pop("digest") != _digest_manifest(manifest):
            return None, {}, f"{MANIFEST} is damaged"
        for name, digest in manifest["files"].items():
            if _digest(path / name) != digest:
                return None, {}, f"{name} is damaged"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, {}, f"they are damaged ({type(error).__name__})"
    return path, manifest, ""


def iterate_questions(path: Path) -> Iterator[Question]:
    """Yields the questions of a folder of tokens."""
    if (path / QUESTIONS).exists():
        with (path / QUESTIONS).open(encoding="utf-8") as file:
            for line in file:
                yield Question(*json.loads(line))


def _digest_manifest(manifest: Mapping[str, object]) -> str:
    return hashlib.blake2b(json.dumps(manifest).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()
