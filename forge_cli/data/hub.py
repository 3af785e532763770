"""Asks the hub once whether it is there. Its client asks for every file six times, and prints that for a minute."""

from __future__ import annotations

import contextlib
import logging
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
    """Works on the copies that lie on this machine while the hub does not answer; a later run asks again.

    A run that needs nothing of the hub does not talk to it at all.
    """
    from huggingface_hub import constants

    was_offline = constants.HF_HUB_OFFLINE
    if not was_offline and not _needs_hub(spec):
        leave_hub(spec)
    elif not was_offline and not hub_answers():
        say(f"{constants.ENDPOINT} cannot be reached; only what lies on this machine is used")
        constants.HF_HUB_OFFLINE = True
    # It reports every retry to the terminal; what matters comes as an exception.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline


def leave_hub(spec: RunSpec) -> None:
    """Keeps the libraries from asking the hub once model and rows lie here, until :func:`hub_or_copies` ends.

    Rows that are streamed from the hub still come, and trackers have a network of their own.
    """
    from huggingface_hub import constants

    if not spec.logging.report_to and not (spec.data.streaming and _needs_hub_rows(spec)):
        constants.HF_HUB_OFFLINE = True


def _needs_hub(spec: RunSpec) -> bool:
    return not Path(locate_model(spec.model.name)).exists() or _needs_hub_rows(spec)


def _needs_hub_rows(spec: RunSpec) -> bool:
    names = [one.path for one in (*list_sources(spec.data.train), *list_sources(spec.data.eval))]
    return not all(is_data_file(one) or is_embedded_data(one) or Path(one).exists() for one in names)


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

    causes = _list_causes(error)
    status = next((one.response.status_code for one in causes if getattr(one, "response", None) is not None), 0)
    if (refusal := _explain_status(status, what)) is not None:
        return refusal
    # Of a model whose other files lie here, the library says that the hub has none.
    is_absent = is_offline_mode() and "does not appear to have" in str(error)
    if is_absent or any(isinstance(one, LocalEntryNotFoundError) for one in causes):
        return explain_absence(what, "model.name", f"hf download {name}", "write model.name: FOLDER")
    first_line = printable((str(error).strip() or type(error).__name__).splitlines()[0][:300])
    fix = f"check that {name} holds a whole model (safetensors only)"
    if not Path(name).is_dir():
        fix = "check the name; run `hf auth login` for a gated or private model; or name a folder with its files"
    return ModelError(f"{what} cannot be loaded: {first_line}", where="model.name", fix=fix)


def _list_causes(error: BaseException | None) -> list[BaseException]:
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def _explain_status(status: int, what: str) -> ForgeError | None:
    """Builds the error for what the hub answered; ``None`` where that tells no more than the library does."""
    from huggingface_hub import constants

    if status in (401, 403):  # the hub says 401 for what does not exist, too
        said = f"{what} is private or gated, or its name or the token is wrong ({status})"
        fix = "check the name; run `hf auth login` or set HF_TOKEN; ask for a gated model on its page"
        return ModelError(said, where="model.name", fix=fix)
    if status == 429:
        said = f"{constants.ENDPOINT} answers too many requests ({status}) for {what}"
        return MachineError(said, where="model.name", fix="wait some minutes, or set HF_TOKEN: the limit is higher")
    if status >= 500:
        said = f"{constants.ENDPOINT} is out of order ({status}), so {what} cannot be fetched"
        return MachineError(said, where="model.name", fix="try again later, or name a folder with its files")
    return None


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
