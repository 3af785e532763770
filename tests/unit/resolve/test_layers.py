"""Who wins, and who is remembered."""

from __future__ import annotations

from pathlib import Path

import pytest

from forge_cli.errors import ConfigError
from forge_cli.paths import data_root
from forge_cli.resolve import layers as layers_module
from forge_cli.resolve.layers import load_preset, load_recipe, stack_layers
from forge_cli.resolve.plan import resolve_plan
from forge_cli.resolve.yaml_reader import read_yaml_text

BASE = "model: {name: forge-tiny}\ndata: {train: forge:quickstart/train, max_length: 128}\n"


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A data folder of its own: write(name, text) puts a preset or recipe on it."""
    root = tmp_path / "shelf"
    (root / "configs" / "presets").mkdir(parents=True)
    (root / "recipes").mkdir()
    monkeypatch.setattr(layers_module, "data_root", lambda: root)

    def write(kind: str, name: str, text: str) -> None:
        folder = root / "configs" / "presets" if kind == "preset" else root / "recipes"
        (folder / f"{name}.yaml").write_text(text)

    return write


def stack(text: str, *overrides: str):
    return stack_layers(read_yaml_text(text, "run.yaml"), overrides)


def test_five_layers_and_their_history(shelf):
    shelf("preset", "p", "lora:\n  r: 1\n  lora_alpha: 1\n  lora_dropout: 0.1\n")
    shelf("recipe", "one", "preset: p\nlora:\n  r: 2\n  lora_alpha: 2\n")
    merged = stack("extends: one\nlora: {r: 3}\n", "lora.r=4")
    assert merged.problems == []
    assert merged.values["lora"] == {"r": 4, "lora_alpha": 2, "lora_dropout": 0.1}
    assert [(one.kind, one.where, one.value) for one in merged.history["lora.r"]] == [
        ("default", "schema default", 16),
        ("preset", "preset p (p.yaml:2)", 1),
        ("recipe", "recipe one (one.yaml:3)", 2),
        ("file", "run.yaml:2:8", 3),
        ("set", "--set", 4),
    ]


def test_mappings_merge_lists_are_replaced(shelf):
    shelf("preset", "p", "lora: {target_modules: [a, b, c], r: 4}\n")
    merged = stack("preset: p\nlora: {target_modules: [d]}\n")
    assert merged.values["lora"] == {"target_modules": ["d"], "r": 4}


def test_null_switches_a_section_off_and_a_stronger_layer_on_again(shelf):
    shelf("preset", "p", "lora: {r: 4, lora_alpha: 9}\n")
    shelf("recipe", "one", "preset: p\nlora: null\n")
    assert stack("extends: one\n").values["lora"] is None
    merged = stack("extends: one\nlora: {r: 5}\n")
    assert merged.values["lora"] == {"r": 5}
    assert [one.value for one in merged.history["lora.lora_alpha"]] == [32, 9, None, 32]
    assert [one.value for one in merged.history["lora"]] == [None, {}, None, {}]


def test_null_switches_a_default_section_off(plan_of):
    plan = plan_of("", "monitor=null")
    assert plan.spec.monitor is None and plan.origin("monitor").where == "--set"


@pytest.mark.parametrize(
    ("file", "overrides", "preset"),
    [
        ("extends: one\n", (), "p"),
        ("extends: one\npreset: q\n", (), "q"),
        ("extends: one\npreset: q\n", ("preset=p",), "p"),
        ("extends: one\npreset: null\n", (), None),
        ("preset: q\n", ("extends=one",), "q"),
    ],
)
def test_the_strongest_layer_names_the_preset(shelf, file, overrides, preset):
    shelf("preset", "p", "seed: 1\n")
    shelf("preset", "q", "seed: 2\n")
    shelf("recipe", "one", "preset: p\n")
    merged = stack(file, *overrides)
    assert merged.values.get("preset") == preset
    assert merged.values.get("seed") == {"p": 1, "q": 2, None: None}[preset]


def test_recipes_on_recipes_but_not_in_circles(shelf):
    shelf("recipe", "base", "seed: 1\nname: base\n")
    shelf("recipe", "middle", "extends: base\nseed: 2\n")
    merged = stack("extends: middle\n")
    assert merged.values["seed"] == 2 and merged.values["name"] == "base"
    shelf("recipe", "base", "extends: middle\n")
    assert "in a circle: middle > base > middle" in str(stack("extends: middle\n").problems[0])
    for number in range(9):
        shelf("recipe", f"r{number}", f"extends: r{number + 1}\n")
    assert "more than 5 recipes" in str(stack("extends: r0\n").problems[0])


def test_every_layer_is_checked(shelf):
    shelf("preset", "p", "seeed: 1\nextends: x\n")
    shelf("recipe", "one", "preset: p\nlora:\n  rank: 2\n")
    problems = stack("extends: one\nlora: {ranc: 1}\n", "lora.rr=2").problems
    places = [(one.where.rpartition("/")[2], one.path) for one in problems]
    assert ("p.yaml:2:1", "extends") in places
    assert ("preset p (p.yaml:1)", "seeed") in [(one.where, one.path) for one in problems]
    assert ("recipe one (one.yaml:3)", "lora.rank") in [(one.where, one.path) for one in problems]
    assert ("run.yaml:2:8", "lora.ranc") in places
    assert ("--set", "lora.rr") in places


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "~", "a\0b", "Q", "", "x" * 300, "sft.yaml"])
def test_names_are_no_paths(name):
    for load in (load_preset, load_recipe):
        with pytest.raises(ConfigError, match="there is no"):
            load(name)


def test_unknown_preset_names_the_nearest(problems_of):
    assert "did you mean qlora?" in str(problems_of(BASE + "preset: qlroa\n")[0])
    assert "known: cpo" in str(problems_of(BASE + "preset: zzz\n")[0])


def test_shipped_presets_resolve(write):
    names = sorted(path.stem for path in (data_root() / "configs" / "presets").glob("*.yaml"))
    assert len(names) >= 4
    for name in names:
        plan = resolve_plan(write(BASE + f"preset: {name}\n"))
        assert plan.spec.preset == name
        assert any(origins[-1].kind == "preset" for origins in plan.history.values())


@pytest.mark.parametrize(
    ("file", "override"),
    [
        ("lora: {r: 8}", "lora.r=8"),
        ("lora: {}", "lora={}"),
        ("checkpoint: null", "checkpoint=null"),
        ("lora: {target_modules: [q_proj, v_proj]}", "lora.target_modules=[q_proj, v_proj]"),
        ("training: {learning_rate: 2e-4}", "training.learning_rate=2e-4"),
        ("freeze: {first: 50%}", "freeze.first=50%"),
        ("name: a", "name=a"),
    ],
)
def test_set_is_the_same_as_the_line_in_the_file(write, file, override):
    in_file = resolve_plan(write(BASE + file + "\n"))
    by_set = resolve_plan(write(BASE), [override])
    assert in_file.spec == by_set.spec and in_file.digest == by_set.digest


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lora.r", 'no "=" in --set "lora.r"'),
        ("=3", "no path before the ="),
        ("lora.rank=3", "--set lora.rank: unknown key; Forge calls it lora.r"),
        ("training.learning_rate=abc", '--set training.learning_rate: expected a number; this is the text "abc"'),
        ("training.lr=1", "Forge calls it training.learning_rate"),
        ("name=yes", "quote it"),
        ("name=", "--set name: there is no value"),
        ("training.max_steps.x=1", "expected a whole number or null"),
        ("training=3", "settings are expected here"),
        ("training=null", "cannot be switched off"),
        ("model=gpt2", "write model: {name: gpt2}"),
        ("name=[a", "a [ is not closed"),
    ],
)
def test_bad_overrides(problems_of, override, words):
    problems = problems_of(BASE, override)
    assert len(problems) == 1 and words in str(problems[0]) and problems[0].where == "--set"


def test_a_hidden_value_is_not_lost(plan_of):
    plan = plan_of("preset: lora\nlora: {r: 8}\n", "lora.r=4")
    assert [one.value for one in plan.history["lora.r"]] == [16, 16, 8, 4]
    with pytest.raises(TypeError):
        plan.history["lora.r"] = ()
    assert isinstance(Path(plan.source), Path) and plan.source == "run.yaml"
