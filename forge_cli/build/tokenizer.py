"""Loads the tokenizer of a plan; needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from forge_cli.data.hub import explain_loading
from forge_cli.errors import ConfigError, ModelError
from forge_cli.facts.model_facts import locate_model
from forge_cli.schema.runspec import RunSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_TEMPLATE_BYTES = 64 * 1024


def load_tokenizer(spec: RunSpec) -> PreTrainedTokenizerBase:
    """Loads the tokenizer beside the model; of an adapter that goes on training, the one it was trained with.

    A tokenizer without a pad token pads with its end token: labels are made by position, so padding is never
    trained and a real end token is never masked.

    Raises:
        ModelError: It cannot be loaded, or is not a fast tokenizer (labels need character offsets).
        MachineError: It is not on this machine, and the hub cannot be reached.
        ConfigError: ``model.chat_template`` cannot be read.
    """
    from transformers import AutoTokenizer

    place, revision = locate_model(spec.model.name), spec.model.revision
    if spec.model.adapter and (Path(spec.model.adapter).expanduser() / "tokenizer.json").is_file():
        place, revision = str(Path(spec.model.adapter).expanduser()), None
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise explain_loading(error, place, f"the tokenizer of {place}") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{place} has no fast tokenizer",
            where="model.name",
            why="labels need the character of every token",
            fix="use a model that ships tokenizer.json",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    if spec.model.chat_template:
        tokenizer.chat_template = _read_template(Path(spec.model.chat_template).expanduser())
    return tokenizer


def _read_template(path: Path) -> str:
    try:
        if path.stat().st_size > MOST_TEMPLATE_BYTES:
            raise ConfigError(f"over {MOST_TEMPLATE_BYTES // 1024} KiB, which no chat template is", where=str(path))
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"the chat template cannot be read: {reason}", where=str(path)) from error
