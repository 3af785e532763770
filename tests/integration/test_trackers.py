"""What trackers are sent, and where: they write into the run folder, without a network, and are read back."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
from pathlib import Path

import pytest

from forge_cli.errors import MachineError
from forge_cli.resolve.plan import resolve_mapping
from forge_cli.run.execute import train_plan
from forge_cli.run.reporter import QuietReporter


def needs(package: str) -> pytest.MarkDecorator:
    """Skips where a package is not installed. It is not imported: trackio reads its folder when it is."""
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f'pip install "forge-finetune[{package}]"')


pytestmark = [pytest.mark.slow, needs("tensorboard")]
STEPS = 4


def train(folder: Path, *trackers: str) -> Path:
    """Trains four steps, evaluated before the first and after every second, from an empty working folder."""
    settings = {
        "model": {"name": "forge-tiny"},
        "data": {"train": "forge:quickstart/train", "eval": "forge:quickstart/heldout", "max_length": 128},
        "lora": {"r": 4},
        "training": {"max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
        "evaluation": {"eval_steps": 2, "per_device_eval_batch_size": 30},
        "logging": {"logging_steps": 1, "report_to": list(trackers)},
        "checkpoint": None,
        "report": None,
        "output_dir": "runs",
        "name": "tracked",
    }
    before = Path.cwd()
    os.chdir(folder)
    try:
        result = train_plan(resolve_mapping(settings), reporter=QuietReporter())
    finally:
        os.chdir(before)
    return folder / result.folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("trackers"), "tensorboard")


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_nothing_is_written_beside_the_run_folder(run):
    assert [path.name for path in run.parent.iterdir()] == [run.name]
    assert [path.name for path in run.parent.parent.iterdir()] == ["runs"]
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))


def test_the_figures_of_every_step_arrive(run):
    events = read_events(run / "tensorboard")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [one for one in records if "loss" in one]
    evaluations = [one for one in records if "eval_loss" in one]
    assert [one["step"] for one in steps] == [1, 2, 3, 4] and [one["step"] for one in evaluations] == [0, 2, 4]
    for tag, name in (("train/loss", "loss"), ("train/grad_norm", "grad_norm")):
        assert events[tag] == [(one["step"], pytest.approx(one[name], rel=1e-3)) for one in steps], tag
    assert [step for step, _ in events["train/learning_rate"]] == [1, 2, 3, 4]
    assert events["eval/loss"] == [(one["step"], pytest.approx(one["eval_loss"], rel=1e-6)) for one in evaluations]


def list_losses(run: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(one["step"], pytest.approx(one["loss"], rel=1e-3)) for one in records if "loss" in one]


@needs("mlflow")
def test_mlflow_writes_a_data_base_in_the_run_folder(tmp_path):
    run = train(tmp_path, "mlflow")
    with sqlite3.connect(run / "mlflow.db") as base:
        assert base.execute("select name, status from runs").fetchall() == [("tracked", "FINISHED")]
        query = "select step, value from metrics where key = 'loss' order by step"
        assert base.execute(query).fetchall() == list_losses(run)
        assert ("forge",) in base.execute("select name from experiments").fetchall()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@needs("trackio")
def test_trackio_writes_a_data_base_in_the_run_folder(tmp_path):
    run = train(tmp_path, "trackio")
    with sqlite3.connect(run / "trackio" / "forge.db") as base:
        rows = base.execute("select run_name, step, metrics from metrics order by step").fetchall()
    sent = [(name, step, json.loads(metrics)) for name, step, metrics in rows]
    assert {name for name, _, _ in sent} == {"tracked"}
    # It counts what it is sent: the evaluation after step 2 is its third.
    assert [one["train/loss"] for _, _, one in sent if "train/loss" in one] == [loss for _, loss in list_losses(run)]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@needs("wandb")
def test_wandb_writes_its_files_in_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = train(tmp_path, "wandb")
    import wandb

    wandb.finish()
    (file,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"tracked" in content and content.count(b"train/loss") >= STEPS
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_tracker_that_cannot_start_is_an_error_before_the_first_step(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(MachineError, match=r"TensorBoard does not start: .*take it out of logging.report_to"):
        train(tmp_path, "tensorboard")


def test_a_tracker_that_fails_later_is_left_out(run, tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    add = SummaryWriter.add_scalar

    def fail(self, tag, value, step):
        if step == 2:
            raise OSError(28, "No space left on device")
        add(self, tag, value, step)

    monkeypatch.setattr(SummaryWriter, "add_scalar", fail)
    other = train(tmp_path, "tensorboard")
    records = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    (alarm,) = (one for one in records if "alarm" in one)
    assert alarm["alarm"] == "tracker" and alarm["step"] == 2
    assert alarm["message"] == "TensorBoard failed and is left out: OSError: [Errno 28] No space left on device"
    assert list_losses(other) == list_losses(run)
    assert [step for step, _ in read_events(other / "tensorboard")["train/loss"]] == [1]
    weights = [one / "adapter" / "adapter_model.safetensors" for one in (run, other)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
