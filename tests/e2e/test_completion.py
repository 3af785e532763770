"""Completion: what shells are offered, asked through the real process and, for bash, the real shell."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = [sys.executable, "-m", "forge_cli", "completion"]


def offer(line: str, folder: Path | None = None) -> list[str]:
    """Returns what is offered for a command line; a space at its end begins a new word."""
    words = line.split(" ")[1:]
    done = subprocess.run([*COMMAND, "words", "--", *words], capture_output=True, text=True, cwd=folder, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
    return [one.split("\t")[0] for one in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("forge tr", ["train"]),
        ("forge train --set lora.r", ["lora.r="]),
        ("forge train run.yaml --set see", ["seed="]),
        (
            "forge train --set data.on_overlong=",
            [f"data.on_overlong={x}" for x in ("error", "drop", "truncate", "split")],
        ),
        ("forge train --set preset=ql", ["preset=qlora"]),
        ("forge presets show ql", ["qlora"]),
        ("forge estimate --gpu rtx-409", ["rtx-4090"]),
        ("forge train --overw", ["--overwrite"]),
        ("forge config explain run.yaml data.eval_r", ["data.eval_rows"]),
        ("forge train ", []),  # a file, which the shell knows
        ("forge nonsense x", []),
        ("forge train --set nothing.here=", []),
    ],
)
def test_what_is_offered(line, wanted):
    assert offer(line) == wanted


def test_sections_come_before_their_settings():
    assert {"model.", "monitor.", "method="} == set(offer("forge train --set m"))
    settings = offer("forge train --set train")
    assert "training.learning_rate=" in settings and all(one.startswith("training.") for one in settings)


def test_recipes_models_and_runs(tmp_path):
    assert {"quickstart", "qlora-7b"} <= set(offer("forge recipes copy "))
    models = offer("forge estimate --model mis")
    assert "mistral-7b" in models and all(one.startswith("mis") for one in models)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "run.json").write_text("{}")
    (tmp_path / "runs" / "other").mkdir()
    assert offer("forge verify ", tmp_path) == ["runs/first"]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("forge tr", ["train"]),
        ("forge train --set lora.r", ["lora.r="]),
        ("forge train --set preset=ql", ["qlora"]),  # behind = bash begins a new word
        ("forge init --data forge:quick", ["quickstart/heldout", "quickstart/train"]),
    ],
)
def test_bash_takes_the_script(line, wanted, tmp_path):
    program = tmp_path / "forge"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m forge_cli "$@"\n')
    program.chmod(0o755)
    lines = (
        'eval "$(forge completion bash)"',
        f'COMP_LINE="{line}" COMP_POINT={len(line)}',
        "_forge_complete",
        'printf "%s\\n" "${COMPREPLY[@]}"',
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", "\n".join(lines)], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert (done.stdout.split(), done.stderr) == (wanted, "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_written_where_the_shell_looks(shell, tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_DATA_HOME": "", "XDG_CONFIG_HOME": ""}
    done = subprocess.run([*COMMAND, shell, "--install"], capture_output=True, text=True, env=environment)
    file = Path(done.stdout.strip())
    assert done.returncode == 0 and file.is_relative_to(tmp_path)
    if shutil.which(shell):
        assert subprocess.run([shell, "-n", str(file)]).returncode == 0


def test_an_unknown_shell_is_refused():
    done = subprocess.run([*COMMAND, "tcsh"], capture_output=True, text=True)
    assert done.returncode == 2 and "bash, zsh and fish" in done.stderr
