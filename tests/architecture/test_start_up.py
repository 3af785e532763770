"""What the quick commands load, and what they cost."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest

HEAVY = ["torch", "transformers", "datasets", "peft", "trl", "accelerate", "bitsandbytes", "numpy"]
SLOW = ["yaml", "pydantic", "rich", "importlib.metadata"]
REPORT = """
import json, sys
from forge_cli.__main__ import main
try:
    main()
except SystemExit as stop:
    print(json.dumps({"code": stop.code, "modules": sorted(sys.modules)}), file=sys.stderr)
"""
RUN_FILE = """
preset: lora
model: {name: mistral-7b}
data: {train: rows.jsonl}
"""


def run_and_list_modules(*arguments: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", REPORT, *arguments], capture_output=True, text=True, timeout=60)
    report = json.loads(done.stderr.splitlines()[-1])
    assert report["code"] == 0, done.stderr
    return set(report["modules"])


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["presets", "list"], ["recipes", "list"]], ids=" ".join
)
def test_listings_load_nothing_slow(arguments):
    modules = run_and_list_modules(*arguments)
    assert modules & {*HEAVY, *SLOW} == set()


@pytest.mark.parametrize("command", [["config", "validate"], ["config", "show"], ["train", "--dry-run"]], ids=" ".join)
def test_planning_needs_no_torch(command, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    run_file = tmp_path / "run.yaml"
    run_file.write_text(RUN_FILE.replace("rows.jsonl", str(tmp_path / "rows.jsonl")), encoding="utf-8")
    modules = run_and_list_modules(*command, str(run_file))
    assert modules & set(HEAVY) == set()
    if command[0] == "config":
        assert "importlib.metadata" not in modules


def measure_cpu_seconds(arguments: list[str], environment: dict[str, str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(arguments, check=True, capture_output=True, env=environment, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_start_up_stays_within_its_budget(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    run_file = tmp_path / "run.yaml"
    run_file.write_text(RUN_FILE.replace("rows.jsonl", str(tmp_path / "rows.jsonl")), encoding="utf-8")
    forge = [sys.executable, "-c", "from forge_cli.__main__ import main; main()"]
    # Shares of the time that Python needs to import the four libraries.
    budgets = {"--help": 0.8, "presets list": 0.8, f"config validate {run_file}": 1.6}
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    commands = {command: [*forge, *command.split(" ")] for command in budgets}
    commands[""] = [sys.executable, "-c", "import typer, rich, pydantic, yaml"]
    # Interleaved, and the least of several: another process on the machine slows both sides alike.
    best = dict.fromkeys(commands, float("inf"))
    for _ in range(9):
        for command, arguments in commands.items():
            best[command] = min(best[command], measure_cpu_seconds(arguments, environment))
    ratios = {command: best[command] / best[""] for command in budgets}
    assert all(ratios[command] <= budgets[command] for command in budgets), ratios
