"""The models that Forge knows by name: ``configs/models/*.yaml``."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

from forge_cli.facts.shape import ModelFacts
from forge_cli.paths import data_root


@cache
def find_on_shelf(name: str) -> ModelFacts | None:
    """Finds a model by alias (upper and lower case alike) or hub id; None if it is not on the shelf.

    A hub id of the same shape is found too, without the number of positions: fine-tuned releases change it.
    """
    wanted = name.casefold()
    # YAML is parsed only where the name occurs: reading the whole shelf would take longer than the rest of
    # `forge config validate`.
    for entry in _entries(wanted):
        alias, fields = _parse(entry)
        aliases = [alias, *fields.pop("aliases", [])]
        same_shape = fields.pop("same_shape", [])
        if wanted in [known.casefold() for known in aliases] or name == fields["hub_id"]:
            return ModelFacts(name=name, path=None, **fields)
        if name in same_shape:
            return ModelFacts(name=name, path=None, **{**fields, "hub_id": name, "max_position_embeddings": None})
    return None


def list_shelf() -> list[ModelFacts]:
    """Lists the models on the shelf, in the order of the files; each is named by its alias."""
    models = []
    for entry in _entries():
        alias, fields = _parse(entry)
        fields.pop("aliases", None)
        fields.pop("same_shape", None)
        models.append(ModelFacts(name=alias, path=None, **fields))
    return models


def list_aliases() -> list[str]:
    """Lists every name that stands for a model on the shelf."""
    names = []
    for entry in _entries():
        alias, fields = _parse(entry)
        names += [alias, *fields.get("aliases", [])]
    return names


def _entries(wanted: str = "") -> list[str]:
    """Cuts the files into one text per model, and keeps those in which a casefolded text occurs.

    An entry starts where a line starts with neither a space nor #.
    """
    entries: list[list[str]] = []
    folder = os.path.join(data_root(), "configs", "models")
    for file in sorted(os.listdir(folder)):
        if not file.endswith(".yaml"):
            continue
        with open(os.path.join(folder, file), encoding="utf-8") as stream:
            text = stream.read()
        for line in text.splitlines() if wanted in text.casefold() else ():
            if line and line[0] not in " #":
                entries.append([line])
            elif entries and line.startswith(" "):
                entries[-1].append(line)
    return [entry for lines in entries if wanted in (entry := "\n".join(lines)).casefold()]


def _parse(entry: str) -> tuple[str, dict[str, Any]]:
    import yaml

    ((alias, fields),) = yaml.load(entry, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)).items()
    return alias, fields
