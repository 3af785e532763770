"""Bar 9: whatever is wrong with a run file is said before torch is imported, at its line, with the right name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "broken_configs.py"


@pytest.fixture(scope="module")
def campaign() -> dict:
    """The counts of the campaign, from a process of its own: nothing else has imported torch there."""
    done = subprocess.run([sys.executable, SCRIPT, "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def broken(campaign) -> dict[str, int]:
    """The counts of all broken files together."""
    kinds = [one for kind, one in campaign["kinds"].items() if kind != "valid"]
    return {key: sum(one[key] for one in kinds) for key in kinds[0]}


def show(campaign: dict) -> str:
    return "\n".join(f"{one['kind']} {one['lines']} {one['text']}: {one['said']}" for one in campaign["failures"][:20])


def test_every_broken_file_is_refused_without_a_traceback(campaign, broken):
    assert len(campaign["kinds"]) > 25 and broken["files"] >= 300
    assert broken["rejected"] == broken["files"], show(campaign)
    assert broken["crashed"] == 0, show(campaign)


def test_no_valid_file_is_refused(campaign):
    valid = campaign["kinds"]["valid"]
    assert valid["files"] >= 100
    assert valid["rejected"] == valid["crashed"] == 0, show(campaign)


def test_the_line_of_the_fault_is_named(campaign, broken):
    assert broken["line"] >= 0.99 * broken["files"], show(campaign)


def test_the_name_that_was_meant_is_suggested(campaign, broken):
    assert broken["names"] >= 300
    assert broken["name"] >= 0.95 * broken["names"], show(campaign)


def test_neither_torch_nor_a_file_comes_of_it(campaign):
    assert campaign["torch"] is False
    assert campaign["strange_files"] == []


def test_the_command_says_so_with_exit_code_2(campaign):
    assert campaign["processes"] == 20
    assert campaign["processes_bad"] == []
