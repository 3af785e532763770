"""The model card says what was measured, and nothing of this machine."""

from __future__ import annotations

import json

import pytest
import yaml

from forge_cli.resolve.plan import dump_plan, resolve_mapping
from forge_cli.results.card import build_card, name_base
from forge_cli.results.find import Run

REPORT = {
    "losses": {"eval_before": 2.5, "eval_raw": 1.25, "eval_ema": None, "train_first": 2.6, "train_last": 1.2},
    "exact_match_ratio": {"before": 0.0, "after": 0.5},
    "steps": 7,
    "training_seconds": 65.0,
    "tokens": 12345,
    "peak_memory_bytes": 2**30,
    "peak_memory_of": "GPU, allocated",
    "trainable": {"num_parameters": 2_000_000, "num_trainable_parameters": 50_000},
    "compute": {"device": "H", "dtype": "bfloat16"},
    "data": {"splits": [{"name": "train", "rows_read": 12000, "rows_kept": 11999, "tokens": 5, "trained_tokens": 4}]},
}


@pytest.fixture
def make_run(tmp_path):
    def make(report: dict, **settings) -> Run:
        path = tmp_path / "my-run"
        (path / "adapter").mkdir(parents=True, exist_ok=True)
        plan = {
            "model": {"name": "forge-tiny"},
            "data": {"train": "forge:quickstart/train", "max_length": 128},
            "lora": {"r": 4},
        }
        (path / "plan.yaml").write_text(dump_plan(resolve_mapping({**plan, **settings})))
        (path / "report.json").write_text(json.dumps(report))
        (path / "adapter" / "chat.json").write_text('{"end_tokens": ["</s>"], "end_token_ids": [2]}')
        return Run(path)

    return make


def test_the_card_holds_the_measured_figures(make_run):
    run = make_run(REPORT)
    card = build_card(run)
    for part in (
        "2.5000 before, 1.2500 after",
        "0.0 % before, 50.0 % after",
        "7 steps in 1:05",
        run.plan.digest,
        "`</s>`",
    ):
        assert part in card
    assert "| train | 12 000 | 11 999 | 5 | 4 |" in card
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "peft" and "base_model" not in head  # forge-tiny is not on the hub


def test_what_was_not_measured_is_not_claimed(make_run):
    card = build_card(make_run({}))
    for part in ("loss", "exact", "memory", "steps in", "## Measured", "## Data", "None"):
        assert part not in card


def test_a_base_in_a_folder_is_named_without_the_folder(make_run, tmp_path):
    folder = tmp_path / "secret-customer" / "base"
    folder.mkdir(parents=True)
    assert name_base(str(folder)) == ("base", False)
    assert name_base("org/model") == ("org/model", True)
    run = make_run(REPORT)
    spec = run.plan.spec
    model = spec.model.model_copy(update={"name": str(folder)})
    vars(run)["plan"] = run.plan._replace(spec=spec.model_copy(update={"model": model}))
    card = build_card(run)
    assert "secret-customer" not in card and str(tmp_path) not in card
    assert "of base." in card


def test_tokens_never_reach_the_card(make_run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-mine")
    report = {**REPORT, "compute": {"device": "a-token-of-mine", "dtype": "bfloat16"}}
    assert "a-token-of-mine" not in build_card(make_run(report))
