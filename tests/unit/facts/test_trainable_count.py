"""Counts of trained weights against PEFT, bitsandbytes' conversion and Forge's own freezing on built models."""

from __future__ import annotations

import pytest
import torch
from meta_models import KINDS, build_model
from peft import get_peft_model

from forge_cli.build.adapter import build_lora_config
from forge_cli.facts.layer_count import count_frozen_layers
from forge_cli.facts.model_facts import find_model_facts
from forge_cli.facts.parameter_count import count_parameters, count_quantized_parameters
from forge_cli.facts.shelf import list_shelf
from forge_cli.facts.trainable_count import count_lora_parameters, count_trainable_parameters
from forge_cli.parts.freeze import freeze_layers
from forge_cli.schema.adapter import FreezeSection, LoraSection

SHELF = list_shelf()


def name_of(facts):
    return facts.name


def shorten(facts, layers=2):
    return facts._replace(num_hidden_layers=layers)


def place_adapters(facts, lora, num_frozen=0, score_head=False):
    model = build_model(facts, score_head=score_head)
    config = build_lora_config(lora, model, num_frozen, "SEQ_CLS" if score_head else "CAUSAL_LM")
    with torch.device("meta"):
        return get_peft_model(model, config)


def count_real(model):
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


@pytest.mark.parametrize("facts", SHELF, ids=name_of)
def test_adapters_on_every_model_of_the_shelf(facts):
    facts, lora = shorten(facts), LoraSection(r=8)
    total, trainable = count_real(place_adapters(facts, lora))
    assert count_lora_parameters(facts, lora) == trainable
    assert count_parameters(facts) + trainable == total


@pytest.mark.parametrize("name", ["llama-3.1-8b", "gpt2", "qwen3-30b-a3b", "gemma-3-1b", "falcon-7b"])
def test_layers_above_the_second_are_like_it(name):
    facts, lora = find_model_facts(name), LoraSection(r=16)
    assert count_lora_parameters(facts, lora) == count_real(place_adapters(facts, lora))[1]


@pytest.mark.parametrize("facts", KINDS, ids=name_of)
def test_frozen_layers_get_no_adapter(facts):
    facts, lora = shorten(facts, 3), LoraSection(r=4)
    assert count_lora_parameters(facts, lora, 2) == count_real(place_adapters(facts, lora, 2))[1]


@pytest.mark.parametrize("facts", KINDS, ids=name_of)
def test_weight_decomposition_adds_one_weight_per_output(facts):
    facts, lora = shorten(facts), LoraSection(r=4, use_dora=True)
    assert count_lora_parameters(facts, lora) == count_real(place_adapters(facts, lora))[1]


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama-3.2-1b", ["q_proj", "mlp.down_proj"]),
        ("llama-3.2-1b", ["q_proj", "lm_head", "embed_tokens"]),
        ("gpt2", ["c_proj"]),
        ("gpt2", ["attn.c_proj"]),
        ("mixtral-8x7b", ["q_proj", "gate"]),
        ("qwen3-30b-a3b", ["v_proj", "gate"]),
        ("phi-2", ["fc1", "dense"]),
    ],
)
def test_named_targets(name, targets):
    facts = shorten(find_model_facts(name))
    for use_dora in (False, True) if "gate" not in targets else (False,):  # PEFT has no DoRA for routers
        lora = LoraSection(r=4, target_modules=targets, use_dora=use_dora)
        assert count_lora_parameters(facts, lora) == count_real(place_adapters(facts, lora))[1]


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("llama-3.1-8b", ["lm_head"]),
        ("llama-3.1-8b", ["embed_tokens", "lm_head"]),
        ("llama-3.2-1b", ["embed_tokens", "lm_head"]),
        ("phi-2", ["lm_head"]),
        ("gpt2", ["wte"]),
    ],
)
def test_modules_trained_whole_are_copied(name, modules):
    facts, lora = shorten(find_model_facts(name)), LoraSection(r=4, modules_to_save=modules)
    total, trainable = count_real(place_adapters(facts, lora))
    assert count_lora_parameters(facts, lora) == trainable
    assert total == count_parameters(facts) + trainable


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.2-1b", "phi-2", "gemma-2-2b"])
def test_score_in_place_of_the_vocabulary(name):
    facts, lora = shorten(find_model_facts(name)), LoraSection(r=4)
    assert count_real(build_model(facts, score_head=True))[0] == count_parameters(facts, score_head=True)
    assert count_trainable_parameters(facts, score_head=True) == count_parameters(facts, score_head=True)
    trainable = count_real(place_adapters(facts, lora, score_head=True))[1]
    assert count_trainable_parameters(facts, lora, score_head=True) == trainable


FREEZES = [
    FreezeSection(first=2),
    FreezeSection(first="50%", embeddings=False),
    FreezeSection(embeddings=True),
    FreezeSection(first=1, embeddings=False, patterns=["*.mlp*", "lm_head"]),
]
# What patterns do to eyes is not counted: facts do not name their parts.
CASES = [
    (facts, freeze) for facts in KINDS for freeze in FREEZES if not (facts.num_other_parameters and freeze.patterns)
]


@pytest.mark.parametrize(("facts", "freeze"), CASES, ids=lambda one: getattr(one, "name", str(one)))
def test_freezing_a_whole_model(facts, freeze):
    facts = shorten(facts, 4)
    frozen = count_frozen_layers(freeze.first, 4)
    embeddings = freeze.first is not None if freeze.embeddings is None else freeze.embeddings
    report = freeze_layers(build_model(facts), frozen, embeddings=embeddings, patterns=freeze.patterns)
    assert count_trainable_parameters(facts, None, freeze, frozen) == report.num_trainable_parameters


def test_patterns_freeze_parts_of_adapters():
    facts = shorten(find_model_facts("llama-3.2-1b"), 4)
    lora = LoraSection(r=4, use_dora=True, modules_to_save=["embed_tokens"])
    freeze = FreezeSection(first=1, patterns=["*.mlp", "*.lora_A", "*magnitude_vector.default"])
    model = place_adapters(facts, lora, 1)
    report = freeze_layers(model, 1, embeddings=False, patterns=freeze.patterns)
    assert count_trainable_parameters(facts, lora, freeze, 1) == report.num_trainable_parameters


def test_adapters_of_llama_8b_by_hand():
    facts = find_model_facts("llama-3.1-8b")
    # r x (inputs + outputs): query, output 4096 + 4096; key, value 4096 + 1024; gate, up, down 4096 + 14336
    per_layer = 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    assert count_lora_parameters(facts, LoraSection(r=16)) == 32 * per_layer == 41_943_040
    assert count_lora_parameters(facts, LoraSection(r=16), 16) == 16 * per_layer


def test_unknown_architecture_is_not_guessed():
    facts = find_model_facts("gpt2")._replace(model_type="unheard-of")
    assert count_trainable_parameters(facts) is None
    assert count_lora_parameters(facts, LoraSection()) is None
    assert count_quantized_parameters(facts) is None


@pytest.mark.parametrize("facts", KINDS, ids=name_of)
def test_what_bitsandbytes_packs(facts):
    from transformers import BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    facts = shorten(facts)
    model = build_model(facts)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    replace_with_bnb_linear(model, get_keys_to_not_convert(model), config)
    packed = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    assert sum(m.in_features * m.out_features for m in packed) == count_quantized_parameters(facts)
