"""What a run file may say about preferences: every method, and what does not go together."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest

from forge_cli.errors import ConfigError
from forge_cli.paths import data_root
from forge_cli.resolve.plan import dump_plan, resolve_mapping, resolve_plan
from forge_cli.resolve.rules_preference import LOSSES

PRESETS = ("dpo", "kto", "orpo", "simpo", "cpo", "reward")


def resolve(method: str = "dpo", **changes):
    base = {
        "method": method,
        "model": {"name": "forge-tiny"},
        "data": {"train": "forge:preference/train", "max_length": 128},
        "lora": {},
    }
    for section, value in changes.items():
        merge = isinstance(base.get(section), dict) and isinstance(value, dict)
        base[section] = {**base[section], **value} if merge else value
    return resolve_mapping(base)


def refuse(*args, **changes) -> str:
    with pytest.raises(ConfigError) as error:
        resolve(*args, **changes)
    assert len(error.value.problems) == 1, str(error.value)
    return str(error.value)


@pytest.mark.parametrize("method", ["sft", "dpo", "kto", "orpo", "cpo", "reward"])
def test_without_a_section_the_defaults_hold_and_the_plan_says_them(method, tmp_path):
    plan = resolve(method)
    assert resolve(method, preference={}).digest == plan.digest
    (tmp_path / "plan.yaml").write_text(dump_plan(plan))
    assert resolve_plan(tmp_path / "plan.yaml").digest == plan.digest


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("sft", "beta", 0.2),
        ("dpo", "simpo_gamma", 1.0),
        ("dpo", "desirable_weight", 2.0),
        ("dpo", "label_smoothing", 0.1),  # the sigmoid loss of TRL's DPO does not read it
        ("kto", "loss_weights", [1.0]),
        ("orpo", "reference", "base"),
        ("cpo", "precompute_ref_log_probs", True),
        ("cpo", "simpo_gamma", 1.0),
        ("reward", "beta", 0.2),
    ],
)
def test_a_setting_that_the_method_does_not_read_is_an_error(method, name, value):
    assert f"preference.{name}: has no effect" in refuse(method, preference={name: value})


def test_settings_of_other_sections_that_a_method_does_not_read():
    assert "without dropout" in refuse(lora={"lora_dropout": 0.1})
    assert "the answers are trained" in refuse(data={"train_on": "all"})
    assert "scores answers" in refuse("reward", report={"max_new_tokens": 9})


@pytest.mark.parametrize("method", LOSSES)
def test_each_method_takes_its_losses_alone(method):
    for loss in LOSSES[method]:
        smoothing = {"label_smoothing": 0.01} if loss == "exo_pair" else {}
        resolve(method, preference={"loss_type": loss, **smoothing})
    stranger = next(loss for other, losses in LOSSES.items() for loss in losses if loss not in LOSSES[method])
    assert f"{method} has no loss {stranger}" in refuse(method, preference={"loss_type": stranger})


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("dpo", {"preference": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}}, "1 weights for 2 losses"),
        ("dpo", {"preference": {"loss_type": ["ipo", "ipo"]}}, "twice"),
        ("dpo", {"preference": {"loss_type": "exo_pair"}}, "exo_pair needs label_smoothing"),
        ("cpo", {"preference": {"loss_type": ["sigmoid", "hinge"]}}, "only dpo adds losses up"),
        ("dpo", {"preference": {"reference": "adapter"}}, "no adapter that the run goes on with"),
        ("kto", {"preference": {"reference": "no/such/folder"}}, "no folder of an adapter or a model"),
        ("dpo", {"data": {"packing": True}}, "packing is for sft"),
        ("orpo", {"data": {"padding_free": True}}, "padding_free is for sft"),
        ("kto", {"training": {"per_device_train_batch_size": 1}}, "at least 2 rows"),
        ("kto", {"training": {"train_sampling_strategy": "group_by_length"}}, "keeps its batches"),
        ("dpo", {"quantization": {}, "lora": None}, "4-bit weights cannot be trained"),
        ("dpo", {"model": {"adapter": "no/such/adapter"}}, "holds no adapter"),
    ],
)
def test_contradictions(method, changes, words):
    assert words in refuse(method, **changes)


def test_an_adapter_is_described_by_the_plan(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    model = {"adapter": str(tmp_path)}
    resolve(model=model, preference={"reference": "adapter"})
    resolve("sft", model=model)
    assert "write lora: {r: 4, lora_alpha: 8}" in refuse(model=model, lora=None)
    assert "a reward model starts with a new head" in refuse("reward", model=model)
    assert "model.adapter is where the adapter starts" in refuse(model=model, lora={"init_lora_weights": "gaussian"})


@pytest.mark.parametrize(
    ("rate", "alpha", "warns"),
    # r is 16. The usual products are 1e-5 to 4e-4.
    [(5e-6, 32, False), (1e-4, 64, False), (2e-4, 8, False), (2e-4, 64, True), (1e-6, 32, True), (5e-6, 16, True)],
)
def test_a_step_far_from_what_is_usual_is_told(rate, alpha, warns):
    told = resolve(training={"learning_rate": rate}, lora={"lora_alpha": alpha}).derived.warnings
    assert any("learning_rate" in one for one in told) == warns
    told = resolve("sft", training={"learning_rate": rate}, lora={"lora_alpha": alpha}).derived.warnings
    assert not any("learning_rate" in one for one in told)


def test_experimental_methods_are_marked():
    marked = f"is experimental in TRL {version('trl')}:"
    for method in ("orpo", "cpo"):
        assert any(one.startswith(f"{method} {marked}") for one in resolve(method).derived.warnings)
    assert not any(marked in one for one in resolve("dpo").derived.warnings)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_their_method_without_warnings(name):
    assert (data_root() / "configs" / "presets" / f"{name}.yaml").is_file()
    data = {"train": "forge:preference/train", "max_length": 128}
    plan = resolve_mapping({"preset": name, "model": {"name": "forge-tiny"}, "data": data})
    assert plan.spec.method == {"simpo": "cpo"}.get(name, name)
    assert [one for one in plan.derived.warnings if "experimental" not in one] == []
    assert plan.derived.effective_batch_size == 16
