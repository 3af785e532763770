"""The live view in a real terminal, and `forge watch` beside it: real processes, a real pseudo-terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

FORGE = (sys.executable, "-m", "forge_cli")
RUN_FILE = """\
preset: lora
model: {name: forge-tiny}
data: {train: "forge:quickstart/train", eval: "forge:quickstart/heldout", max_length: 128}
lora: {r: 4}
ema: {decay: 0.5}
training: {max_steps: 4, per_device_train_batch_size: 2, gradient_accumulation_steps: 1}
logging: {logging_steps: 1}
checkpoint: {save_steps: 2}
report: null
"""
HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"


class Terminal:
    """A process in a terminal of one size; what it writes is gathered by a thread."""

    def __init__(self, *arguments: str, cwd: Path, columns: int = 80, rows: int = 24, **environment: str) -> None:
        self.master, slave = pty.openpty()
        self.resize(columns, rows)
        known = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR", "COLUMNS")}
        self.process = subprocess.Popen(
            [*FORGE, *arguments],
            cwd=cwd,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            # Its controlling terminal, so that Ctrl-C reaches it.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**known, "TERM": "xterm-256color", **environment},
        )
        os.close(slave)
        self.written = b""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def _read(self) -> None:
        while True:
            try:
                chunk = os.read(self.master, 65536)
            except OSError:  # the last process that had it open is gone
                return
            if not chunk:
                return
            self.written += chunk

    def wait_for(self, text: bytes, seconds: float = 120.0) -> None:
        wait_until(lambda: text in self.written, seconds, lambda: f"{text!r} in {self.written[-2000:]!r}")

    def press_ctrl_c(self) -> None:
        os.write(self.master, b"\x03")

    def end(self, seconds: float = 120.0) -> int:
        code = self.process.wait(seconds)
        self._reader.join(10)
        return code


def wait_until(is_so: Callable[[], bool], seconds: float, describe: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.02)


def forge(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([*FORGE, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)


def watch_piped(run: Path, workspace: Path) -> subprocess.Popen:
    """Watches through pipes, from the moment on at which the first line was written."""
    view = subprocess.Popen(
        [*FORGE, "watch", str(run)], cwd=workspace, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    assert b"held" in view.stdout.readline()
    return view


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("watch")
    (folder / "run.yaml").write_text(RUN_FILE)
    return folder


@pytest.fixture(scope="module")
def finished(workspace) -> tuple[bytes, str]:
    """A run in a terminal, watched by another process through a pipe: what both wrote. Both ended well."""
    training = Terminal("train", "run.yaml", "--set", "name=ok", cwd=workspace)
    wait_until(lambda: (workspace / "runs/ok/run.json").is_file(), 60)
    watching = subprocess.Popen(
        [*FORGE, "watch", "ok"], cwd=workspace, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert training.end() == 0, training.written.decode()
    lines, _ = watching.communicate(timeout=60)
    assert watching.returncode == 0, lines
    return training.written, lines


@pytest.fixture
def held(workspace, finished, tmp_path) -> Path:
    """A copy of that run which seems to go on at step 2, as if this process trained it."""
    run = tmp_path / "runs" / "held"
    shutil.copytree(workspace / "runs/ok", run)
    facts = json.loads((run / "run.json").read_text())
    facts.pop("finished")
    (run / "run.json").write_text(json.dumps(facts))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:3]))
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
    (run / ".lock").write_text(json.dumps(holder))
    return run


def test_a_run_in_a_terminal(finished):
    written = finished[0]
    text = written.decode()
    assert "4/4  ━━━━" in text and "real tokens/s" in text and "EMA " in text and "held-out loss" in text
    assert "estimated" not in text.split("before training")[1], "the estimate is of a GPU"
    # The cursor is hidden only while something is drawn, and no other screen is used.
    assert written.count(HIDE) == written.count(SHOW) > 2 and written.rfind(SHOW) > written.rfind(HIDE)
    assert b"?1049" not in written and "Traceback" not in text
    # After the last block, nothing moves the cursor up any more.
    assert b"\x1b[" not in written[written.rfind(SHOW) + len(SHOW) :]


def test_the_same_run_through_a_pipe(finished):
    lines = finished[1]
    assert "\x1b" not in lines and "\r" not in lines
    assert lines.startswith("run     runs/ok, process ")
    for expected in ("\nbefore training  eval loss", "\nstep 4/4  loss", "\nstep 4/4  eval loss", "\nheld-out loss"):
        assert lines.count(expected) == 1, expected


def test_once(workspace, finished, held):
    done = forge("watch", "--once", cwd=workspace)
    assert done.returncode == 0 and not done.stderr and "\x1b" not in done.stdout
    assert done.stdout.startswith("run     runs/ok, finished\nstep    4/4\nloss ") and "held-out loss" in done.stdout
    done = forge("watch", str(held), "--once", cwd=workspace)
    assert done.returncode == 0 and f"process {os.getpid()} on " in done.stdout and "step    2/4" in done.stdout
    # What the run itself expects counts more than its plan.
    facts = json.loads((held / "run.json").read_text())
    facts["expected"] = {"num_steps": 9, "tokens_per_second": 1e6, "memory_bytes": 2**30}
    (held / "run.json").write_text(json.dumps(facts))
    done = forge("watch", str(held), "--once", cwd=workspace)
    for expected in ("step    2/9  ", "0% of the roofline", "estimated 1.00 GiB"):
        assert expected in done.stdout
    assert forge("watch", "nowhere", cwd=workspace).returncode == 2


def test_ctrl_c_ends_training_and_leaves_a_sane_terminal(workspace):
    training = Terminal("train", "run.yaml", "--set", "name=cut", "--set", "training.max_steps=5000", cwd=workspace)
    training.wait_for(b"real tokens/s")
    before = termios.tcgetattr(training.master)
    training.press_ctrl_c()
    assert training.end() == 130
    written = training.written
    assert written.rfind(SHOW) > written.rfind(HIDE) and termios.tcgetattr(training.master) == before
    last = written[written.rfind(SHOW) + len(SHOW) :].decode()
    assert last.startswith("error: runs/cut: stopped by Ctrl-C") and "/5000  ─" in written.decode()

    done = forge("watch", "cut", cwd=workspace)
    assert done.returncode == 14 and "not finished, and no process has it" in done.stdout
    assert done.stderr.startswith("error: runs/cut: the run ended at step ") and "forge resume runs/cut" in done.stderr


def test_watching_in_a_narrow_terminal(workspace, held):
    metrics = held / "metrics.jsonl"
    view = Terminal("watch", str(held), cwd=workspace, columns=50, rows=12, NO_COLOR="1")
    view.wait_for(b"2/4")
    line = (workspace / "runs/ok/metrics.jsonl").read_text().splitlines()[3]
    with metrics.open("a") as file:
        file.write(line[:30])
        file.flush()
        time.sleep(1.2)
        assert b"3/4" not in view.written
        file.write(line[30:] + "\n" + json.dumps({"step": 3, "alarm": "spike", "message": "日本語\x1b[2J" * 20}) + "\n")
    view.wait_for(b"alarm  step 3")
    # Written again, as by a resumed run.
    text = metrics.read_text().splitlines(keepends=True)
    (held / "new").write_text("".join(text[:2]))
    (held / "new").replace(metrics)
    view.wait_for(b"the records start anew, at step 1")
    view.resize(44, 5)
    view.wait_for(b"\x1b[J\r\x1b[3A")
    view.press_ctrl_c()
    assert view.end() == 0
    assert view.written.endswith(b"no longer watching; the run is not touched\r\n")
    assert view.written.rfind(SHOW) > view.written.rfind(HIDE)
    codes = set(view.written.split(b"\x1b[")[1:])
    assert not any(code[:1].isdigit() and b"m" in code[:3] for code in codes), "NO_COLOR"


def test_a_run_that_dies_or_vanishes(workspace, held):
    view = watch_piped(held, workspace)
    (held / ".lock").write_text("")
    _, err = view.communicate(timeout=30)
    assert view.returncode == 14 and b"ended at step 2 of 4, before it was finished; what it saved is whole" in err
    shutil.rmtree(held)
    done = forge("watch", str(held), cwd=workspace)
    assert done.returncode == 2 and "no run folder" in done.stderr


def test_it_ends_when_nobody_reads(workspace, held):
    view = watch_piped(held, workspace)
    view.stdout.close()
    lines = (workspace / "runs/ok/metrics.jsonl").read_text().splitlines(keepends=True)
    with (held / "metrics.jsonl").open("a") as file:
        file.write(lines[3])
    assert view.wait(30) in (0, 1) and view.stderr.read() == b""


def test_a_signal_ends_the_watching_only(workspace, held):
    view = watch_piped(held, workspace)
    view.send_signal(signal.SIGINT)
    _, err = view.communicate(timeout=30)
    assert view.returncode == 0 and b"the run is not touched" in err and (held / ".lock").stat().st_size
