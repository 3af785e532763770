"""Files of columns are read in batches; what is cut off or damaged is an error and never fewer rows."""

from __future__ import annotations

import datetime
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from forge_cli.data.read_row import BadRow, Row
from forge_cli.data.reading import find_files, read_file
from forge_cli.errors import DataError

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS = [{"messages": TURNS[: number % 3], "n": number, "text": f"\u00e9{number}"} for number in range(3000)]
TABLE = pyarrow.Table.from_pylist(ROWS)
BOTH = pytest.mark.parametrize("kind", ["parquet", "file", "stream"])


def save(path: Path, table: pyarrow.Table, kind: str) -> Path:
    """Writes a table in small parts, as Parquet or in one of Arrow's two formats."""
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path.with_suffix(".parquet"), row_group_size=700)
        return path.with_suffix(".parquet")
    new = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
    with new(path.with_suffix(".arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=700)
    return path.with_suffix(".arrow")


def read(path: Path) -> list[Row | BadRow]:
    (file,) = find_files(str(path))
    return list(read_file(file._replace(name=path.name)))


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    return str(caught.value)


@BOTH
def test_rows_come_out_as_they_went_in(tmp_path, kind):
    assert read(save(tmp_path / "f", TABLE, kind)) == [Row(number, row) for number, row in enumerate(ROWS, 1)]
    assert read(save(tmp_path / "f", TABLE.slice(0, 0), kind)) == []


def test_one_large_batch_comes_in_parts(tmp_path):
    with pyarrow.ipc.new_file(tmp_path / "f.arrow", TABLE.schema) as writer:
        writer.write_batch(TABLE.combine_chunks().to_batches()[0])
    assert [row.number for row in read(tmp_path / "f.arrow")] == list(range(1, 3001))


def test_a_parquet_file_is_not_held(tmp_path):
    """One row group of 40 MB that does not compress, and as many of 1 MB."""
    draw = random.Random(0)
    table = pyarrow.table({"text": [draw.randbytes(500).hex() for _ in range(40_000)]})
    for rows in (40_000, 1_000):
        pyarrow.parquet.write_table(table, tmp_path / "f.parquet", row_group_size=rows, use_dictionary=False)
        (file,) = find_files(str(tmp_path / "f.parquet"))
        before = pyarrow.total_allocated_bytes()
        held = [pyarrow.total_allocated_bytes() - before for _ in read_file(file)]
        assert len(held) == 40_000
        assert max(held) < 8_000_000


def test_what_the_datasets_library_writes_is_read(tmp_path):
    data = Dataset.from_list(ROWS)
    data.to_parquet(tmp_path / "f.parquet")
    data.save_to_disk(tmp_path / "saved")
    wanted = [Row(number, row) for number, row in enumerate(ROWS, 1)]
    assert read(tmp_path / "f.parquet") == wanted
    (shard,) = (tmp_path / "saved").glob("*.arrow")
    assert read(shard) == wanted


@BOTH
def test_a_file_that_is_cut_off_is_an_error_wherever_it_is_cut(tmp_path, kind):
    path = save(tmp_path / "f", TABLE.slice(0, 1000).select(["n"]), kind)
    content = path.read_bytes()
    assert len(read(path)) == 1000
    # Every length near the beginning and the end, and every alignment in between.
    sizes = {*range(300), *range(300, len(content), 57), *range(len(content) - 400, len(content))}
    if kind == "stream":
        sizes |= set(range(0, len(content), 8))
    for size in sorted(sizes - {len(content)}):
        path.write_bytes(content[:size])
        assert "the file seems cut off or damaged" in refusal(path), size


@BOTH
def test_a_damaged_file_is_an_error_or_costs_rows_but_never_the_process(tmp_path, kind):
    path = save(tmp_path / "f", TABLE.slice(0, 500), kind)
    content = path.read_bytes()
    refused = 0
    for at in range(0, len(content), 11):
        damaged = bytearray(content)
        damaged[at] ^= 0xFF
        path.write_bytes(damaged)
        try:
            read(path)
        except DataError:
            refused += 1
    assert refused > 10


def test_text_that_is_not_utf8_costs_only_its_row(tmp_path):
    texts = pyarrow.array([b"a", b"caf\xe9", b"c"]).view(pyarrow.string())
    path = save(tmp_path / "f", pyarrow.table({"text": texts}), "parquet")
    assert read(path) == [
        Row(1, {"text": "a"}),
        BadRow(2, 0, "a value cannot be read: not UTF-8: unexpected end of data", "write it as UTF-8 text"),
        Row(3, {"text": "c"}),
    ]
    assert "Invalid UTF8" in refusal(save(tmp_path / "f", pyarrow.table({"text": texts}), "stream"))


def test_columns_that_are_not_trained_do_no_harm(tmp_path):
    far = pyarrow.array([10**18, None], pyarrow.timestamp("us"))  # a day in the year 33658
    table = pyarrow.table({"text": ["a", "b"], "day": [datetime.date(2024, 1, 2), None], "raw": [b"\xff", None]})
    assert [row.values["text"] for row in read(save(tmp_path / "f", table, "parquet"))] == ["a", "b"]
    bad, good = read(save(tmp_path / "f", table.append_column("far", far), "parquet"))
    assert isinstance(bad, BadRow) and good.values["text"] == "b"


@BOTH
def test_two_columns_of_one_name_are_refused(tmp_path, kind):
    table = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["text", "text"])
    path = save(tmp_path / "f", table, kind)
    assert refusal(path) == f"{path.name}: two columns are called 'text'; rename one"


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"ARROW1\0\0", b'{"text": "a"}\n' * 9, b"\xff" * 64])
def test_what_is_no_file_of_columns_is_refused(tmp_path, suffix, content):
    path = tmp_path / f"f{suffix}"
    path.write_bytes(content)
    assert refusal(path).startswith(f"f{suffix}: ")
