"""`forge init` and `forge doctor` as a new user meets them: in a terminal, in a pipe, with nothing at hand."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

COMMAND = [sys.executable, "-m", "forge_cli"]
SECONDS = 60


def forge(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, cwd=folder, timeout=SECONDS, stdin=subprocess.DEVNULL
    )


def talk(folder: Path, answers: list[str], *arguments: str) -> tuple[int, str]:
    """Runs the command in a real terminal of 80 columns and answers each question; returns exit code and screen."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.environ["COLUMNS"] = "80"
        os.execv(sys.executable, [*COMMAND, *arguments])
    screen, ends = b"", time.monotonic() + SECONDS
    asked, pressed_at = 0, float("inf")
    while time.monotonic() < ends:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                read = os.read(terminal, 4096)
            except OSError:  # the other end is closed
                break
            if not read:
                break
            screen += read
        # readline looks for signals when a key comes: one that strikes while it shows its prompt waits for the next.
        if time.monotonic() > pressed_at + 5:
            os.write(terminal, b"\x03")
            pressed_at = time.monotonic()
        if answers and screen.endswith(b"]: ") and len(screen) > asked:
            asked = len(screen) + len(answers[0])
            pressed_at = time.monotonic() if answers[0] == "\x03" else pressed_at
            os.write(terminal, answers.pop(0).encode())
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), screen.decode()


def test_a_new_user_presses_enter(tmp_path):
    code, screen = talk(tmp_path, ["\n", "\n", "\n"], "init", "--gpu", "cpu")
    assert code == 0, screen
    assert "\x1b" not in screen
    assert all(len(line) <= 80 for line in screen.replace("\r", "").splitlines() if "wrote" not in line)
    assert "forge train" in screen and "forge chat" in screen
    written = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert written["model"]["name"] == "forge-tiny" and written["data"]["train"] == "forge:quickstart/train"
    assert forge("config", "validate", "run.yaml", folder=tmp_path).returncode == 0
    before = (tmp_path / "run.yaml").read_text()
    again = forge("init", "--yes", folder=tmp_path)
    assert again.returncode == 2 and "--force" in again.stderr
    assert (tmp_path / "run.yaml").read_text() == before


def test_wrong_answers_are_asked_again_and_no_is_no(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Say a.", "output": "a"}\n' * 20)
    answers = ["gone.jsonl\n", "bad.jsonl\n", "rows.jsonl\n", "gpt77\n", "1\n", "n\n"]
    code, screen = talk(tmp_path, answers, "init", "--gpu", "cpu")
    assert (code, answers) == (0, []), screen
    assert "no such file" in screen and "the columns are question, answer" in screen and "did you mean gpt2" in screen
    assert not (tmp_path / "run.yaml").exists()


def test_control_c_leaves_nothing(tmp_path):
    code, screen = talk(tmp_path, ["\x03"], "init", "--gpu", "cpu")
    assert code == 130 and "stopped by the user" in screen
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [([], ["--model", "--data"]), (["--model", "forge-tiny"], ["--data"]), (["--data", "x.jsonl"], ["--model"])],
)
def test_without_a_terminal_the_missing_flag_is_named(arguments, named, tmp_path):
    done = forge("init", *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert [one for one in ("--model", "--data") if f"error: {one}:" in done.stderr] == named
    assert list(tmp_path.iterdir()) == []


def test_json_is_the_only_thing_on_stdout(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Say a.", "output": "a"}\n' * 20)
    arguments = ["--model", "forge-tiny", "--data", "rows.jsonl", "--gpu", "rtx-4090", "--json"]
    done = forge("init", *arguments, folder=tmp_path)
    answer = json.loads(done.stdout)
    assert answer["fits"] is True and answer["needed_bytes"] < answer["usable_bytes"]
    assert {"path": "preset", "value": "lora"}.items() <= answer["settings"][0].items()


def test_a_missing_file_and_a_wrong_preset_have_their_exit_codes(tmp_path):
    missing = forge("init", "--yes", "--data", "gone.jsonl", folder=tmp_path)
    assert missing.returncode == 3 and "gone.jsonl: no such file" in missing.stderr
    wrong = forge("init", "--yes", "--preset", "qlra", folder=tmp_path)
    assert wrong.returncode == 2 and "did you mean qlora" in wrong.stderr


def test_doctor_looks_at_this_machine(tmp_path):
    done = forge("doctor", "--json", folder=tmp_path)
    answer = json.loads(done.stdout)
    names = {check["name"] for check in answer["checks"]}
    assert {"Python", "torch", "transformers", "disk for runs", "file system", "open files"} <= names
    assert done.returncode == (0 if answer["can_train"] else 5)
    assert answer["can_train"] is not any(check["status"] == "PROBLEM" for check in answer["checks"])
    assert all(check["fix"] for check in answer["checks"] if check["status"] == "PROBLEM")
