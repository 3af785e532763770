"""What trackers are sent, and where: TensorBoard writes its files into the run folder, and they are read back."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

from forge_cli.resolve.plan import resolve_mapping
from forge_cli.run.execute import train_plan
from forge_cli.run.reporter import QuietReporter

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorboard") is None, reason="needs TensorBoard: pip install tensorboard"
    ),
]
STEPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of four steps, evaluated before the first and after every second, from an empty working folder."""
    folder = tmp_path_factory.mktemp("trackers")
    settings = {
        "model": {"name": "forge-tiny"},
        "data": {"train": "forge:quickstart/train", "eval": "forge:quickstart/heldout", "max_length": 128},
        "lora": {"r": 4},
        "training": {"max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
        "evaluation": {"eval_steps": 2, "per_device_eval_batch_size": 30},
        "logging": {"logging_steps": 1, "report_to": ["tensorboard"]},
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
