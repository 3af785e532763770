"""How fast rows are read, and in how much memory: MB/s of one core and peak memory, in a process of its own.

    python tests/benchmarks/data_scan.py [--size-mb 256] [--format jsonl ...] [--row-bytes 1000 200]

Writes files of conversations made of random words into a temporary folder, reads each with ``read_file`` and hashes it
with ``fingerprint_file``. Speed is bytes of the file by process time, so that what other programs do counts less;
packed files and files of columns are measured by the bytes of the same rows as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from forge_cli.data.read_row import BadRow
from forge_cli.data.reading import find_files, fingerprint_file, read_file

FORMATS = ("jsonl", "json", "jsonl.gz", "jsonl.zst", "parquet", "arrow")
MB = 1_000_000


def make_lines(size_bytes: int, row_bytes: int) -> Iterator[str]:
    """Yields JSON lines of about ``row_bytes``, ``size_bytes`` in all; one text in four has an escape."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(2, 9))) for _ in range(5000)] + [
        "caf\u00e9",
        "na\u00efve",
    ]
    made = 0
    while made < size_bytes:
        turns = []
        for role, share in (("user", 0.25), ("assistant", 0.75)):
            text = " ".join(draw.choices(words, k=max(1, int(share * (row_bytes - 90) / 6.5))))
            turns.append({"role": role, "content": text + '\n"."' * (draw.random() < 0.25)})
        line = json.dumps({"messages": turns}, ensure_ascii=False)
        made += len(line.encode()) + 1
        yield line


def write_rows(path: Path, kind: str, lines: Iterator[str]) -> int:
    """Writes rows in a format; returns their size as JSON lines, in bytes."""
    import pyarrow
    from pyarrow import parquet

    size_bytes = 0

    def count() -> Iterator[bytes]:
        nonlocal size_bytes
        for line in lines:
            content = line.encode() + b"\n"
            size_bytes += len(content)
            yield content

    if kind in ("parquet", "arrow"):
        turn = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
        schema = pyarrow.schema([("messages", pyarrow.list_(turn))])
        rows, part = count(), []
        with (parquet.ParquetWriter if kind == "parquet" else pyarrow.ipc.new_file)(str(path), schema) as writer:
            while part := [json.loads(line) for _, line in zip(range(20_000), rows, strict=False)]:
                writer.write_table(pyarrow.Table.from_pylist(part, schema))
        return size_bytes
    packing = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pyarrow.output_stream(str(path), compression=packing) as stream:
        for number, line in enumerate(count()):
            stream.write((b",\n" if number else b"[") + line[:-1] if kind == "json" else line)
        stream.write(b"]" if kind == "json" else b"")
    return size_bytes


def read_peak_mib() -> float:
    """Reads this process's peak memory. Linux only; ``getrusage`` would count that of the process that started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def measure(path: str, size_bytes: int) -> None:
    """Prints speed and peak memory of this process."""
    before = read_peak_mib()
    (file,) = find_files(path)
    began = time.process_time()
    rows = 0
    for row in read_file(file):
        assert not isinstance(row, BadRow)
        rows += 1
    seconds = time.process_time() - began
    peak = read_peak_mib()
    began = time.process_time()
    fingerprint_file(file, "train")
    hashing = time.process_time() - began
    print(
        f"{rows:9d} rows  {size_bytes / seconds / MB:6.0f} MB/s  {seconds / rows * 1e6:6.2f} us per row  "
        f"peak {peak:5.0f} MiB ({before:.0f} before)  fingerprint {Path(path).stat().st_size / hashing / MB:5.0f} MB/s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size-mb", type=int, default=256)
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=["jsonl"])
    parser.add_argument("--row-bytes", type=int, nargs="+", default=[1000, 200])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], int(options.measure[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        for row_bytes in options.row_bytes:
            for kind in options.format:
                path = Path(folder) / f"rows.{kind}"
                size_bytes = write_rows(path, kind, make_lines(options.size_mb * MB, row_bytes))
                print(f"{kind:10s} {size_bytes / MB:5.0f} MB, rows of {row_bytes:5d} bytes: ", end="", flush=True)
                command = [sys.executable, __file__, "--measure", str(path), str(size_bytes)]
                subprocess.run(command, check=True)
                path.unlink()


if __name__ == "__main__":
    main()
