"""What each shipped recipe hands to TRL, pinned: a library upgrade or a changed default shows as a diff."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from forge_cli.backend.methods import build_training_args, find_trainer
from forge_cli.resolve.plan import resolve_plan

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
# What depends on the machine, or names a run.
LEFT_OUT = {"output_dir", "logging_dir", "run_name", "hub_token", "push_to_hub_token", "dataloader_pin_memory"}


def test_there_are_recipes():
    assert len(RECIPES) >= 26


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_arguments_of_a_recipe(path):
    # Models and rows that are made or brought by the user stand aside: the arguments do not depend on them.
    own = ["model.name=forge-tiny", "data.train=forge:quickstart/train", "data.max_length=128"]
    if " eval:" in path.read_text():
        own.append("data.eval=forge:quickstart/heldout")
    spec = resolve_plan(path, own).spec
    has_eval = bool(spec.data.eval or spec.data.eval_fraction)
    args = build_training_args(
        spec, output_dir=Path("out"), compute_dtype=torch.float32, device="cpu", has_eval=has_eval
    ).to_dict()
    library = find_trainer(spec.method)[1](output_dir="out", bf16=False, use_cpu=True).to_dict()
    shown = {k: v for k, v in args.items() if v != library.get(k) and k not in LEFT_OUT}
    text = json.dumps(shown, indent=1, sort_keys=True, default=str) + "\n"
    golden = ROOT / "tests/golden/arguments" / f"{path.stem}.json"
    if os.environ.get("FORGE_UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text(), "FORGE_UPDATE_GOLDEN=1 rewrites it, if the change is meant"
