"""What a saved LoRA adapter says about itself: a run that goes on with it takes these values, unless it names them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from forge_cli.errors import ConfigError
from forge_cli.resolve.wording import printable
from forge_cli.resolve.yaml_reader import Document, read_bytes

FILE = "adapter_config.json"
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
