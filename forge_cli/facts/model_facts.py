"""Finds the facts of a model by alias, hub id or folder; no weights, no network."""

from __future__ import annotations

from pathlib import Path

from forge_cli.errors import ConfigError
from forge_cli.facts.shape import ModelFacts
from forge_cli.facts.shelf import find_on_shelf, list_aliases, list_shelf
from forge_cli.paths import assets_root

EMBEDDED_MODEL = "forge-tiny"

_HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"


def find_model_facts(name: str, revision: str | None = None) -> ModelFacts | None:
    """Finds what is known of a model without loading it.

    Args:
        name: Alias, hub id, local folder or ``forge-tiny``.
        revision: Branch, tag or commit of a hub model. The number of positions is left open for it, as only the
            usual revision is on the shelf; the shape of the weights does not change between revisions.

    Returns:
        The facts, or None for a hub id that is not on the shelf.

    Raises:
        ConfigError: The name is no folder, no alias and no hub id.
        ModelError: The folder holds no model that Forge can load.
    """
    folder = _find_folder(name)
    if folder is not None:
        return _read_folder(folder, name)
    facts = find_on_shelf(name)
    if facts is None:
        _refuse_unknown(name)
    elif revision is not None:
        return facts._replace(max_position_embeddings=None)
    return facts


def locate_model(name: str) -> str:
    """Returns what transformers loads: a local folder, the hub id of an alias, or the name unchanged."""
    folder = _find_folder(name)
    if folder is not None:
        return str(folder)
    facts = find_on_shelf(name)
    if facts is None:
        _refuse_unknown(name)
    return facts.hub_id if facts is not None and facts.hub_id is not None else name


def list_models() -> list[ModelFacts]:
    """Lists every model that Forge knows by an alias, the embedded one first."""
    embedded = assets_root() / EMBEDDED_MODEL
    first = [_read_folder(embedded, EMBEDDED_MODEL)] if (embedded / "config.json").is_file() else []
    return first + list_shelf()


def _read_folder(folder: Path, name: str) -> ModelFacts:
    from forge_cli.facts.local_model import read_local_model  # half of this room's start-up, and seldom needed

    return read_local_model(folder, name)


def _find_folder(name: str) -> Path | None:
    """Returns the model's folder; a folder wins over an alias only if it holds a configuration."""
    if name.casefold() == EMBEDDED_MODEL:
        return assets_root() / EMBEDDED_MODEL
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file() or (folder.is_dir() and ("/" in name or find_on_shelf(name) is None)):
        return folder
    return None


def _refuse_unknown(name: str) -> None:
    """Raises unless the name can be a hub id."""
    import re

    if re.fullmatch(_HUB_ID, name):
        return
    if "/" in name or "\\" in name or name.startswith(("~", ".")):
        raise ConfigError(
            f"there is no model folder {name}",
            why="it is neither a folder nor a hub name (org/name)",
            fix="check the path; it is taken relative to the working directory",
        )
    import difflib

    near = difflib.get_close_matches(name.casefold(), [*list_aliases(), EMBEDDED_MODEL], n=3, cutoff=0.5)
    raise ConfigError(
        f"{name} is no known model",
        why="it is no alias, no folder and no hub name (org/name)",
        fix=f"did you mean {' or '.join(near)}?" if near else "type `forge models list` for the aliases",
    )
