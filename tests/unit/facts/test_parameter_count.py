"""Parameter counts by formula against models that were built on the meta device."""

from __future__ import annotations

from collections import Counter

import pytest
from meta_models import build_model

from forge_cli.facts.families import FALCON_SEQUENTIAL, FALCON_TWO_NORMS, FAMILIES
from forge_cli.facts.model_facts import find_model_facts, list_models
from forge_cli.facts.parameter_count import (
    count_embedding_parameters,
    count_layer_parameters,
    count_linear_parameters,
    count_parameters,
    linear_modules,
)
from forge_cli.facts.shape import ModelFacts
from forge_cli.facts.shelf import list_shelf
from forge_cli.facts.weights import iterate_weights

SHELF = list_shelf()


# What a local folder may hold though the shelf does not: variants that count differently.
LLAMA = ModelFacts("small", None, None, "llama", 64, 2, 4, 2, 16, 96, 128, False, 64)
VARIANTS = [
    LLAMA._replace(attention_bias=True, feed_forward_bias=True),
    LLAMA._replace(model_type="qwen3", attention_bias=True),
    LLAMA._replace(model_type="granite", tie_word_embeddings=True),
    LLAMA._replace(model_type="ministral3"),
    LLAMA._replace(model_type="gpt_neox", num_key_value_heads=4, attention_bias=False),
    LLAMA._replace(
        model_type="falcon",
        layout=FALCON_SEQUENTIAL,
        num_key_value_heads=4,
        attention_bias=True,
        feed_forward_bias=True,
    ),
    LLAMA._replace(model_type="falcon", layout=FALCON_TWO_NORMS),
    LLAMA._replace(model_type="falcon", num_key_value_heads=1),
]


def test_shelf_holds_every_family():
    assert len(SHELF) >= 89
    here = {facts.layout or facts.model_type for facts in SHELF} | {one.layout or one.model_type for one in VARIANTS}
    assert here == set(FAMILIES)


@pytest.mark.parametrize("facts", SHELF, ids=lambda facts: facts.name)
def test_formula_agrees_with_the_built_model(facts):
    # The YAML's number was counted on the model's tensors, not by a formula.
    assert count_parameters(facts) == facts.num_parameters


@pytest.mark.parametrize(
    "facts", [f._replace(num_hidden_layers=2) for f in SHELF] + VARIANTS, ids=lambda facts: facts.name
)
def test_every_tensor_has_its_name_and_shape(facts):
    real = {name: tuple(parameter.shape) for name, parameter in build_model(facts).named_parameters()}
    listed = {f"{weight.module}.{weight.name}": weight.shape for _, weight in iterate_weights(facts)}
    others = {name: shape for name, shape in real.items() if "vision_tower" in name or "projector" in name}
    assert listed == {name: shape for name, shape in real.items() if name not in others}
    assert bool(others) == bool(facts.num_other_parameters)


@pytest.mark.parametrize("name", ["gemma-3-4b", "gpt-oss-20b", "falcon-40b", "pythia-70m", "llama-3.1-405b"])
def test_whole_model_at_its_full_depth(name):
    facts = find_model_facts(name)
    assert sum(parameter.numel() for parameter in build_model(facts).parameters()) == count_parameters(facts)


def test_published_sizes():
    # KerasHub's presets of MedGemma, which is Gemma 3 with eyes, and OLMo 2's model card.
    assert find_model_facts("gemma-3-4b").num_parameters == 4_300_079_472
    assert find_model_facts("gemma-3-27b").num_parameters == 27_432_406_640
    assert find_model_facts("olmo-2-32b").num_parameters == 32_234_279_936


@pytest.mark.parametrize(
    ("name", "linear_parameters"),
    [
        # The sum over nn.Linear inside the decoder layers of the built models.
        ("llama-3.1-8b", 6_979_321_856),
        ("qwen2.5-7b", 6_525_288_448),
        ("phi-3-mini", 3_623_878_656),
        ("gemma-3-1b", 697_761_792),
        ("mixtral-8x7b", 1_342_177_280),
    ],
)
def test_linear_layers_of_the_built_model(name, linear_parameters):
    assert count_linear_parameters(find_model_facts(name)) == linear_parameters


def test_modules_of_a_llama_layer():
    modules = linear_modules(find_model_facts("llama-3.1-8b"))
    assert modules == [
        ("q_proj", 4096, 4096),
        ("k_proj", 4096, 1024),
        ("v_proj", 4096, 1024),
        ("o_proj", 4096, 4096),
        ("gate_proj", 4096, 14336),
        ("up_proj", 4096, 14336),
        ("down_proj", 14336, 4096),
    ]


def test_layers_and_embeddings_make_up_the_model():
    facts = find_model_facts("mistral-7b")
    layers = facts.num_hidden_layers * count_layer_parameters(facts)
    assert layers + 2 * count_embedding_parameters(facts) + facts.hidden_size == facts.num_parameters


def test_names_on_the_shelf_are_unique():
    import yaml

    from forge_cli.paths import data_root

    names = []
    for file in (data_root() / "configs" / "models").glob("*.yaml"):
        text = file.read_text(encoding="utf-8")
        assert text.startswith("# "), f"{file.name} says nothing about its source"
        for alias, fields in yaml.safe_load(text).items():
            names += [alias, *fields.get("aliases", []), fields["hub_id"], *fields.get("same_shape", [])]
    assert [name for name, count in Counter(name.casefold() for name in names).items() if count > 1] == []
    assert len(SHELF) == len([f for f in list_models() if f.hub_id])
