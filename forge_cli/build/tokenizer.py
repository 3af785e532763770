"""Loads the tokenizer of a plan; needs no torch."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from forge_cli.data.hub import explain_loading
from forge_cli.errors import ConfigError, ModelError
from forge_cli.facts.local_model import refuse_foreign_code
from forge_cli.facts.model_facts import find_model_facts, locate_model
from forge_cli.facts.weight_files import read_json_object
from forge_cli.redaction import printable
from forge_cli.schema.runspec import RunSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_TEMPLATE_BYTES = 64 * 1024
TEMPLATE_SECONDS = 5.0


def load_tokenizer(spec: RunSpec) -> PreTrainedTokenizerBase:
    """Loads the tokenizer beside the model; of an adapter that goes on training, the one it was trained with.

    A tokenizer without a pad token pads with its end token: labels are made by position, so padding is never
    trained and a real end token is never masked.

    Raises:
        ModelError: It cannot be loaded, is not a fast tokenizer (labels need character offsets), has more tokens than
            the model, or the model or the chat template does what files of strangers may not.
        MachineError: It is not on this machine, and the hub cannot be reached.
        ConfigError: ``model.chat_template`` cannot be read.
    """
    from transformers import AutoTokenizer
    from transformers.utils import cached_file

    place, revision = locate_model(spec.model.name), spec.model.revision
    try:
        # The first file of the model that is read: a folder's was judged with the plan, the hub's comes now.
        config_file = Path(cached_file(place, "config.json", revision=revision))
    except (OSError, ValueError) as error:
        raise explain_loading(error, place, f"the tokenizer of {place}") from error
    refuse_foreign_code(read_json_object(config_file), config_file)
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
    _compare_vocabulary(spec, tokenizer, place)
    _prove_template(tokenizer, spec.model.chat_template or place)
    return tokenizer


def _compare_vocabulary(spec: RunSpec, tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """Compares the tokenizer with the model's shape, so that no weight is read in vain."""
    facts = find_model_facts(spec.model.name, spec.model.revision)
    if facts is not None and spec.model.revision is None and len(tokenizer) > facts.vocab_size:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {facts.vocab_size} embeddings",
            where=place,
            why="a token without an embedding ends the run in the middle",
            fix="use the tokenizer that belongs to the model",
        )


def _prove_template(tokenizer: PreTrainedTokenizerBase, place: str) -> None:
    """Renders one conversation: a template is a program of strangers, run in a sandbox that knows no time limit.

    What it makes of real conversations is judged with the rows.
    """
    template = tokenizer.chat_template
    if not isinstance(template, str):
        return
    ended: list[BaseException | str] = []

    def render() -> None:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            ended.append(tokenizer.apply_chat_template(turns, tokenize=False))
        except BaseException as error:
            ended.append(error)

    reason = f"is over {MOST_TEMPLATE_BYTES // 1024} KiB" if len(template.encode()) > MOST_TEMPLATE_BYTES else ""
    if not reason:
        thread = threading.Thread(target=render, daemon=True)
        thread.start()
        thread.join(TEMPLATE_SECONDS)
        reason = _find_abuse(ended[0]) if ended else f"takes over {TEMPLATE_SECONDS:g} s for two turns"
    if reason:
        raise ModelError(
            f"the chat template {reason}",
            where=place,
            why="a template comes with the model and is not trusted",
            fix="write a short one, and name it in model.chat_template",
        )


def _find_abuse(result: BaseException | str) -> str:
    from jinja2.exceptions import SecurityError

    if isinstance(result, str):
        return f"writes {len(result)} characters for two turns" if len(result) > MOST_TEMPLATE_BYTES * 16 else ""
    if isinstance(result, (SecurityError, OverflowError, RecursionError, MemoryError)):
        return f"does what a template may not ({printable(str(result)) or type(result).__name__})"
    return ""


def _read_template(path: Path) -> str:
    try:
        if path.stat().st_size > MOST_TEMPLATE_BYTES:
            raise ConfigError(f"over {MOST_TEMPLATE_BYTES // 1024} KiB, which no chat template is", where=str(path))
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"the chat template cannot be read: {reason}", where=str(path)) from error
