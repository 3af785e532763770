"""What a run suggests to do next."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge_cli.resolve.plan import resolve_mapping
from forge_cli.run.next_step import suggest_next
from forge_cli.run.summary import render_summary
from forge_cli.units import GIB

RECIPES = Path(__file__).parents[3] / "recipes"


@pytest.mark.parametrize(
    ("recipe", "small", "big"),
    [
        ("quickstart", "qlora-7b", "qlora-7b"),
        ("tiny-cpt", "cpt-7b-24gb", "cpt-7b-80gb"),
        ("tiny-dora", "dora-7b-24gb", "dora-7b-80gb"),
        ("tiny-dpo", "dpo-7b-24gb", "dpo-7b-80gb"),
        ("tiny-kto", "kto-7b-24gb", "kto-7b-80gb"),
        ("tiny-orpo", "orpo-7b-24gb", "orpo-7b-80gb"),
        ("tiny-reward", "reward-7b-24gb", "reward-7b-80gb"),
        ("tiny-simpo", "simpo-7b-24gb", "simpo-7b-80gb"),
    ],
)
def test_after_the_embedded_model_comes_the_same_on_a_real_one(recipe, small, big):
    spec = resolve_mapping({"extends": recipe}).spec
    for gpu_bytes, name in ((0, small), (24 * GIB, small), (79 * GIB, big)):
        title = (RECIPES / f"{name}.yaml").read_text().splitlines()[0].removeprefix("# ")
        assert suggest_next(spec, Path("runs/x"), gpu_bytes) == f"forge recipes copy {name} my-run.yaml   ({title})"


@pytest.mark.parametrize(("method", "name"), [("sft", "qlora-7b"), ("dpo", "dpo-7b-24gb"), ("cpo", "simpo-7b-24gb")])
def test_without_a_preset_the_method_tells(method, name):
    data = {"train": "forge:preference/train" if method != "sft" else "forge:quickstart/train", "max_length": 128}
    settings = {"method": method, "model": {"name": "forge-tiny"}, "data": data, "lora": {}}
    assert suggest_next(resolve_mapping(settings).spec, Path("runs/x"), 0).startswith(f"forge recipes copy {name} ")


def test_after_ones_own_model_comes_a_conversation_and_a_folders_name_stays(tmp_path):
    data = {"train": "forge:quickstart/train"}
    spec = resolve_mapping({"model": {"name": "smollm2-135m"}, "data": data}).spec
    line = suggest_next(spec, Path("runs/forge-1"), 80 * GIB)
    assert line == "forge chat runs/forge-1"
    report = {
        "losses": {"eval_before": None, "train_first": None},
        "exact_match_ratio": {"after": None},
        "alarms": [],
        "steps": 1,
        "training_seconds": 1.0,
        "tokens_per_second": 1.0,
        "peak_memory_bytes": 1,
        "peak_memory_of": "GPU",
        "estimated_memory_bytes": None,
        "samples": [{"shown": "Say 1.", "before": " \n", "after": "1"}],
        "weights": "adapter",
    }
    shown = [render_summary({**report, "next": one}, tmp_path, ".venv/bin/forge") for one in (line, "less x")]
    assert [one.splitlines()[-1].split(maxsplit=1)[1] for one in shown] == [".venv/bin/" + line, "less x"]
    assert "  asked   Say 1.\n  before  (nothing)\n  after   1\n" in shown[0]
