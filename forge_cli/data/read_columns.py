"""Reads rows from files of columns: Parquet, and both Arrow formats. They are read in batches, never whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from forge_cli.data.read_row import BadRow, Row
from forge_cli.errors import DataError, ForgeError
from forge_cli.resolve.wording import printable
from forge_cli.units import MIB

if TYPE_CHECKING:
    from pyarrow import RecordBatch, Schema

_BATCH_BYTES = 16 * MIB
_BATCH_ROWS = 1024
_CUT = "the file seems cut off or damaged; copy or write it again"
# How an Arrow stream ends; without it, a stream that was cut between two batches looks whole.
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def read_columns(path: Path, name: str) -> Iterator[Row | BadRow]:
    """Reads the rows of a ``.parquet`` or ``.arrow`` file; a key that a nested row lacks comes as ``None``.

    Raises:
        DataError: The file is cut off, damaged or of another format, or two columns have one name.
    """
    batches = _read_parquet(path, name) if path.suffix.lower() == ".parquet" else _read_arrow(path, name)
    first = 1
    try:
        for batch in batches:
            yield from _list_rows(batch, first)
            first += batch.num_rows
    except Exception as error:
        # In a damaged file, anything at all may be what fails first. What a system call says has a number.
        if isinstance(error, ForgeError) or getattr(error, "errno", None):
            raise
        reason = printable((str(error).strip() or type(error).__name__).splitlines()[0][:200])
        raise DataError(f"not a readable {path.suffix.lower()} file: {reason}", where=name, fix=_CUT) from error


def _read_parquet(path: Path, name: str) -> Iterator[RecordBatch]:
    from pyarrow import parquet

    # So that columns are read page by page; what is read ahead of a row group, or of several, would be held whole.
    by_page = {"buffer_size": MIB, "pre_buffer": False}
    with parquet.ParquetFile(path, page_checksum_verification=True, **by_page) as file:
        _check_columns(file.schema_arrow, name)
        groups = [file.metadata.row_group(one) for one in range(file.num_row_groups)]
        row_bytes = max((one.total_byte_size // max(one.num_rows, 1) for one in groups), default=0)
        yield from file.iter_batches(min(_BATCH_ROWS, _BATCH_BYTES // max(row_bytes, 1) + 1))


def _read_arrow(path: Path, name: str) -> Iterator[RecordBatch]:
    import pyarrow

    # Mapped, as a batch may be all of the file: its pages count as memory, but the system takes them back.
    with pyarrow.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(source)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            source.seek(max(source.size() - len(_STREAM_END), 0))
            if source.read() != _STREAM_END:
                raise DataError("the Arrow stream has no end", where=name, fix=_CUT)
            source.seek(0)
            batches = reader = pyarrow.ipc.open_stream(source)
        _check_columns(reader.schema, name)
        for batch in batches:
            # Offsets are taken from the file as they stand: unchecked, a damaged one reads foreign memory.
            batch.validate(full=True)
            yield from (batch.slice(at, _BATCH_ROWS) for at in range(0, batch.num_rows, _BATCH_ROWS))


def _check_columns(schema: Schema, name: str) -> None:
    twice = [column for column, count in Counter(schema.names).items() if count > 1]
    if twice:
        raise DataError(f"two columns are called {printable(twice[0])!a}", where=name, fix="rename one")


def _list_rows(batch: RecordBatch, first: int) -> Iterator[Row | BadRow]:
    """Yields the rows of a batch whose first row has the number ``first``; one value that is none costs one row."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows > 1:
            for at in range(batch.num_rows):
                yield from _list_rows(batch.slice(at, 1), first + at)
        else:
            reason = f"not UTF-8: {error.reason}" if isinstance(error, UnicodeDecodeError) else str(error)[:200]
            yield BadRow(first, 0, f"a value cannot be read: {printable(reason)}", "write it as UTF-8 text")
        return
    yield from (Row(number, values) for number, values in enumerate(rows, first))
