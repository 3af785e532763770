"""Several processes train what one trains, and end together; ``tests/campaign/ranks.py`` does much more of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

CAMPAIGN = Path(__file__).parents[1] / "campaign" / "ranks.py"
RUN_FILE = """\
method: sft
name: {name}
model: {{name: forge-tiny}}
data: {{train: "forge:quickstart/train", eval: "forge:quickstart/heldout", max_length: 128}}
lora: {{r: 4, lora_alpha: 8}}
ema: {{decay: 0.9}}
training: {{max_steps: 4, learning_rate: 1.0e-3, per_device_train_batch_size: {rows}}}
evaluation: {{per_device_eval_batch_size: 7}}
logging: {{logging_steps: 1}}
checkpoint: {{save_steps: 2}}
report: null
"""


def forge(folder: Path, name: str, rows: int, *more: str, **environment: str) -> subprocess.CompletedProcess:
    (folder / f"{name}.yaml").write_text(RUN_FILE.format(name=name, rows=rows))
    command = [sys.executable, "-m", "forge_cli", "train", f"{name}.yaml", *more]
    own = {**os.environ, "FORGE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=180)


def test_two_processes_train_what_one_trains_with_twice_the_rows(tmp_path):
    """Loss, gradient norm, tokens, held-out losses and weights; the held-out rows are no multiple of 2 x 7."""
    alone, both = forge(tmp_path, "alone", 4), forge(tmp_path, "both", 2, "--num-processes", "2")
    assert alone.returncode == both.returncode == 0, alone.stderr + both.stderr
    runs = [tmp_path / "runs" / name for name in ("alone", "both")]
    reports = [json.loads((run / "report.json").read_text()) for run in runs]
    assert reports[0]["losses"] == pytest.approx(reports[1]["losses"], abs=1e-6)
    steps = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    assert sum("grad_norm" in record for record in steps[0]) == 4
    for one, other in zip(*steps, strict=True):
        for name in {"loss", "grad_norm", "tokens"} & one.keys():
            assert one[name] == pytest.approx(other[name], rel=1e-5), (one, other)
    weights = [load_file(run / "adapter" / "adapter_model.safetensors") for run in runs]
    # The order of a sum is another: a difference of 1e-6 of 1e-3 per step.
    assert max((weights[0][name] - weights[1][name]).abs().max() for name in weights[0]) < 1e-5


def test_a_process_that_is_killed_ends_all_of_them_and_is_named(tmp_path):
    fault = {"FORGE_FAULT": "kill@step:2", "FORGE_FAULT_RANK": "1"}
    done = forge(tmp_path, "killed", 1, "--num-processes", "2", **fault)
    assert done.returncode == 14, done.stderr
    assert "process 1 of 2" in done.stderr and "SIGKILL" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the campaign forks")
def test_two_processes_stop_together_and_go_on_to_the_same_bytes():
    done = subprocess.run([sys.executable, str(CAMPAIGN), "--short"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| [143, 143]: 1 | 1 | 0 |" in done.stdout, done.stdout
