"""Bar 11, in seconds: bytes and arguments that nobody would write end in an error line (`tests/campaign/fuzz.py`)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parents[1] / "campaign"
SECONDS = 4


def test_a_few_seconds_of_the_campaign_find_nothing(tmp_path):
    minutes, seed = SECONDS / 60, 20
    command = [sys.executable, CAMPAIGN / "fuzz.py", "--minutes", minutes, "--seed", seed, "--keep", tmp_path / "kept"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    cases = {part: int(count) for part, count in re.findall(r"^(\w+) +(\d+) +0 ", done.stdout, re.M)}
    assert {*cases} == {"yaml", "rows", "arguments"} and all(cases.values()), done.stdout


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    sys.path.insert(0, str(CAMPAIGN))
    from fuzz import Worker

    one = Worker("yaml", tmp_path_factory.mktemp("fuzz") / "yaml")
    yield one
    one.process.stdin.close()
    one.process.wait(timeout=30)
    sys.path.remove(str(CAMPAIGN))


def ask(worker, *arguments: str, **files: str) -> dict:
    (outcome,) = worker.ask([{"args": list(arguments), "files": files}])
    return outcome


def test_the_campaign_sees_a_file_outside_the_folder(worker):
    folder = worker.folder
    assert ask(worker, "recipes", "copy", "quickstart", "own.yaml")["wrong"] == ""
    outcome = ask(worker, "recipes", "copy", "quickstart", str(folder.parent / "strange.yaml"))
    assert outcome["wrong"] == f"outside the folder: open {folder.parent}/strange.yaml"


def test_a_name_that_no_file_can_have_is_no_run(worker):
    outcome = ask(worker, "data", "parity", "\U0001f600" * 300)
    assert outcome["code"] == 5 and outcome["wrong"] == ""
    assert "not a run: it has no plan.yaml" in outcome["said"]
