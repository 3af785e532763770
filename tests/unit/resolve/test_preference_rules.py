"""What a run file may say about preferences: every method, and what does not go together."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

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


@pytest.fixture
def save_adapter(tmp_path, monkeypatch):
    """Writes the file that PEFT writes, with a few other values, into a folder named adapter."""
    monkeypatch.chdir(tmp_path)

    def save(text: str = "", **changes) -> dict:
        config = {"peft_type": "LORA", "base_model_name_or_path": "somewhere/forge-tiny", "r": 4, "lora_alpha": 8}
        config |= {"use_rslora": True, "use_dora": False, "lora_dropout": 0.3, "modules_to_save": None}
        config |= {"target_modules": ["v_proj", "q_proj"], "layers_to_transform": None, **changes}
        Path("adapter").mkdir(exist_ok=True)
        Path("adapter/adapter_config.json").write_text(text or json.dumps(config))
        return {"name": "forge-tiny", "adapter": "adapter"}

    return save


@pytest.mark.parametrize("base", [{}, {"preset": "dpo"}, {"preset": "sft"}, {"extends": "tiny-dpo"}])
def test_a_run_takes_the_shape_of_the_adapter_that_it_goes_on_with(save_adapter, base):
    data = {"train": "forge:preference/train" if "sft" not in base.values() else "forge:quickstart/train"}
    plan = resolve_mapping({**base, "model": save_adapter(), "data": {**data, "max_length": 128}})
    values = {"r": 4, "lora_alpha": 8, "use_rslora": True, "use_dora": False, "modules_to_save": []}
    values["target_modules"] = ["q_proj", "v_proj"]
    for name, value in values.items():
        assert getattr(plan.spec.lora, name) == value
        assert plan.origin(f"lora.{name}").where == "adapter/adapter_config.json"
    assert plan.spec.lora.lora_dropout == 0, "dropout is the run's own"
    Path("plan.yaml").write_text(dump_plan(plan))
    assert "r: 4" in dump_plan(plan) and "# adapter/adapter_config.json" in dump_plan(plan)
    assert resolve_plan(Path("plan.yaml")).digest == plan.digest


def test_names_in_another_order_are_the_same_plan(save_adapter):
    digests = {
        resolve(model=save_adapter(target_modules=one)).digest for one in (["q_proj", "v_proj"], ["v_proj", "q_proj"])
    }
    assert len(digests) == 1
    assert resolve(model=save_adapter(target_modules=".*q_proj")).spec.lora.target_modules == "all-linear"


def test_what_a_run_file_says_otherwise_is_refused_at_its_line(save_adapter):
    save_adapter()
    base = "model: {name: forge-tiny, adapter: adapter}\ndata: {train: forge:quickstart/train, max_length: 128}\n"
    Path("run.yaml").write_text(base + "lora:\n  r: 8\n  target_modules: [q_proj]\n  lora_dropout: 0.1\n")
    with pytest.raises(ConfigError) as error:
        resolve_plan(Path("run.yaml"))
    assert str(error.value) == (
        "run.yaml:4:3 lora.r: r is 8 here and 4 in the adapter adapter; leave it out, or write r: 4\n"
        'run.yaml:5:3 lora.target_modules: target_modules is ["q_proj"] here and ["q_proj", "v_proj"] in the adapter '
        'adapter; leave it out, or write target_modules: ["q_proj", "v_proj"]'
    )
    Path("run.yaml").write_text(base + "lora: {r: 4, lora_alpha: 8.0, target_modules: [v_proj, q_proj]}\n")
    resolve_plan(Path("run.yaml"))
    with pytest.raises(ConfigError, match=r"^--set lora\.lora_alpha: lora_alpha is 16 here and 8 in the adapter"):
        resolve_plan(Path("run.yaml"), ["lora.lora_alpha=16"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_model_name_or_path": "org/other"}, "trained on org/other, and model.name is forge-tiny; on other"),
        ({"peft_type": "IA3"}, "holds an adapter of the type IA3; Forge goes on with LoRA adapters"),
        ({"text": "{"}, "adapter_config.json of adapter cannot be read: Expecting property name"),
        ({"text": "[" * 100_000}, "adapter_config.json of adapter cannot be read"),
        ({"text": "[1]"}, "holds an adapter of the type None"),
        ({"r": "four"}, "lora.r: "),
        ({"r": 0}, "lora.r: "),
    ],
)
def test_an_adapter_that_is_of_no_use_is_refused_before_anything_is_loaded(save_adapter, changes, words):
    assert words in refuse(model=save_adapter(**changes))


def test_an_adapter_and_what_does_not_go_with_it(save_adapter):
    model = save_adapter()
    resolve(model=model, preference={"reference": "adapter"})
    assert "remove the line: the adapter's own values are taken" in refuse(model=model, lora=None)
    assert "a reward model starts with a new head" in refuse("reward", model=model)
    assert "model.adapter is where the adapter starts" in refuse(model=model, lora={"init_lora_weights": "gaussian"})
    assert "no/model" in refuse(model={**model, "name": "./no/model"}), "and nothing about the adapter"


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
    (told,) = (one for one in resolve("cpo", preference={"loss_type": "simpo"}).derived.warnings if marked in one)
    assert told.startswith(f"simpo (method: cpo) {marked}")
    assert not any(marked in one for one in resolve("dpo").derived.warnings)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_their_method_without_warnings(name):
    assert (data_root() / "configs" / "presets" / f"{name}.yaml").is_file()
    data = {"train": "forge:preference/train", "max_length": 128}
    plan = resolve_mapping({"preset": name, "model": {"name": "forge-tiny"}, "data": data})
    assert plan.spec.method == {"simpo": "cpo"}.get(name, name)
    assert [one for one in plan.derived.warnings if "experimental" not in one] == []
    assert plan.derived.effective_batch_size == 16
