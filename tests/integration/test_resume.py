"""Resumed runs: bit for bit, from the newest checkpoint that is whole, never as another run and never silently."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from forge_cli.errors import CheckpointError, ConfigError, DataError, MachineError
from forge_cli.resolve.plan import dump_plan, read_plan, resolve_mapping
from forge_cli.run.execute import Resuming, resume_run, train
from forge_cli.run.reporter import QuietReporter
from forge_cli.run.resume import compare_plans

STEPS, EVERY = 6, 2
FILES = ("weights.safetensors", "optimizer.safetensors", "ema.safetensors", "rng-0.json")


class Listener(QuietReporter):
    """Keeps what a run says."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A run that nobody disturbed: LoRA with dropout, EMA, evaluations in between, a second epoch."""
    folder = tmp_path_factory.mktemp("resume")
    from forge_cli.paths import data_root

    assets = Path(data_root()) / "forge_cli" / "assets"
    lines = (assets / "quickstart" / "train.jsonl").read_text().splitlines()[:8]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    settings = {
        "name": "straight",
        "model": {"name": "forge-tiny"},
        "data": {"train": str(folder / "rows.jsonl"), "eval": "forge:quickstart/heldout", "max_length": 128},
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        "ema": {"decay": 0.9},
        "training": {
            "max_steps": STEPS,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "activation_checkpointing": False,
        },
        "evaluation": {"eval_steps": 3, "per_device_eval_batch_size": 30},
        "checkpoint": {"save_steps": EVERY, "save_total_limit": 9},
        "logging": {"logging_steps": 1},
        "report": None,
        "output_dir": str(folder / "runs"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return train(folder / "run.yaml", reporter=QuietReporter()).folder


def rewind(straight: Path, target: Path, step: int) -> Path:
    """Copies the run as if it had been killed after a step's save and before the end."""
    shutil.copytree(straight, target)
    for path in (target / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    for name in ("adapter", "adapter-raw"):
        shutil.rmtree(target / name)
    facts = json.loads((target / "run.json").read_text())
    del facts["finished"]
    (target / "run.json").write_text(json.dumps(facts))
    return target


def assert_same_bits(a: Path, b: Path) -> None:
    last = f"step-{STEPS:08d}"
    for name in (*(f"checkpoints/{last}/{file}" for file in FILES), "adapter/adapter_model.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    digests = [
        dict(json.loads((run / "checkpoints" / last / "state.json").read_text())["monitor"]["dict"])["rows_digest"]
        for run in (a, b)
    ]
    assert digests[0] == digests[1]


def test_a_moved_run_goes_on_bit_for_bit_and_says_what_is_done_again(straight, tmp_path):
    run = rewind(straight, tmp_path / "moved elsewhere" / "run", 4)
    listener = Listener()
    result = resume_run(run, reporter=listener)
    assert_same_bits(straight, run)
    said = "\n".join(listener.lines)
    assert "resumed from step-00000004, all files verified; 2 steps after it are done again" in said
    steps = [
        json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines() if "grad_norm" in line
    ]
    assert steps == [1, 2, 3, 4, 5, 6]
    before = json.loads((straight / "report.json").read_text())
    for name in ("losses", "steps", "tokens"):
        assert result.report[name] == before[name], name


def test_a_damaged_checkpoint_is_stepped_over_and_named(straight, tmp_path):
    run = rewind(straight, tmp_path / "run", 4)
    weights = run / "checkpoints" / "step-00000004" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors") as error:
        resume_run(run, how=Resuming(require_latest=True), reporter=QuietReporter())
    assert error.value.exit_code == 13
    listener = Listener()
    resume_run(run, reporter=listener)
    assert any("step-00000004 cannot be used: weights.safetensors" in line for line in listener.lines)
    assert_same_bits(straight, run)


def test_only_what_is_left_is_done_when_all_steps_are(straight, tmp_path):
    run = rewind(straight, tmp_path / "run", STEPS)
    listener = Listener()
    resume_run(run, reporter=listener)
    assert any("only the weights and the report are left" in line for line in listener.lines)
    assert_same_bits(straight, run)


def test_a_finished_run_is_not_resumed(straight):
    with pytest.raises(MachineError, match=r"finished.*model\.adapter=.*adapter"):
        resume_run(straight, reporter=QuietReporter())


def test_no_checkpoint_no_resume(straight, tmp_path):
    run = rewind(straight, tmp_path / "run", 0)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        resume_run(run, reporter=QuietReporter())
    assert not (run / "adapter").exists()


def test_changed_settings_are_all_named_and_refused_until_allowed(straight, tmp_path):
    run = rewind(straight, tmp_path / "run", 4)
    changes = ["training.learning_rate=0.5", "lora.r=8", "logging.logging_steps=3"]
    with pytest.raises(ConfigError) as error:
        resume_run(run, changes, reporter=QuietReporter())
    assert [problem.path for problem in error.value.problems] == ["lora.r", "training.learning_rate"]
    # Allowed by name or not, tensors of another shape are no continuation.
    with pytest.raises(CheckpointError, match="lora_A"):
        how = Resuming(allowed_changes=("lora", "training.learning_rate"))
        resume_run(run, changes, how=how, reporter=QuietReporter())


def test_a_setting_without_effect_is_no_change(tmp_path):
    written = {
        "model": {"name": "forge-tiny"},
        "data": {"train": "forge:preference/train", "max_length": 128},
        "preset": "dpo",
    }
    now = resolve_mapping({**written, "training": {"max_steps": 6}})
    folder = tmp_path / "plan.yaml"
    folder.write_text(dump_plan(resolve_mapping({**written, "training": {"max_steps": 4}})))
    before = read_plan(folder)
    assert before.spec.training.num_train_epochs != now.spec.training.num_train_epochs, "the file leaves it out"
    assert compare_plans(before, now, ["training.max_steps"])
    with pytest.raises(ConfigError) as error:
        compare_plans(before, now, [])
    assert [problem.path for problem in error.value.problems] == ["training.max_steps"]


def test_a_harmless_change_is_listed_and_changes_no_bit(straight, tmp_path):
    run = rewind(straight, tmp_path / "run", 2)
    listener = Listener()
    resume_run(run, ["logging.logging_steps=2", "evaluation.eval_steps=1"], reporter=listener)
    assert any("logging.logging_steps was 1 and is 2" in line for line in listener.lines)
    assert_same_bits(straight, run)


def test_changed_rows_are_refused_until_allowed(straight, tmp_path):
    rows = straight.parents[1] / "rows.jsonl"
    text = rows.read_text()
    run = rewind(straight, tmp_path / "run", 4)
    try:
        rows.write_text("\n".join(reversed(text.splitlines())) + "\n")
        with pytest.raises(DataError, match=r"rows\.jsonl") as error:
            resume_run(run, reporter=QuietReporter())
        assert "--allow-change data" in str(error.value)
    finally:
        rows.write_text(text)


def test_a_kill_inside_a_save_costs_the_steps_since_the_one_before(straight, tmp_path):
    """The whole command, a real SIGKILL while the optimizer is half written, and a fresh process that goes on."""
    run_file = straight.parents[1] / "run.yaml"
    forge = [sys.executable, "-m", "forge_cli"]
    where = ["--set", f"output_dir={tmp_path}", "--quiet"]
    environment = {**os.environ, "FORGE_FAULT": "kill@save:optimizer.safetensors:4"}
    killed = subprocess.run([*forge, "train", run_file, *where], env=environment, capture_output=True, check=False)
    assert killed.returncode == -9
    run = tmp_path / "straight"
    assert [path.name for path in (run / "checkpoints").glob("step-*")] != []
    verified = subprocess.run([*forge, "verify", run], capture_output=True, text=True, check=False)
    assert verified.returncode == 0 and "step-00000002  sound" in verified.stdout
    resumed = subprocess.run(
        [*forge, "train", run_file, *where, "--resume"], capture_output=True, text=True, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    assert_same_bits(straight, run)
