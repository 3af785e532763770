"""Carries out the commands of the pages: each in a fork of one interpreter, in a folder made ready for its page."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import typer
from docs_folder import ROOT, TINY

from forge_cli.cli.app import app
from forge_cli.resolve.schema_tree import find_field

TIMEOUT_SECONDS = 60
PYTHON = "python"  # in the place of a command: what follows is a script
# No weights are read by these, and no network is asked.
QUICK = ("estimate", "config", "presets", "recipes", "models", "runs", "migrate", "init", "completion", "verify")
QUICK_OF_DATA = ("data check", "data preview", "data parity")
# These load the weights of a run.
OF_WEIGHTS = ("chat", "generate", "eval", "merge", "export", "average")
# What most commands import; neither list starts a thread.
IMPORTS = ("transformers.models.auto.tokenization_auto", "forge_cli.data.prepare", "forge_cli.cli.estimate")
THREE_STEPS = ("--set", "training.max_steps=3", "--set", "training.per_device_train_batch_size=2", "--overwrite")
IMPORTS_OF_WEIGHTS = (
    *("torch", "forge_cli.run.execute", "forge_cli.run.training", "forge_cli.run.artifacts", "forge_cli.run.report"),
    *("forge_cli.results.load", "transformers.models.llama.modeling_llama", "transformers.integrations", "peft"),
)


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Parses a command line as the real one does, without carrying it out.

    Args:
        words: What follows ``forge``.

    Returns:
        The command (``data check``; empty for ``forge`` alone) and its parameters; ``help`` among them if help or the
        version is asked for.

    Raises:
        click.UsageError: There is no such command or option, or a value has the wrong type.
    """
    command, context, path = typer.main.get_command(app), None, []
    while True:
        name = path[-1] if path else "forge"
        with contextlib.redirect_stdout(None):
            try:
                context = command.make_context(name, list(words), parent=context)
            except typer.Exit:
                return " ".join(path), {"help": True}
        if not hasattr(command, "list_summaries"):
            break
        # A group's context holds what stands behind its own options.
        words = [*context._protected_args, *context.args]
        name, command, words = command.resolve_command(context, words)
        path.append(name)
    for setting in context.params.get("overrides") or ():
        key = setting.partition("=")[0]
        assert "=" in setting and find_field(key) is not None, f"--set {setting}: there is no such setting"
    return " ".join(path), context.params


def choose_arguments(command: str, params: dict[str, Any], words: list[str], mark: str = "") -> list[str] | None:
    """Says how a command is carried out, or ``None`` for one that is only parsed.

    Args:
        command: As ``parse`` names it.
        params: Its parameters.
        words: All words behind ``forge``.
        mark: That of its block; below ``run``, ``train`` trains, for three steps.
    """
    first = command.partition(" ")[0]
    if params.get("help"):
        return words
    if command == "init":  # asks for what is not named, in a terminal
        named = [*words, *(() if params["model"] or params["yes"] else ("--model", "forge-tiny")), "--yes"]
        return named if params["data"] or params["yes"] else [*named, "--data", "data/train.jsonl"]
    if command == "train":
        return [*words, *THREE_STEPS] if mark == "run" else _plan_only(words)
    if command in QUICK_OF_DATA:
        return words if command == "data parity" else [*words, *TINY]
    if command == "estimate":
        if params["trace"] or params["calibrate"]:
            return None
        return [*words, *TINY] if params["data"] and params["run_file"] else words
    if command == "push":
        return [*words, *(() if params["dry_run"] else ("--dry-run",))]
    if command == "report":
        return [word for word in words if word != "--open"]
    if command == "watch" or first in OF_WEIGHTS:
        return words if not params.get("tasks") else None
    return words if first in QUICK and not params.get("install") else None


def _plan_only(words: list[str]) -> list[str]:
    """Turns ``train`` into a look at its plan; what only matters for training is parsed already."""
    kept, skip = [], False
    for word in words:
        name, _, value = word.partition("=")
        if name in ("--num-processes", "--allow-change", "--preempt-exit-code"):
            skip = not value
        elif skip:
            skip = False
        elif name not in ("--resume", "--overwrite", "--require-latest", "--break-lock", "--stop-on-usr1", "--json"):
            kept.append(word)
    return kept if "--dry-run" in kept else [*kept, "--dry-run"]


class Shell:
    """One interpreter, of which every command is a fork: nothing is imported twice, and none changes another's state.

    Args:
        modules: What to import once, before the first command.
    """

    def __init__(self, *modules: str) -> None:
        environment = {**os.environ, "COLUMNS": "100", "PYTHONUTF8": "1", "PYTHONPATH": str(ROOT)}
        # A fork needs an interpreter without threads.
        environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "PYDANTIC_DISABLE_PLUGINS": "__all__", "HF_HUB_OFFLINE": "1"},
        )

    def run(self, folder: Path, arguments: list[str], typed: str = "") -> tuple[int, str, str]:
        """Runs ``forge`` with these arguments in a folder; returns exit code, stdout and stderr.

        Args:
            folder: Working folder.
            arguments: What follows ``forge``; or ``python`` and the text of a script.
            typed: What stdin holds.
        """
        (folder / ".stdin").write_text(typed, encoding="utf-8")
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([str(folder), arguments]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the interpreter that runs the commands has ended"
        code = json.loads(answer)
        out, err = ((folder / name).read_text(encoding="utf-8") for name in (".stdout", ".stderr"))
        return code, out, err

    def close(self) -> None:
        """Ends the interpreter."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=30)


def serve(modules: list[str]) -> None:
    """Reads orders from stdin, a line of JSON each, and answers each with an exit code."""
    from forge_cli.run.data_stage import torch_hidden

    with contextlib.nullcontext() if "torch" in modules else torch_hidden():
        for name in modules:
            importlib.import_module(name)
    for line in sys.stdin:
        folder, arguments = json.loads(line)
        child = os.fork()
        if child == 0:
            _become_forge(folder, arguments)
        print(_wait_for(child), flush=True)


def _become_forge(folder: str, arguments: list[str]) -> None:
    from forge_cli.cli.app import run_app

    code: object = 99
    try:
        os.chdir(folder)
        for name, number, flags in (
            (".stdin", 0, os.O_RDONLY),
            (".stdout", 1, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            (".stderr", 2, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ):
            os.dup2(os.open(name, flags, 0o600), number)
        sys.stdin = os.fdopen(os.dup(0), encoding="utf-8")  # the old one belongs to whoever gives the orders
        if arguments[0] == PYTHON:
            exec(compile(arguments[1], "page.py", "exec"), {"__name__": "__main__"})
            code = 0
        else:
            run_app(arguments)
    except SystemExit as end:
        code = end.code
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _wait_for(child: int) -> int:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 124


if __name__ == "__main__":
    serve(sys.argv[1:])
