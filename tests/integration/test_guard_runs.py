"""Whole runs with losses and gradients made bad on demand: what is skipped, what is left out, how they end."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from forge_cli import faults
from forge_cli.errors import ConfigError, DivergedError
from forge_cli.resolve.plan import resolve_mapping
from forge_cli.run.execute import train_plan
from forge_cli.run.reporter import QuietReporter

LORA = {"r": 4, "lora_alpha": 8}
PLAIN = {"lr_scheduler_type": "constant", "activation_checkpointing": False, "gradient_accumulation_steps": 1}
EVERY = {"save_steps": 1, "save_total_limit": 20}


@pytest.fixture
def suffer(monkeypatch):
    """Sets the faults of the next run."""

    def plan(text: str) -> None:
        monkeypatch.setenv(faults.VARIABLE, text)
        faults._read_plan.cache_clear()

    yield plan
    monkeypatch.undo()
    faults._read_plan.cache_clear()


def run(settings: dict):
    return train_plan(resolve_mapping(settings), reporter=QuietReporter())


def read_guard(folder, step: int) -> dict:
    state = json.loads((folder / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())
    tree = dict(dict(state["monitor"]["dict"])["guard"]["dict"])
    return {name: tree[name]["list"] if isinstance(tree[name], dict) else tree[name] for name in tree}


def have_same_bits(folder, *steps: int) -> bool:
    first, second = (load_file(folder / "checkpoints" / f"step-{n:08d}" / "weights.safetensors") for n in steps)
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", ["packed", "dpo"])
def test_after_three_bad_steps_their_rows_are_left_out_for_good(kind, pair_settings, tiny_settings, trainers, suffer):
    training = {**PLAIN, "max_steps": 5}
    packed = {"lora": LORA, "data": {"train": "forge:quickstart/train", "max_length": 128, "packing": True}}
    make = pair_settings if kind == "dpo" else lambda **changes: tiny_settings(**packed, **changes)
    suffer("nan@loss:1,nan@gradient:2,inf@loss:3")
    settings = make(training=training, checkpoint={"save_steps": 5}, name="run")
    result = run(settings)
    alarms = [one for one in result.report["alarms"] if one["alarm"] == "skipped"]
    assert [one["step"] for one in alarms] == [1, 2, 3]
    assert [one["step"] for one in result.report["alarms"] if one["alarm"] == "empty"] == [2, 3]
    bad = sorted({row for one in alarms for row in one["rows"]})
    guard = trainers[-1].monitor.guard
    assert sorted(guard.excluded) == bad and guard.num_rollbacks == 1
    # Steps 2 and 3 are made again from the checkpoint of step 1, and have no row left to learn from.
    records = [one for one in trainers[-1].monitor.records if "grad_norm" in one]
    assert [one["step"] for one in records] == [1, 2, 3, 4, 5]
    assert [one.get("skipped", False) for one in records] == [True, True, True, False, False]
    assert read_guard(result.folder, 5)["excluded"] == bad  # a resumed run leaves them out, too
    assert have_same_bits(result.folder, 1, 5) is False
    assert json.loads((result.folder / "report.json").read_text(), parse_constant=pytest.fail)["steps"] == 5


@pytest.mark.parametrize("on_spike", ["skip", "rollback", "stop"])
def test_a_spike_is_met_as_configured(on_spike, tiny_settings, suffer):
    suffer("spike@loss:7")
    training = {**PLAIN, "max_steps": 8}
    monitor = {"on_spike": on_spike, "spike_window": 5}
    settings = tiny_settings(lora=LORA, training=training, monitor=monitor, checkpoint=EVERY, name="spike")
    if on_spike == "stop":
        with pytest.raises(DivergedError, match=r"step 7: the loss .* times its running median.*step-00000006"):
            run(settings)
        return
    result = run(settings)
    (alarm,) = (one for one in result.report["alarms"] if one["alarm"] == "skipped")
    assert alarm["step"] == 7 and len(alarm["rows"]) == 2 and "its running median" in alarm["message"]
    assert have_same_bits(result.folder, 6, 7) and not have_same_bits(result.folder, 7, 8)
    guard = read_guard(result.folder, 8)
    assert guard["excluded"] == (alarm["rows"] if on_spike == "rollback" else [])
    assert guard["num_rollbacks"] == (on_spike == "rollback") and max(guard["losses"]) < 100


def test_without_checkpoints_the_third_bad_step_ends_the_run(tiny_settings, suffer):
    suffer("nan*99@gradient")
    with pytest.raises(DivergedError, match=r"step 3: the gradient is not finite, 1 of \d+ gradients"):
        run(tiny_settings(lora=LORA, training={**PLAIN, "max_steps": 9}, checkpoint=None))


def test_going_back_needs_checkpoints(tiny_settings):
    with pytest.raises(ConfigError, match="checkpoint: null keeps none"):
        resolve_mapping(
            tiny_settings(lora=LORA, checkpoint=None, monitor={"on_spike": "rollback"}, training={"max_steps": 99})
        )
