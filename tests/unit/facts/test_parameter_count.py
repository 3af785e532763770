"""Parameter counts by formula against models that were built on the meta device."""

from __future__ import annotations

from collections import Counter

import pytest

from forge_cli.facts.model_facts import find_model_facts, list_models
from forge_cli.facts.parameter_count import (
    FAMILIES,
    count_embedding_parameters,
    count_layer_parameters,
    count_linear_parameters,
    count_parameters,
    linear_modules,
)
from forge_cli.facts.shelf import list_shelf

SHELF = list_shelf()


def test_shelf_holds_every_family():
    assert len(SHELF) >= 72
    assert {facts.model_type for facts in SHELF} == set(FAMILIES)


@pytest.mark.parametrize("facts", SHELF, ids=lambda facts: facts.name)
def test_formula_agrees_with_the_built_model(facts):
    # The YAML's number was counted on the model's tensors, not by a formula.
    assert count_parameters(facts) == facts.num_parameters


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
