"""Asks the hub once whether it is there. Its client asks for every file six times, and prints that for a minute."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from forge_cli.errors import ForgeError, MachineError, ModelError
from forge_cli.facts.model_facts import locate_model
from forge_cli.resolve.sources import is_data_file, is_embedded_data
from forge_cli.resolve.wording import printable
from forge_cli.schema.data import list_sources
from forge_cli.schema.runspec import RunSpec

ANSWER_SECONDS = 5.0


@contextlib.contextmanager
def hub_or_copies(spec: RunSpec, say: Callable[[str], None]) -> Iterator[None]:
    """Works on the copies that lie on this machine while the hub does not answer; a later run asks again."""
    from huggingface_hub import constants

    was_offline = constants.HF_HUB_OFFLINE
    if not was_offline and _needs_hub(spec) and not hub_answers():
        say(f"{constants.ENDPOINT} cannot be reached; only what lies on this machine is used")
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def _needs_hub(spec: RunSpec) -> bool:
    names = [one.path for one in (*list_sources(spec.data.train), *list_sources(spec.data.eval))]
    places = [locate_model(spec.model.name), *(one for one in names if not is_data_file(one))]
    return not all(is_embedded_data(one) or Path(one).exists() for one in places)


def hub_answers(seconds: float = ANSWER_SECONDS) -> bool:
    """Tells whether the hub answers in time, whatever it says."""
    from huggingface_hub import constants, get_session

    answers: list[object] = []

    def ask() -> None:
        # Which errors there are depends on the client's own HTTP library.
        with contextlib.suppress(Exception):
            answers.append(get_session().head(constants.ENDPOINT, timeout=seconds))

    # Looking up the name has no timeout of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def explain_loading(error: Exception, name: str, what: str) -> ForgeError:
    """Builds the error for a model or tokenizer that cannot be loaded.

    Args:
        error: What transformers raised.
        name: Hub name or folder.
        what: What was to be loaded, in words.

    Returns:
        A ``MachineError`` where only the hub is missing, else a ``ModelError``.
    """
    from huggingface_hub import is_offline_mode
    from huggingface_hub.errors import LocalEntryNotFoundError

    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, LocalEntryNotFoundError):
        cause = cause.__cause__ or cause.__context__
    # Of a model whose other files lie here, the library says that the hub has none.
    if cause is not None or (is_offline_mode() and "does not appear to have" in str(error)):
        return explain_absence(what, "model.name", f"hf download {name}", "write model.name: FOLDER")
    first_line = printable((str(error).strip() or type(error).__name__).splitlines()[0][:300])
    fix = f"check that {name} holds a whole model (safetensors only)"
    if not Path(name).is_dir():
        fix = "check the name; run `hf auth login` for a gated or private model; or name a folder with its files"
    return ModelError(f"{what} cannot be loaded: {first_line}", where="model.name", fix=fix)


def explain_absence(what: str, where: str, command: str, then: str) -> MachineError:
    """Builds the error for something of the hub that is not on this machine while the hub is out of reach.

    Args:
        what: What is missing, in words.
        where: The setting or source that names it.
        command: What downloads it.
        then: What to write once it lies in ``FOLDER``.
    """
    from huggingface_hub import constants

    reason, first = f"{constants.ENDPOINT} cannot be reached", "check the network, the proxy and HF_ENDPOINT"
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in constants.ENV_VARS_TRUE_VALUES:
            reason, first = f"{variable} is set", f"unset {variable}"
    fix = f"{first}; or run `{command} --local-dir FOLDER` where there is a network, and {then}"
    return MachineError(f"{what} is not on this machine, and {reason}", where=where, fix=fix)
