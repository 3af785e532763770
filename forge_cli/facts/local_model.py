"""The facts of a model in a local folder, from its ``config.json`` and the headers of its weight files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from forge_cli.errors import ModelError
from forge_cli.facts.config_facts import count_eyes, read_config_facts
from forge_cli.facts.parameter_count import count_parameters
from forge_cli.facts.shape import ModelFacts

_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
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
    facts = read_config_facts(config, config_file, name, str(folder))
    stored = _count_stored_parameters(folder, facts)
    eyes = count_eyes(config)
    if eyes is None:  # all that is known of them is what the weight files hold
        language = count_parameters(facts)
        eyes = (max(stored - language, 0), 0) if stored and language else (0, 0)
        return facts._replace(num_parameters=stored, num_other_parameters=eyes[0])
    facts = facts._replace(num_other_parameters=eyes[0], num_other_linear_parameters=eyes[1])
    return facts._replace(num_parameters=stored or count_parameters(facts))


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
