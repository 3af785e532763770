"""Facts out of ``config.json``, as transformers writes it and as the hub holds it."""

from __future__ import annotations

import json

import pytest
import torch
from meta_models import EYES, KINDS, build_config
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from forge_cli.facts.config_facts import _NESTED_DEFAULTS, _TIED_BY_DEFAULT, _WINDOW_BY_DEFAULT
from forge_cli.facts.families import FAMILIES
from forge_cli.facts.model_facts import find_model_facts
from forge_cli.facts.weights import iterate_weights

NOT_IN_A_CONFIG = ("name", "hub_id", "path", "source", "attention_bias", "feed_forward_bias")


def read(folder, config):
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return find_model_facts(str(folder))


@pytest.mark.parametrize("facts", KINDS, ids=lambda facts: facts.name)
def test_saved_configuration_gives_the_facts_back(facts, tmp_path):
    build_config(facts).save_pretrained(tmp_path)
    found = find_model_facts(str(tmp_path))
    for field in facts._fields:
        if field not in NOT_IN_A_CONFIG:
            assert getattr(found, field) == getattr(facts, field), field


FALCON = {
    "model_type": "falcon",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
}


@pytest.mark.parametrize(
    "config",
    [
        FALCON,
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        FALCON | {"parallel_attn": False, "multi_query": False, "bias": True, "alibi": True},
        FALCON | {"model_type": "phi", "intermediate_size": 96},
        {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 32},
        {
            "model_type": "llama",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "vocab_size": 128,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ],
    ids=lambda config: "-".join([config["model_type"], *list(config)[5:]]),
)
def test_variants_as_the_hub_writes_them(config, tmp_path):
    facts = read(tmp_path, config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    listed = {f"{weight.module}.{weight.name}": weight.shape for _, weight in iterate_weights(facts)}
    assert listed == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert facts.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_eyes_without_what_the_class_assumes(tmp_path):
    # https://huggingface.co/google/gemma-3-4b-it, config.json: heads, head size and vocabulary are not in it.
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    config = {"model_type": "gemma3", "text_config": text | {"sliding_window": 1024}, "vision_config": EYES}
    found = read(tmp_path, config)
    assert found._replace(name="", path=None, source="") == find_model_facts("gemma-3-4b")._replace(
        name="", hub_id=None, source=""
    )


def test_unknown_eyes_are_not_guessed(tmp_path):
    config = {
        "model_type": "mistral3",
        "text_config": FALCON | {"model_type": "llama"},
        "vision_config": {"hidden_size": 8},
    }
    assert read(tmp_path, config).num_parameters is None


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "phi", "qk_layernorm": True},
        {"model_type": "qwen3_moe", "mlp_only_layers": [0]},
        {"model_type": "qwen3_moe", "decoder_sparse_step": 2},
        {"model_type": "unheard-of"},
    ],
    ids=str,
)
def test_layouts_without_a_formula_have_no_count(config, tmp_path):
    found = read(tmp_path, FALCON | config)
    assert found.num_parameters is None
    assert "not counted by formula" in found.source


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 16}, 16),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "mistral", "sliding_window": 64, "max_position_embeddings": 64}, None),
        ({"model_type": "qwen2", "sliding_window": 16}, None),
        ({"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": True}, 16),
        ({"model_type": "llama"}, None),
    ],
)
def test_window_of_attention(fields, window, tmp_path):
    assert read(tmp_path, FALCON | fields).sliding_window == window


def test_silent_configurations_mean_what_transformers_assumes():
    for model_type in {name.split(" ")[0] for name in FAMILIES}:
        config = CONFIG_MAPPING[model_type]()
        assert config.tie_word_embeddings == (model_type in _TIED_BY_DEFAULT), model_type
        if not hasattr(config, "use_sliding_window"):
            assert getattr(config, "sliding_window", None) == _WINDOW_BY_DEFAULT.get(model_type), model_type
    for model_type, fields in _NESTED_DEFAULTS.items():
        config = CONFIG_MAPPING[model_type]()
        assert fields == {name: getattr(config, name) for name in fields}
