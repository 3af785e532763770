"""From the fields of a ``config.json`` to the facts of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from forge_cli.errors import ModelError
from forge_cli.facts.families import FALCON_SEQUENTIAL, FALCON_TWO_NORMS, FAMILIES
from forge_cli.facts.shape import ModelFacts

# Older configurations name the same things differently.
_OTHER_NAMES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "num_layers", "n_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv"),
    "intermediate_size": ("n_inner", "ffn_hidden_size", "ffn_dim"),
    "max_position_embeddings": ("n_positions", "n_ctx"),
    "num_local_experts": ("num_experts",),
}
# What transformers assumes where config.json is silent; every other family unties.
_TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3_text", "gpt2", "falcon", "smollm3")
_WINDOW_BY_DEFAULT = {"mistral": 4096, "gemma2": 4096, "gemma3_text": 4096, "olmo3": 4096, "gpt_oss": 128}
# Whose modelling code reads these settings; the others' biases are fixed, whatever config.json says.
_READS_ATTENTION_BIAS = ("llama", "granite", "smollm3", "qwen3", "qwen3_moe", "olmo2", "olmo3")
_READS_ATTENTION_BIAS += ("gemma", "gemma2", "gemma3_text", "gpt_neox", "gpt_oss")
_READS_MLP_BIAS = ("llama", "granite", "smollm3")
# Inside another configuration a text configuration is written without what its class assumes.
_NESTED_DEFAULTS: dict[str, dict[str, int]] = {
    "gemma3_text": {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "intermediate_size": 9216,
        "max_position_embeddings": 131072,
    }
}


def read_config_facts(config: dict[str, Any], config_file: Path, name: str, path: str) -> ModelFacts:
    """Reads the facts out of a configuration, without the number of weights.

    Args:
        config: The whole of ``config.json``.
        config_file: Its place, for messages.
        name: What the user wrote.
        path: The model's folder.

    Raises:
        ModelError: It does not describe a language model.
    """
    nested = config.get("text_config")
    if isinstance(nested, dict):
        config = {**_NESTED_DEFAULTS.get(nested.get("model_type", ""), {}), **config, **nested}
    hidden, layers, heads, vocabulary = _read_needed(config, config_file)
    model_type, kv_heads = config["model_type"], _number(config, "num_key_value_heads") or heads
    if model_type == "falcon" and not config.get("new_decoder_architecture"):
        kv_heads = 1 if config.get("multi_query", True) else heads
    layout = _find_layout(config)
    positions = _number(config, "max_position_embeddings")
    known = (layout or model_type) in FAMILIES
    return ModelFacts(
        name=name,
        hub_id=None,
        path=path,
        model_type=model_type,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=_number(config, "head_dim") or hidden // heads,
        intermediate_size=_number(config, "intermediate_size") or 4 * hidden,
        vocab_size=vocabulary,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", model_type in _TIED_BY_DEFAULT)),
        max_position_embeddings=positions,
        num_local_experts=_number(config, "num_local_experts"),
        num_experts_per_tok=_number(config, "num_experts_per_tok"),
        moe_intermediate_size=_number(config, "moe_intermediate_size"),
        sliding_window=_read_window(config, positions),
        attention_bias=_read_bias(config, "attention_bias", _READS_ATTENTION_BIAS),
        feed_forward_bias=_read_bias(config, "mlp_bias", _READS_MLP_BIAS),
        layout=layout,
        source=str(config_file) if known else f"{config_file} (family not counted by formula)",
    )


def count_eyes(config: dict[str, Any]) -> tuple[int, int] | None:
    """Counts the weights that Gemma 3 adds for pictures: all of them, and those in linear layers without biases.

    Returns:
        Both counts; (0, 0) for a language model alone, None for eyes that Forge cannot count.

    Units: weights. Source: SigLIP and the projector in the modelling code of transformers 5.23.
    """
    eyes, text = config.get("vision_config"), config.get("text_config")
    if not isinstance(eyes, dict):
        return 0, 0
    sides = ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size")
    sizes = [_number(eyes, side) for side in sides]
    if config.get("model_type") != "gemma3" or not isinstance(text, dict) or None in sizes:
        return None
    width, wide, layers, image, patch = (size or 0 for size in sizes)
    linear = layers * (4 * width**2 + 2 * width * wide)
    biases_and_norms = layers * (4 * width + wide + width + 4 * width) + 2 * width
    picture = 3 * patch**2 * width + width + (image // patch) ** 2 * width
    projector = width * (text.get("hidden_size") or _NESTED_DEFAULTS["gemma3_text"]["hidden_size"]) + width
    return linear + biases_and_norms + picture + projector, linear


def _read_needed(config: dict[str, Any], config_file: Path) -> tuple[int, ...]:
    wanted = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    found = {key: _number(config, key) for key in wanted}
    missing = [key for key, value in found.items() if value is None]
    if not isinstance(config.get("model_type"), str):
        missing.insert(0, "model_type")
    if missing:
        raise ModelError(
            f"config.json lacks {', '.join(missing)}",
            where=str(config_file),
            why="it does not describe a text model that Forge can train",
            fix="copy the model again, or choose a causal language model",
        )
    return tuple(value or 0 for value in found.values())


def _find_layout(config: dict[str, Any]) -> str:
    """Names the variant of a family; one that Forge does not know gets a name that no formula has."""
    model_type = config["model_type"]
    if model_type == "falcon":
        if config.get("parallel_attn") is False:
            return FALCON_SEQUENTIAL
        norms = config.get("num_ln_in_parallel_attn") or (2 if config.get("new_decoder_architecture") else 1)
        return FALCON_TWO_NORMS if norms == 2 else ""
    if model_type == "phi" and config.get("qk_layernorm"):
        return "phi (norms on queries and keys)"
    if model_type == "qwen3_moe" and (config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1):
        return "qwen3_moe (some layers dense)"
    return ""


def _read_window(config: dict[str, Any], positions: int | None) -> int | None:
    """Reads the window of attention; one as long as the positions is none."""
    model_type = config["model_type"]
    if not config.get("use_sliding_window", not model_type.startswith(("qwen", "smollm"))):
        return None
    window = _number(config, "sliding_window") if "sliding_window" in config else _WINDOW_BY_DEFAULT.get(model_type)
    return None if window is None or (positions and window >= positions) else window


def _number(config: dict[str, Any], key: str) -> int | None:
    for candidate in (key, *_OTHER_NAMES.get(key, ())):
        value = config.get(candidate)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _read_bias(config: dict[str, Any], key: str, families: tuple[str, ...]) -> bool | None:
    if config["model_type"] == "falcon":
        key = "bias"
    elif config["model_type"] not in families:
        return None
    value = config.get(key)
    return value if isinstance(value, bool) else None
