"""Following a run from outside: half-written lines, files that are written again, and how a run ends."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

from forge_cli.checkpoints.lock import LOCK_FILE
from forge_cli.results.follow import Follower, Tail


@pytest.fixture
def metrics(tmp_path):
    return tmp_path / "metrics.jsonl"


def write(path, *steps: int) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps({"step": number}) + "\n" for number in steps)


def steps(sight: tuple[bool, list[dict]]) -> tuple[bool, list[int]]:
    return sight[0], [record["step"] for record in sight[1]]


def test_only_whole_new_lines_are_read(metrics):
    tail = Tail(metrics)
    assert tail.read() == (False, [])
    write(metrics, 1, 2)
    assert steps(tail.read()) == (False, [1, 2]) and tail.read() == (False, [])
    with metrics.open("a") as file:
        file.write('{"step": 3, "loss"')
    assert tail.read() == (False, [])
    with metrics.open("a") as file:
        file.write(': 1}\n[4]\nno json\n{"step": "\xff"}\n')
    assert [one["step"] for one in tail.read()[1]] == [3, "\xff"]


def test_a_file_that_was_written_again_is_read_from_its_start(metrics, tmp_path):
    tail = Tail(metrics)
    write(metrics, 1, 2, 3)
    tail.read()
    # As a resumed run does it: written aside, then renamed; here with more than there was.
    write(tmp_path / "new", 1, 2, 13, 14, 15)
    os.replace(tmp_path / "new", metrics)
    assert steps(tail.read()) == (True, [1, 2, 13, 14, 15])
    write(metrics, 16)
    assert steps(tail.read()) == (False, [16])
    # In place, shorter and as long.
    metrics.write_text('{"step": 1}\n')
    assert steps(tail.read()) == (True, [1])
    metrics.write_text('{"step": 2}\n{"step": 3}\n')
    assert steps(tail.read()) == (True, [2, 3])
    metrics.unlink()
    assert tail.read() == (True, []) and tail.read() == (False, [])
    write(metrics, 7)
    assert steps(tail.read()) == (False, [7])


def test_how_a_run_stands(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    follower = Follower(run)
    assert follower.look().state == "gone" and follower.seconds_silent() == 0
    (run / "run.json").write_text('{"run_id": "a"}')
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid, state in ((os.getppid(), "running"), (ended.pid, "ended")):
        holder = {"pid": pid, "host": socket.gethostname(), "since": time.time()}
        (run / LOCK_FILE).write_text(json.dumps(holder))
        sight = follower.look()
        assert (sight.state, str(pid) in sight.holder, sight.records) == (state, state == "running", [])
    write(run / "metrics.jsonl", 1)
    assert follower.look()._replace(holder="") == ("ended", "", False, [{"step": 1}])
    (run / "run.json").write_text('{"run_id": "a", "finished": true}')
    assert follower.look().state == "finished" and follower.seconds_silent() < 60
    shutil.rmtree(run)
    assert follower.look().state == "gone"
