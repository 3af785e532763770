"""Models by alias, hub id and folder."""

from __future__ import annotations

import json
import math

import pytest

from forge_cli.errors import ConfigError, ModelError
from forge_cli.facts.model_facts import find_model_facts, locate_model

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def write_config(folder, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}), encoding="utf-8")
    return folder


def write_weights(folder, **tensors):
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * {"F32": 4, "BF16": 2, "U8": 1}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


@pytest.mark.parametrize("name", ["mistral-7b", "Mistral-7B", "mistral-7b-v0.1", "mistralai/Mistral-7B-v0.1"])
def test_alias_in_any_case_and_hub_id_are_the_same_model(name):
    facts = find_model_facts(name)
    assert (facts.hub_id, facts.num_hidden_layers) == ("mistralai/Mistral-7B-v0.1", 32)
    assert facts.name == name
    assert locate_model(name) == "mistralai/Mistral-7B-v0.1"


def test_hub_model_of_the_same_shape_keeps_its_own_id_and_leaves_positions_open():
    facts = find_model_facts("Qwen/Qwen2.5-7B-Instruct")
    assert facts.hidden_size == find_model_facts("qwen2.5-7b").hidden_size
    assert facts.max_position_embeddings is None
    assert locate_model("Qwen/Qwen2.5-7B-Instruct") == "Qwen/Qwen2.5-7B-Instruct"


def test_unknown_hub_id_is_left_to_the_hub():
    assert find_model_facts("someone/some-model") is None
    assert locate_model("someone/some-model") == "someone/some-model"


def test_another_revision_may_have_other_positions():
    assert find_model_facts("gpt2").max_position_embeddings == 1024
    assert find_model_facts("gpt2", revision="main").max_position_embeddings is None


def test_wrong_alias_names_near_ones():
    with pytest.raises(ConfigError, match=r"lama-3\.1-8b is no known model.*did you mean llama-3\.1-8b"):
        find_model_facts("lama-3.1-8b")
    with pytest.raises(ConfigError, match="forge models list"):
        locate_model("qqqqqqq")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere-at-all"])
def test_missing_folder_is_told_from_a_hub_id(name):
    with pytest.raises(ConfigError, match="no model folder"):
        find_model_facts(name)


def test_local_folder(tmp_path):
    folder = write_config(tmp_path / "model")
    facts = find_model_facts(str(folder))
    assert (facts.path, facts.hub_id, facts.head_dim) == (str(folder), None, 16)
    # embeddings, two layers of attention + feed-forward + two norms, last norm
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96 + 2 * 64
    assert facts.num_parameters == 128 * 64 + 2 * layer + 64
    assert locate_model(str(folder)) == str(folder)


def test_folder_in_the_working_directory_wins_over_an_alias(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path / "gpt2")
    assert find_model_facts("gpt2").hidden_size == 64
    (tmp_path / "phi-2").mkdir()
    assert find_model_facts("phi-2").hub_id == "microsoft/phi-2"


def test_old_names_and_nested_text_config(tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    names = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 10}
    (old / "config.json").write_text(json.dumps(names))
    facts = find_model_facts(str(old))
    assert (facts.hidden_size, facts.intermediate_size, facts.max_position_embeddings) == (32, 128, 16)
    assert facts.tie_word_embeddings
    nested = tmp_path / "nested"
    nested.mkdir()
    (nested / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": LLAMA}))
    assert find_model_facts(str(nested)).num_hidden_layers == 2


def test_weight_files_say_how_many_weights_there_are(tmp_path):
    folder = write_config(tmp_path / "model", model_type="unheard-of")
    assert find_model_facts(str(folder)).num_parameters is None
    write_weights(folder, a=("F32", [3, 4]), b=("BF16", [5]), **{"lm_head.weight": ("F32", [7])})
    assert find_model_facts(str(folder)).num_parameters == 17
    write_weights(folder, a=("U8", [3, 4]))
    assert find_model_facts(str(folder)).num_parameters is None


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "holds a LoRA adapter"),
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cut off"),
        (lambda f: (f / "config.json").write_text("[1]"), "no mapping"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "lacks hidden_size"),
        (lambda f: write_config(f, hidden_size="64"), "lacks hidden_size"),
        (lambda f: write_config(f, auto_map={"AutoModel": "x.Y"}), "its own Python code"),
        (lambda f: (f / "pytorch_model.bin").write_bytes(b"x"), "pickled"),
        (lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs"), "Git LFS pointer"),
    ],
)
def test_broken_folder_is_a_model_error_in_four_parts(tmp_path, break_it, message):
    folder = write_config(tmp_path / "model")
    break_it(folder)
    with pytest.raises(ModelError, match=message) as caught:
        find_model_facts(str(folder))
    (problem,) = caught.value.problems
    assert str(tmp_path) in problem.where
    assert problem.why and problem.fix


def test_pickles_beside_safetensors_are_no_obstacle(tmp_path):
    folder = write_config(tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    write_weights(folder, a=("F32", [2]))
    assert find_model_facts(str(folder)).num_parameters == 2
