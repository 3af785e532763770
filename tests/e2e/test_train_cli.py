"""`forge train` as a person types it: a real process, real exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUN_FILE = """\
preset: lora
model: {name: forge-tiny}
data: {train: "forge:quickstart/train", eval: "forge:quickstart/heldout", max_length: 128}
lora: {r: 4}
ema: {decay: 0.5}
training: {max_steps: 2, per_device_train_batch_size: 2, gradient_accumulation_steps: 1}
report: {samples: 1, max_new_tokens: 8}
"""


def forge(*arguments: str, cwd: Path, code: str = "", **options) -> subprocess.CompletedProcess:
    start = [sys.executable, "-m", "forge_cli"]
    if code:
        start = [sys.executable, "-c", code]
    return subprocess.run([*start, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    return tmp_path


def test_a_run_from_the_command_line(workspace):
    done = forge("train", "run.yaml", cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert "held-out loss" in done.stdout and "runs/run/adapter" in done.stdout
    assert "step 2/2" in done.stderr and "\x1b" not in done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    assert (workspace / "runs/run/adapter/adapter_model.safetensors").is_file()

    again = forge("train", "runs/run/plan.yaml", "--quiet", "--json", "--set", "name=again", cwd=workspace)
    assert again.returncode == 0, again.stderr
    assert again.stderr.strip() == ""
    first = json.loads((workspace / "runs/run/report.json").read_text())
    second = json.loads(again.stdout)
    assert second["digest"] == first["digest"] and second["losses"] == first["losses"]


def test_a_dry_run_writes_nothing_and_loads_no_torch(workspace):
    code = (
        "import sys; from forge_cli.cli.app import run_app\n"
        "try: run_app(sys.argv[1:])\n"
        "finally: assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    done = forge("train", "run.yaml", "--dry-run", cwd=workspace, code=code)
    assert done.returncode == 0, done.stderr
    assert "lora:" in done.stdout and "nothing was written" in done.stderr
    assert [path.name for path in workspace.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("override", "code", "text"),
    [
        ("training.learning_rat=1", 2, "learning_rate"),
        ("data.train=missing.jsonl", 2, "no such file"),
        ("data.max_length=16", 3, "longer than data.max_length"),
        ("lora.target_modules=[nothing]", 2, "q_proj"),
        ("model.attn_implementation=flash_attention_2", 5, "CUDA"),
        ("logging.report_to=[mlflow]", 5, "forge-finetune[mlflow]"),
    ],
)
def test_exit_codes(workspace, override, code, text):
    done = forge("train", "run.yaml", "--set", override, cwd=workspace)
    assert done.returncode == code, done.stderr
    assert text in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_divergence_is_exit_code_10(workspace):
    suffering = {**os.environ, "FORGE_FAULT": "nan*99@loss"}
    done = forge("train", "run.yaml", "--set", "training.max_steps=12", cwd=workspace, env=suffering)
    assert done.returncode == 10, done.stderr
    assert "step 2" in done.stderr and "rows" in done.stderr and "Traceback" not in done.stderr
    assert "DivergedError" in (workspace / "runs/run/logs/forge.log").read_text()


def test_ctrl_c_stops_cleanly(workspace):
    process = subprocess.Popen(
        [sys.executable, "-m", "forge_cli", "train", "run.yaml", "--set", "training.max_steps=100000"],
        cwd=workspace,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Shells start background jobs with SIGINT ignored, and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    metrics = workspace / "runs/run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.is_file() and '"grad_norm"' in metrics.read_text()):
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopped by Ctrl-C" in errors and "Traceback" not in errors
    assert not list((workspace / "runs").rglob("*.partial"))
    assert all(json.loads(line) for line in metrics.read_text().splitlines())
