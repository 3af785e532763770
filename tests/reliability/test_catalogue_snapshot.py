"""Bar 12 for the rows A, B, D and I: exit code, one located error line and one fix line each, word for word."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from catalogue_rows import NOT_HERE, list_rows

SCRIPT = Path(__file__).parent / "catalogue_rows.py"
GOLDEN = Path(__file__).parents[1] / "golden" / "catalogue.txt"
NUMBERS = {"A": 24, "B": 14, "D": 13, "I": 9}
ROWS = {one.name: one for one in list_rows()}


def run_rows(*arguments: str) -> list[dict]:
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def ended() -> dict[str, dict]:
    """How every row ended, in the order of the catalogue: in two processes, one of which never needs torch."""
    return {one["name"]: one for one in sorted([*run_rows(), *run_rows("--torch")], key=lambda one: one["name"])}


def read_error(said: str) -> list[str]:
    """Returns the lines from the first error on; what a library says in its own words is left out."""
    lines = said.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith("error: ")), len(lines))
    return [re.sub(r"(cannot be loaded): .*", r"\1: ...", line) for line in lines[first:]]


def test_every_row_is_caused_or_has_a_reason():
    named = {re.match(r"[A-Z]\d\d", one).group() for one in (*ROWS, *NOT_HERE)}
    assert named == {f"{letter}{n:02}" for letter, count in NUMBERS.items() for n in range(1, count + 1)}
    assert len(ROWS) == len(list_rows())


def test_each_row_ends_with_its_exit_code_and_one_located_error_with_a_fix(ended):
    assert ended.keys() == ROWS.keys()
    for name, row in ended.items():
        assert row["code"] == ROWS[name].code, (name, row["said"])
        assert "Traceback" not in row["said"] and "internal error" not in row["said"], row
        lines = read_error(row["said"])
        assert lines and len(lines) % 2 == 0, (name, lines)
        for error, fix in zip(lines[::2], lines[1::2], strict=True):
            place, colon, _ = error.removeprefix("error: ").partition(": ")
            assert error.startswith("error: ") and colon and len(place.split()) <= 3, (name, error)
            assert fix.startswith("  fix: "), (name, fix)


def test_nothing_is_run_written_or_loaded_on_the_way(ended):
    for name, row in ended.items():
        assert row["new"] == [], name
        assert row["torch"] is ROWS[name].needs_torch, name
        assert "\x1b" not in row["said"], name
        assert not re.search(r"hf_[a-z]|sk-proj|AKIA|pa55word", row["said"]), name


def test_the_words_are_those_of_the_snapshot(ended):
    parts = [f"# {name}: {row['code']}\n" + "\n".join(read_error(row["said"])) for name, row in ended.items()]
    text = "\n".join(parts) + "\n"
    if os.environ.get("FORGE_UPDATE_GOLDEN"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8"), "FORGE_UPDATE_GOLDEN=1 rewrites it"
