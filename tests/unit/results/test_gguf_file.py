"""What goes into a GGUF file: families, names of splitting, chat templates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from llama_server import ask_llama_cpp
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config

from forge_cli.errors import ModelError
from forge_cli.parts.rendering import Renderer
from forge_cli.results.gguf_file import _name_splitting, plain_template, write_gguf

TINY = Path(Renderer.__init__.__globals__["__file__"]).parents[1] / "assets" / "forge-tiny"
SHAPE = {
    "vocab_size": 540,  # more than the tokenizer has
    "hidden_size": 96,
    "intermediate_size": 80,  # no multiple of q8_0's block of 32
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def save_model(config, folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.15 + (parameter.dim() == 1)
    model.save_pretrained(folder, max_shard_size="100KB")  # several files
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return model


FAMILIES = pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SHAPE, tie_word_embeddings=False, head_dim=24),
        Qwen2Config(**SHAPE, tie_word_embeddings=True),
        Qwen3Config(**SHAPE, tie_word_embeddings=False, head_dim=128),
    ],
    ids=lambda config: config.model_type,
)


@FAMILIES
@pytest.mark.parametrize(("form", "allowed"), [("f32", 0.0), ("q8_0", 0.2)])
def test_a_family_reads_back_with_its_logits(config, form, allowed, tmp_path):
    model = save_model(config, tmp_path / "model")
    (tmp_path / "out").mkdir()
    write_gguf(tmp_path / "model", tmp_path / "out" / "x.gguf", form, name="x", end_token_ids=[3])
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="x.gguf", dtype=torch.float32).eval()
    ids = torch.tensor([[1, 20, 300, 4, 50, 6]])
    with torch.inference_mode():
        wanted, got = model(ids).logits, read(ids).logits
    assert (wanted - got).abs().max() <= allowed * wanted.abs().max()


@FAMILIES
def test_llama_cpp_computes_what_transformers_computes(config, tmp_path):
    pytest.importorskip("xllamacpp")
    model, text = save_model(config, tmp_path), "the otter eats clams and 17 fish"
    write_gguf(tmp_path, tmp_path / "x.gguf", "f32", name="x", end_token_ids=[3])
    (answer,) = ask_llama_cpp(tmp_path / "x.gguf", [("text", {"prompt": text, "max_tokens": 1, "logprobs": 8})])
    ids = AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert answer["usage"]["prompt_tokens"] == len(ids)
    found = {one["id"]: one["logprob"] for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    with torch.inference_mode():
        wanted = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    apart = max(abs(value - wanted[one].item()) for one, value in found.items())
    print(f"{config.model_type}: log probabilities of llama.cpp within {apart:.4f}")
    assert found == pytest.approx({one: wanted[one].item() for one in found}, abs=0.02), "its cache is of 16 bits"
    assert set(wanted.topk(3).indices.tolist()) <= set(found)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SHAPE, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        LlamaConfig(**SHAPE, attention_bias=True),
        Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=8),
    ],
)
def test_what_the_writer_does_not_know_goes_to_the_converter(config, tmp_path):
    save_model(config, tmp_path)
    with pytest.raises(ModelError, match="--converter"):
        write_gguf(tmp_path, tmp_path / "x.gguf", "f32", name="x", end_token_ids=[3])
    assert not (tmp_path / "x.gguf").exists()


def test_splitting_has_the_names_of_llama_cpp():
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}

    def name(*parts, **model):
        first = parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": list(parts)}
        return _name_splitting({"model": {"type": "BPE", **model}, "pre_tokenizer": first})

    assert name(byte_level) == "gpt-2"
    assert name({"type": "Digits", "individual_digits": True}, byte_level) == "smollm"
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    split = {"type": "Split", "pattern": {"Regex": PRETOKENIZE_REGEX}, "behavior": "Isolated", "invert": False}
    without = {**byte_level, "use_regex": False}
    assert name(split, without) == "qwen2"
    split = {**split, "pattern": {"Regex": PRETOKENIZE_REGEX.replace(r"\p{N}|", r"\p{N}{1,3}|")}}
    assert name(split, without) == "llama-bpe"
    for parts, model in (
        ((split, byte_level), {}),
        (({"type": "Metaspace"},), {}),
        ((byte_level,), {"byte_fallback": 1}),
    ):
        with pytest.raises(ModelError):
            name(*parts, **model)


def test_a_template_without_training_tags_writes_the_same():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    turns = [{"role": "user", "content": " a\n"}, {"role": "assistant", "content": "b "}]
    wanted = tokenizer.apply_chat_template(turns, tokenize=False)
    for before in ("{% generation %}", "{%- generation -%}", "{%generation-%}"):
        template = tokenizer.chat_template.replace("{%- generation -%}", before)
        tokenizer.chat_template = plain_template(template)
        assert "generation %}" not in tokenizer.chat_template and "generation -%}" not in tokenizer.chat_template
        assert tokenizer.apply_chat_template(turns, tokenize=False).replace("\n", "") == wanted.replace("\n", "")
    assert plain_template("{%- if add_generation_prompt -%}") == "{%- if add_generation_prompt -%}"
