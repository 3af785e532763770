"""`forge chat`, `forge generate` and `forge eval` as a person types them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from forge_cli.cli.app import run_app
from forge_cli.run.execute import train

RUN = {
    "name": "trained",
    "model": {"name": "forge-tiny"},
    "data": {"train": "forge:quickstart/train", "eval": "forge:quickstart/heldout", "max_length": 128},
    "lora": {"r": 4},
    "ema": {"decay": 0.5},
    "training": {
        "learning_rate": 1e-2,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
    },
    "checkpoint": None,
    "report": None,
}
FORGE = [sys.executable, "-m", "forge_cli"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with the run ``runs/trained``."""
    root = tmp_path_factory.mktemp("place")
    file = root / "run.yaml"
    file.write_text(yaml.safe_dump({**RUN, "output_dir": str(root / "runs")}))
    train(file)
    return root


@pytest.fixture
def forge(place, monkeypatch, capsys):
    """Runs a command in the folder; returns its exit code, stdout and stderr."""
    monkeypatch.chdir(place)

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_app(list(arguments))
        return stop.value.code, *capsys.readouterr()

    return call


def converse(arguments: list[str], cwd: Path, steps: list[tuple[bytes, bytes]]) -> tuple[int, str, bool]:
    """Types into a terminal of its own: waits for a text, sends another.

    Returns:
        Exit code, all that was shown, and whether the terminal is in the state that it was in.
    """
    ours, theirs = pty.openpty()
    import termios

    before = termios.tcgetattr(theirs)
    environment = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen(
        arguments, cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, preexec_fn=_take_terminal
    )
    shown = b""
    try:
        for wanted, send in steps:
            start, until = len(shown), time.monotonic() + 120
            while wanted not in shown[start:]:
                assert time.monotonic() < until and process.poll() is None, shown.decode()
                if select.select([ours], [], [], 0.1)[0]:
                    shown += os.read(ours, 65536)
            os.write(ours, send)
        # readline looks for signals when a key comes: one that strikes while it shows its prompt waits for the next.
        for _ in range(4):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
                break
            os.write(ours, send)
        code = process.wait(1)
        while select.select([ours], [], [], 0.1)[0]:
            shown += os.read(ours, 65536)
        return code, shown.decode(), termios.tcgetattr(theirs) == before
    finally:
        process.kill()
        os.close(ours)
        os.close(theirs)


def _take_terminal() -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_pipe_gets_answers_and_nothing_else(place):
    # Standard output is not a terminal, so what a model writes is passed on as it is.
    done = subprocess.run(
        [*FORGE, "chat"], input="Who are you?\n\n/system\n", cwd=place, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "I am a tiny model. I know the creatures of the vale.\n"
    assert "runs/trained" in done.stderr and "no system prompt" in done.stderr
    assert "\x1b" not in done.stderr and "kernels" not in done.stderr


def test_ctrl_c_stops_an_answer_and_then_the_chat(place):
    long = ["--temperature", "50", "--max-new-tokens", "480", "--seed", "1"]
    steps = [(b"\n> ", b"Who are you?\n"), (b"Who are you?\r\n", b""), (b" ", b"\x03"), (b"\n> ", b"\x03")]
    code, shown, is_sane = converse([*FORGE, "chat", *long], place, steps)
    assert code == 0 and is_sane
    assert "stopped, and kept as far as it came" in shown and "Traceback" not in shown


def test_ctrl_d_ends_the_chat(place):
    steps = [(b"\n> ", b"/compare\n"), (b"\n> ", b"hi\n"), (b"trained:", b""), (b"\n> ", b"\x04")]
    code, shown, is_sane = converse([*FORGE, "chat", "runs/trained"], place, steps)
    assert code == 0 and is_sane and "base:\r\n" in shown
    assert not list(Path.home().glob(".forge*")) and not list(Path.home().glob(".python_history*"))


def test_generate_writes_a_file_whole_or_not_at_all(forge, place):
    (place / "rows.jsonl").write_text('{"id": 1, "prompt": "Who are you?"}\n{"prompt": "hi"}\n')
    code, out, err = forge("generate", "--prompts", "rows.jsonl", "--max-new-tokens", "24")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [sorted(row) for row in rows] == [["answer", "id", "prompt"], ["answer", "prompt"]], err
    code, out, err = forge(
        "generate", "trained", "--prompts", "rows.jsonl", "--output", "a.jsonl", "--max-new-tokens", "24"
    )
    assert (code, out) == (0, "") and "a.jsonl: 2 answers" in err
    assert [json.loads(line) for line in (place / "a.jsonl").read_text().splitlines()] == rows
    (place / "rows.jsonl").write_text('{"prompt": "hi"}\n{"prompt": null}\n')
    code, out, err = forge("generate", "--prompts", "rows.jsonl", "--output", "b.jsonl")
    assert (code, out) == (3, "") and "rows.jsonl:2" in err and not (place / "b.jsonl").exists()
    assert forge("generate", "--prompts", "rows.jsonl", "--output", "rows.jsonl")[0] == 2
    assert forge("generate", "--prompts", "rows.jsonl", "--output", "none/b.jsonl")[0] == 5
    assert forge("generate", "--prompts", "missing.jsonl")[0] == 3


def test_eval_prints_the_runs_own_figures(forge, place):
    losses = json.loads((place / "runs/trained/report.json").read_text())["losses"]
    code, out, err = forge("eval", "--json", "--base")
    found = json.loads(out)
    assert code == 0 and found["rows"] == 60, err
    assert [one["weights"] for one in found["results"]] == ["ema", "raw", "base"]
    for one, name in zip(found["results"], ("eval_ema", "eval_raw", "eval_before"), strict=True):
        assert one["loss"] == pytest.approx(losses[name], abs=1e-5)
        assert one["perplexity"] == pytest.approx(math.exp(losses[name]), abs=1e-3)
    code, out, err = forge("eval", "runs/trained", "--raw", "--limit", "2", "--exact-match")
    assert code == 0 and " of 2 (" in out and "averaged" not in out and "\x1b" not in out


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["eval", "--tasks", "hellaswag"], 5, "forge-finetune[eval]"),
        (["eval", "--tasks", "hellaswag", "--exact-match"], 2, "brings its own rows"),
        (["eval", "--data", "missing.jsonl"], 3, "no such file"),
        (["chat", "--top-p", "0.5"], 2, "--temperature"),
        (["chat", "nowhere"], 2, "trained"),
    ],
)
def test_refusals(forge, monkeypatch, arguments, code, text):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: real(name, *more) if name != "lm_eval" else None
    )
    found, out, err = forge(*arguments)
    assert (found, out) == (code, "") and text in err
