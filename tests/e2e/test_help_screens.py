"""Every command explains itself: help of every option, screens of 100 columns, JSON that is nothing but JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs_folder import ROOT
from docs_reference import list_all_commands
from docs_shell import Shell

COMMANDS = list_all_commands()
MOST_COLUMNS = 100


@pytest.fixture(scope="module")
def shell() -> Iterator[Shell]:
    shell = Shell()
    yield shell
    shell.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a run file, rows, and a file of another tool."""
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 4, encoding="utf-8")
    (tmp_path / "run.yaml").write_text(
        "preset: lora\nmodel: {name: forge-tiny}\ndata: {train: rows.jsonl, max_length: 64}\n", encoding="utf-8"
    )
    shutil.copy(ROOT / "tests" / "fixtures" / "migrate" / "trl" / "sft-lora.yaml", tmp_path / "other.yaml")
    return tmp_path


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_and_option_has_help(words: str):
    command = COMMANDS[words]
    assert (command.help or "").strip(), "the command does not say what it does"
    for parameter in command.params:
        text = getattr(parameter, "help", None) or ""
        assert getattr(parameter, "hidden", False) or text.strip(), f"{words} {parameter.opts}"
        assert text == text.strip() and "  " not in text, f"{words} {parameter.opts}"


def test_screens_of_help_fit_and_hold_no_control_codes(shell: Shell, tmp_path: Path):
    faults = []
    for words in COMMANDS:
        code, out, err = shell.run(tmp_path, [*words.split()[1:], "--help"])
        assert (code, err) == (0, ""), f"{words} --help: {err}"
        assert out.startswith(f"Usage: {words}"), words
        faults += [f"{words}: {line}" for line in out.splitlines() if len(line) > MOST_COLUMNS]
        faults += [f"{words}: control codes"] if "\x1b" in out else []
        faults += [
            f"{words}: {line!r} is cut"
            for line in out.splitlines()
            if line.endswith(("...", "…")) and "ARGS" not in line
        ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "command",
    [
        "presets list",
        "presets show qlora",
        "recipes list",
        "models list",
        "runs list",
        "config show run.yaml",
        "config explain run.yaml training.learning_rate",
        "config validate run.yaml",
        "data check run.yaml",
        "data preview run.yaml",
        "estimate run.yaml",
        "estimate --model mistral-7b",
        "migrate other.yaml --output migrated.yaml",
        "init --model forge-tiny --data rows.jsonl --yes --output new.yaml",
    ],
)
def test_json_is_all_that_stdout_holds(command: str, shell: Shell, folder: Path):
    code, out, err = shell.run(folder, [*command.split(), "--json"])
    assert code == 0, err
    json.loads(out)
    assert "\x1b" not in out + err


def test_the_list_of_runs_goes_through_a_pipe(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = f"{sys.executable} -m forge_cli runs list --json | {sys.executable} -m json.tool"
    done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_lists_hold_no_control_codes_even_where_colour_is_forced(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    shell = Shell()
    try:
        for command in ("presets list", "models list", "config show run.yaml", "estimate run.yaml", "trian"):
            _, out, err = shell.run(folder, command.split())
            assert out + err and "\x1b" not in out + err, command
    finally:
        shell.close()
