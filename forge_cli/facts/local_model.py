"""The facts of a model in a local folder, from its ``config.json`` and the headers of its weight files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from forge_cli.errors import ModelError
from forge_cli.facts.config_facts import count_eyes, read_config_facts
from forge_cli.facts.parameter_count import count_parameters
from forge_cli.facts.shape import ModelFacts
from forge_cli.facts.weight_files import Header, read_headers, read_json_object
from forge_cli.facts.weights import iterate_weights

_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
_CODE_KEYS = ("auto_map", "trust_remote_code", "_attn_implementation_internal")
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_experts_implementation", "experts_implementation")
_MOST_NESTED = 4


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
    refuse_foreign_code(config, config_file)
    facts = read_config_facts(config, config_file, name, str(folder))
    headers = read_headers(folder)
    _compare_shapes(headers, facts)
    stored = _count_stored_parameters(headers, facts)
    eyes = count_eyes(config)
    if eyes is None:  # all that is known of them is what the weight files hold
        language = count_parameters(facts)
        eyes = (max(stored - language, 0), 0) if stored and language else (0, 0)
        return facts._replace(num_parameters=stored, num_other_parameters=eyes[0])
    facts = facts._replace(num_other_parameters=eyes[0], num_other_linear_parameters=eyes[1])
    return facts._replace(num_parameters=stored or count_parameters(facts))


def _read_config(config_file: Path) -> dict[str, Any]:
    folder = config_file.parent
    if not config_file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                "the folder holds a LoRA adapter, not a model",
                where=str(folder),
                why="adapters go on top of the model they were trained with",
                fix=f"write model.adapter: {folder}, and the adapter's base as model.name",
            )
        raise ModelError(
            "the folder holds no config.json",
            where=str(folder),
            why="a model folder has config.json, tokenizer files and *.safetensors",
            fix="give a folder written by save_pretrained, a hub name (org/name) or an alias (forge models list)",
        )
    return read_json_object(config_file)


def refuse_foreign_code(config: dict[str, Any], config_file: Path) -> None:
    """Refuses a configuration that asks for code which comes with the weights or from the hub.

    Raises:
        ModelError: It does; names the keys.
    """
    keys = sorted(_find_code_keys(config))
    if keys:
        raise ModelError(
            f"the model brings its own Python code ({', '.join(keys)})",
            where=str(config_file),
            why="Forge runs no code that comes with weights",
            fix=f'if transformers has this architecture built in, remove "{keys[0]}" from the file',
        )


def _find_code_keys(config: object, depth: int = 0) -> set[str]:
    """Finds the keys in a configuration and the ones inside it, such as ``text_config``."""
    if not isinstance(config, dict) or depth > _MOST_NESTED:
        return set()
    found = {key for key in _CODE_KEYS if config.get(key)}
    # transformers takes a name with a slash for a kernel on the hub, and loads it.
    found |= {key for key in _ATTENTION_KEYS if any("/" in one for one in _list_texts(config.get(key)))}
    return found.union(*(_find_code_keys(one, depth + 1) for one in config.values()))


def _list_texts(value: object) -> list[str]:
    values = value.values() if isinstance(value, dict) else [value]
    return [one for one in values if isinstance(one, str)]


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


def _count_stored_parameters(headers: Header, facts: ModelFacts) -> int | None:
    """Counts the weights in the headers of the safetensors files; None without any, or if they are quantised."""
    count = 0
    for tensor, entry in headers.items():
        if tensor == "lm_head.weight" and facts.tie_word_embeddings:
            continue
        if entry["dtype"] not in _FLOAT_TYPES:
            return None
        count += math.prod(entry["shape"])
    return count or None


def _compare_shapes(headers: Header, facts: ModelFacts) -> None:
    """Compares the stored weights with those of the configuration, by name, for families that Forge knows."""
    for _, weight in iterate_weights(facts) if headers else ():
        entry = headers.get(f"{weight.module}.{weight.name}", {})
        if entry.get("dtype") in _FLOAT_TYPES and tuple(entry["shape"]) != weight.shape:
            raise ModelError(
                f"{weight.module}.{weight.name} is {entry['shape']} in the weight files and {list(weight.shape)} by "
                "config.json",
                where=str(facts.path),
                why="the weights belong to another configuration (vocab_size, hidden_size, ...)",
                fix="use config.json and weights of the same model",
            )
