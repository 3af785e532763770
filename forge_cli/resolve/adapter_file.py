"""What a saved LoRA adapter says about itself: a run that goes on with it takes these values, unless it names them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from forge_cli.errors import ConfigError, ModelError
from forge_cli.facts.shape import ModelFacts
from forge_cli.facts.weight_files import read_header
from forge_cli.facts.weights import iterate_weights
from forge_cli.resolve.wording import printable
from forge_cli.resolve.yaml_reader import Document, read_bytes

FILE = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_PREFIX = "base_model.model."
# What an adapter's weights fix; dropout and how it starts are a matter of the run.
_FIXED = ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "modules_to_save")


def read_adapter_config(folder: str) -> dict:
    """Reads what kind of adapter a folder holds.

    Raises:
        ConfigError: None that Forge can go on with.
    """
    place = printable(folder)
    try:
        path = Path(folder).expanduser() / FILE
        if not path.is_file():
            fix = "name the adapter folder of a run, such as runs/first/adapter"
            raise ConfigError(f"{place} holds no adapter ({FILE})", fix=fix)
        config = json.loads(read_bytes(path, str(path)))
    except (OSError, RuntimeError, ValueError) as error:  # too long, ~nobody, not JSON, too deep
        raise ConfigError(f"{FILE} of {place} cannot be read: {printable(str(error))[:200]}") from error
    kind = config.get("peft_type", "LORA") if isinstance(config, dict) else None
    if kind != "LORA":
        what = f"{place} holds an adapter of the type {printable(str(kind))}"
        raise ConfigError(what, fix="Forge goes on with LoRA adapters")
    return config


def list_lora_values(config: dict) -> dict[str, object]:
    """Lists what an adapter fixes, under the names and in the forms of the ``lora`` section."""
    values = {name: config[name] for name in _FIXED if config.get(name) is not None}
    values["modules_to_save"] = values.get("modules_to_save") or []
    if isinstance(values.get("target_modules"), str):
        del values["target_modules"]  # a pattern, which a run file cannot say
    # PEFT keeps names in any order.
    return {name: sorted(map(str, value)) if isinstance(value, list) else value for name, value in values.items()}


def find_adapter(documents: Sequence[Document]) -> Document | None:
    """Finds the adapter that a run goes on with and returns it as a layer; ``None`` if there is none to read.

    Args:
        documents: All layers, weakest first; the strongest that names an adapter decides.
    """
    sections = [one.data.get("model") for one in documents]
    named = [one["adapter"] for one in sections if isinstance(one, dict) and "adapter" in one]
    if not named or not isinstance(named[-1], str):
        return None
    try:
        values = list_lora_values(read_adapter_config(named[-1]))
    except ConfigError:  # a rule says what is wrong with it
        return None
    return Document(printable(str(Path(named[-1]) / FILE)), {"lora": values}, {})


def check_adapter_weights(folder: str, facts: ModelFacts | None) -> None:
    """Compares the header of an adapter's weights with its configuration and with the model; reads no weight.

    Args:
        folder: The adapter.
        facts: The model; ``None`` if its shape is not known.

    Raises:
        ModelError: They are pickled or damaged, or belong to another rank or model.
    """
    place = Path(folder).expanduser()
    try:
        rank = read_adapter_config(folder).get("r")
    except ConfigError:  # a rule says what is wrong with it
        return
    if not (place / WEIGHTS).is_file():
        if (place / _PICKLED).is_file():
            raise ModelError(
                f"the adapter's weights are pickled ({_PICKLED})",
                where=folder,
                why="loading a pickle can run any code; Forge reads safetensors only",
                fix=f"save the adapter again with save_pretrained, which writes {WEIGHTS}",
            )
        return  # said when it is loaded
    weights = {weight.module: weight.shape for _, weight in iterate_weights(facts)} if facts else {}
    for name, entry in read_header(place / WEIGHTS).items():
        module, part, _ = name.removeprefix(_PREFIX).rpartition(".lora_")
        if not part or len(entry["shape"]) != 2:
            continue
        side, inner = entry["shape"] if name.endswith("lora_B.weight") else reversed(entry["shape"])
        fits = side in weights.get(module, (side,))
        if not fits:
            what = f"{module} has sides {list(weights[module])} in the model and {side} in the adapter"
            raise _misfit(what, folder, "name the model that the adapter was trained on")
        if isinstance(rank, int) and inner != rank and not read_adapter_config(folder).get("rank_pattern"):
            what = f"{name} has rank {inner} in {WEIGHTS} and r is {rank} in {FILE}"
            raise _misfit(what, folder, "copy the adapter again")


def _misfit(what: str, folder: str, fix: str) -> ModelError:
    return ModelError(what, where=folder, why="its weights would not fit", fix=fix)
