"""Runs in which memory runs out: same steps, same weights; `tests/campaign/oom.py` has more places."""

from __future__ import annotations

import json

import pytest
import torch
from preference_pairs import LORA, Listener, run
from safetensors.torch import load_file

from forge_cli import faults
from forge_cli.backend.batch_parts import cut, join_figures
from forge_cli.errors import MachineError, MemoryExceeded
from forge_cli.parts.memory import is_out_of_memory
from forge_cli.run.process import translated_errors

BATCHES = {
    "learning_rate": 2e-4,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "activation_checkpointing": False,
}


@pytest.fixture
def disturbed(tiny_settings, monkeypatch):
    """Trains under a fault; returns final weights, records of steps and alarms."""

    def train(fault: str, **changes):
        monkeypatch.setenv(faults.VARIABLE, fault)
        faults._read_plan.cache_clear()
        listener = Listener()
        name = "disturbed" if fault else "straight"
        result = run(tiny_settings(**{"name": name, "lora": LORA, "training": BATCHES, **changes}), listener)
        weights = [tensor for path in result.weights.glob("*.safetensors") for tensor in load_file(path).values()]
        records = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
        steps = [one for one in records if "tokens" in one]
        return weights, steps, [one["message"] for one in records if one.get("alarm") == "memory"]

    yield train
    monkeypatch.undo()
    faults._read_plan.cache_clear()


@pytest.mark.parametrize(
    ("fault", "changes", "alarms"),
    [
        ("oom*2@backward.2:2", {}, ["4 are trained as 2 x 2", "4 are trained as 4 x 1"]),
        ("oom*2@forward:2", {"data": {"packing": True}, "training": {**BATCHES, "per_device_train_batch_size": 2}},
         ["2 are trained as 2 x 1", "2 are trained in 4 parts"]),
        ("oom@backward:2", {"method": "dpo", "data": {"train": "forge:preference/train"},
                            "training": {**BATCHES, "per_device_train_batch_size": 3}},
         ["3 are trained in 2 parts"]),
    ],
    ids=["sft", "packed", "dpo"],
)  # fmt: skip
def test_a_step_is_made_again_in_parts(disturbed, fault, changes, alarms):
    (weights, steps, _), (others, again, said) = disturbed("", **changes), disturbed(fault, **changes)
    assert len(said) == len(alarms) and all(part in text for part, text in zip(alarms, said, strict=True))
    assert max((a - b).abs().max().item() for a, b in zip(weights, others, strict=True)) <= 1e-6
    assert [one["tokens"] for one in steps] == [one["tokens"] for one in again]
    for name in ("loss", "grad_norm", *(key for key in steps[-1] if "/" in key)):
        assert [one[name] for one in steps] == pytest.approx([one[name] for one in again], rel=1e-5, abs=2e-6)


def test_one_row_at_a_time_is_the_end(disturbed):
    with pytest.raises(MemoryExceeded, match="with one row at a time") as caught:
        disturbed("oom*3@forward:1", data={"max_length": 512})
    assert "--set " in caught.value.problems[0].fix and caught.value.exit_code == 11


def test_parts_are_as_equal_as_can_be():
    assert [len(one) for one in cut([{}] * 5, 2)] == [3, 2] and [len(one) for one in cut([{}] * 3, 4)] == [1, 1, 1]
    packed = {"input_ids": [1, 2, 3], "labels": [4, 5, 6], "seq_lengths": [1, 2]}
    assert cut([packed], 1) == [[packed]]
    assert cut([packed], 2)[1] == [{"input_ids": [2, 3], "labels": [5, 6], "seq_lengths": [2]}]
    figures = {"won": [9.0, 1.0, 4.0]}
    join_figures(figures, {"won": 1}, [2 / 3, 1 / 3])
    assert figures == {"won": [9.0, 2.0]}


def test_what_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (caught.value, torch.OutOfMemoryError(), MemoryError(), RuntimeError("CUDA error: out of memory"),
                  OSError(12, "Cannot allocate memory")):  # fmt: skip
        assert is_out_of_memory(error)
    for error in (RuntimeError("shapes differ"), OSError(28, "No space left"), MachineError("out of memory")):
        assert not is_out_of_memory(error)


def test_memory_of_the_host_is_exit_11_even_if_advice_fails(tmp_path):
    def advise() -> str:
        raise MemoryError

    with pytest.raises(MemoryExceeded, match="lower training"), translated_errors(tmp_path / "log", advise):
        raise MemoryError
