"""What the quick commands load. What that costs is a benchmark: tests/benchmarks/start_up.py."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize("command", ["check", "preview"])
def test_looking_at_data_needs_no_torch(command, tmp_path):
    run_file = tmp_path / "run.yaml"
    run_file.write_text("model: {name: forge-tiny}\ndata: {train: forge:quickstart/train, max_length: 128}\n")
    modules = run_and_list_modules("data", command, str(run_file))
    assert "transformers" in modules
    assert modules & {"torch", "datasets", "trl", "peft", "accelerate"} == set()


@pytest.mark.parametrize("command", [["config", "validate"], ["config", "show"], ["train", "--dry-run"]], ids=" ".join)
def test_planning_needs_no_torch(command, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    run_file = tmp_path / "run.yaml"
    run_file.write_text(RUN_FILE.replace("rows.jsonl", str(tmp_path / "rows.jsonl")), encoding="utf-8")
    modules = run_and_list_modules(*command, str(run_file))
    assert modules & set(HEAVY) == set()
    if command[0] == "config":
        assert "importlib.metadata" not in modules
