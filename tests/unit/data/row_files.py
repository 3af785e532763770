"""Rows in files, and the tokens that become of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import csv, parquet

from forge_cli.data.prepare import TokenSet, prepare_tokens
from forge_cli.schema.runspec import RunSpec


def chat(*texts: str) -> dict:
    """A conversation: the user's and the assistant's turns in turn."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def list_chats(count: int, name: str = "") -> list[dict]:
    """Conversations that differ from each other."""
    return [chat(f"{name} question {i}", f"{name} answer {i}") for i in range(count)]


def write_rows(path: Path, rows: Sequence[dict]) -> str:
    """Writes rows in the format that the name of the file says; returns the name."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    suffix = "".join(path.suffixes)
    if suffix == ".json":
        path.write_text(json.dumps(list(rows)))
    elif suffix == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif suffix == ".jsonl.zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(lines)
    elif suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(list(rows)), path)
    elif suffix == ".arrow":
        table = pa.Table.from_pylist(list(rows))
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    elif suffix == ".csv":
        csv.write_csv(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_bytes(lines)
    return str(path)


def prepare_rows(tokenizer, *, method: str = "sft", seed: int = 0, **data) -> TokenSet:
    """Prepares what a ``data`` section says."""
    section = {"max_length": 256, **data}
    return prepare_tokens(RunSpec(model={"name": "forge-tiny"}, method=method, data=section, seed=seed), tokenizer)


def read_split(tokens: TokenSet, name: str = "train") -> list[dict]:
    """Reads the tokens of a split, as they lie on disk."""
    path = tokens.folder / f"{name}.arrow"
    if not path.exists():
        return []
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).read_all().to_pylist()
