"""Runs ``forge data`` in this process, in a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from forge_cli.cli.app import run_app


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    def read_json(self):
        assert self.code == 0, self.err
        return json.loads(self.out)


class Desk:
    """A current folder with rows, a run file and the command line."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def forge(self, *arguments: str) -> Done:
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run_app(list(arguments))
        return Done(end.value.code, *self.capsys.readouterr())

    def data(
        self, command: str, rows: Sequence[dict | bytes] | None, *arguments: str, top: dict | None = None, **data
    ) -> Done:
        """Writes rows and a run file, whose ``data`` section is merged with what is given, and runs a command."""
        if rows is not None:
            write_rows("rows.jsonl", rows)
        settings = {"model": {"name": "forge-tiny"}, "data": {"train": "rows.jsonl", "max_length": 128, **data}}
        Path("run.yaml").write_text(yaml.safe_dump({**settings, "training": {"max_steps": 1}, **(top or {})}))
        return self.forge("data", command, "run.yaml", *arguments)

    def check(self, rows: Sequence[dict | bytes] | None, *arguments: str, **settings) -> Done:
        return self.data("check", rows, *arguments, **settings)

    def report(self, rows: Sequence[dict | bytes] | None, **settings) -> dict:
        return self.check(rows, "--json", **settings).read_json()

    def preview(self, rows: Sequence[dict | bytes] | None, *arguments: str, **settings) -> list[dict]:
        return self.data("preview", rows, "--json", *arguments, **settings).read_json()

    def refuse(self, rows: Sequence[dict | bytes] | None, *arguments: str, code: int = 3, **settings) -> list[str]:
        """Returns the errors of a check that has to fail with this exit code, each with its fix in one line."""
        done = self.check(rows, *arguments, **settings)
        assert done.code == code, done.err
        assert "Traceback" not in done.err and "internal error" not in done.err
        return done.err.replace("\n  fix: ", "; ").splitlines()


def write_rows(name: str, rows: Sequence[dict | bytes]) -> None:
    """Writes rows as JSON lines; bytes as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows]
    Path(name).write_bytes(b"".join(lines))


def chat(*texts: str, system: str | None = None) -> dict:
    """A conversation: the user's and the assistant's turns in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": [{"role": "system", "content": system}, *turns] if system else turns}


def list_chats(count: int) -> list[dict]:
    """Conversations that differ from each other."""
    return [chat(f"question {i}", f"answer {i}") for i in range(count)]


def read_ids(row: dict) -> tuple[list[int], list[int]]:
    """Returns all ids of a previewed row, and those that are trained."""
    every = [one for stretch in row["stretches"] for one in stretch["ids"]]
    return every, [one for stretch in row["stretches"] if stretch["is_trained"] for one in stretch["ids"]]
