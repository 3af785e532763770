"""The facts of a model in a local folder, from its ``config.json`` and the headers of its weight files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from forge_cli.errors import ModelError
from forge_cli.facts.parameter_count import FAMILIES, count_parameters
from forge_cli.facts.shape import ModelFacts

# Older configurations name the same things differently.
_OTHER_NAMES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "num_layers", "n_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "intermediate_size": ("n_inner", "ffn_hidden_size", "ffn_dim"),
    "max_position_embeddings": ("n_positions", "n_ctx"),
    "num_local_experts": ("num_experts",),
}
_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
# What transformers assumes where config.json is silent; every other family unties.
_TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3_text", "gpt2", "falcon", "smollm3")
_MAX_HEADER_BYTES = 100 * 1024 * 1024


def read_local_model(folder: Path, name: str) -> ModelFacts:
    """Reads the facts of the model in ``folder``.

    Args:
        folder: Folder with ``config.json``.
        name: What the user wrote, for the facts and the messages.

    Returns:
        The facts; ``num_parameters`` is counted from the weight files' headers if there are any.

    Raises:
        ModelError: There is no readable configuration, the weights are pickled, or the model wants to run its own
            code.
    """
    config_file = folder / "config.json"
    config = _read_config(config_file)
    _refuse_pickles(folder)
    if "auto_map" in config:
        raise ModelError(
            "the model brings its own Python code (auto_map)",
            where=str(config_file),
            why="Forge runs no code that comes with weights",
            fix='if transformers has this architecture built in, remove "auto_map" from the file',
        )
    text_config = config["text_config"] if isinstance(config.get("text_config"), dict) else {}
    facts = _facts_from_config({**config, **text_config}, config_file, name, str(folder))
    return facts._replace(num_parameters=_count_stored_parameters(folder, facts) or count_parameters(facts))


def _read_config(config_file: Path) -> dict[str, Any]:
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            "the folder holds no config.json",
            where=str(config_file.parent),
            why="a model folder has config.json, tokenizer files and *.safetensors",
            fix="give a folder written by save_pretrained, a hub name (org/name) or an alias (forge models list)",
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"config.json cannot be read ({error})",
            where=str(config_file),
            why="the model's shape comes from it",
            fix="copy the model again",
        ) from None
    if not isinstance(config, dict):
        raise ModelError(
            "config.json holds no mapping",
            where=str(config_file),
            why="the model's shape comes from it",
            fix="copy the model again",
        )
    return config


def _refuse_pickles(folder: Path) -> None:
    """Refuses a folder whose only weights are pickles: unpickling runs whatever the file says."""
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.gguf")):
        return
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    pickles = [file for file in pickles if file != "training_args.bin"]
    if pickles:
        raise ModelError(
            f"the weights are pickled ({', '.join(pickles[:3])})",
            where=str(folder),
            why="loading a pickle can run any code; Forge reads safetensors only",
            fix="save the model again with save_pretrained, which writes model.safetensors",
        )


def _facts_from_config(config: dict[str, Any], config_file: Path, name: str, path: str) -> ModelFacts:
    def number(key: str) -> int | None:
        for candidate in (key, *_OTHER_NAMES.get(key, ())):
            value = config.get(candidate)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return None

    wanted = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    found = {key: number(key) for key in wanted}
    model_type = config.get("model_type")
    missing = [key for key, value in found.items() if value is None]
    if not isinstance(model_type, str) or missing:
        lacking = missing if isinstance(model_type, str) else ["model_type", *missing]
        raise ModelError(
            f"config.json lacks {', '.join(lacking)}",
            where=str(config_file),
            why="it does not describe a text model that Forge can train",
            fix="copy the model again, or choose a causal language model",
        )
    hidden, layers, heads, vocabulary = (int(found[key] or 0) for key in wanted)
    kv_heads = number("num_key_value_heads") or heads
    if model_type == "falcon" and not config.get("new_decoder_architecture"):
        kv_heads = 1 if config.get("multi_query", True) else heads
    tied = config.get("tie_word_embeddings", model_type in _TIED_BY_DEFAULT)
    return ModelFacts(
        name=name,
        hub_id=None,
        path=path,
        model_type=model_type,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=number("head_dim") or hidden // heads,
        intermediate_size=number("intermediate_size") or 4 * hidden,
        vocab_size=vocabulary,
        tie_word_embeddings=bool(tied),
        max_position_embeddings=number("max_position_embeddings"),
        num_local_experts=number("num_local_experts"),
        num_experts_per_tok=number("num_experts_per_tok"),
        moe_intermediate_size=number("moe_intermediate_size"),
        source=str(config_file) if model_type in FAMILIES else f"{config_file} (family not counted by formula)",
    )


def _count_stored_parameters(folder: Path, facts: ModelFacts) -> int | None:
    """Counts the weights in the headers of the safetensors files; None without any, or if they are quantised."""
    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        if file.name.startswith("adapter_"):
            continue
        for tensor, entry in _read_header(file).items():
            if tensor == "__metadata__" or (tensor == "lm_head.weight" and facts.tie_word_embeddings):
                continue
            if entry["dtype"] not in _FLOAT_TYPES:
                return None
            count += math.prod(entry["shape"])
    return count or None


def _read_header(file: Path) -> dict[str, Any]:
    """Reads the header of a safetensors file: eight bytes of length, then that much JSON."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"header of {length} bytes")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("header is no mapping")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the weight file cannot be read ({error})",
            where=str(file),
            why="it is cut off or not in safetensors format",
            fix="copy the model again (git lfs pull, if it is a pointer file)",
        ) from None
    return header
