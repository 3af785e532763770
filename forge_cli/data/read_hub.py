"""Reads rows from data sets of the hub, through the datasets library; a data set's own code is never run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from hashlib import blake2b
from typing import TYPE_CHECKING

from forge_cli.data.hub import explain_absence
from forge_cli.data.read_row import BadRow, Row
from forge_cli.errors import DataError, MachineError
from forge_cli.resolve.sources import HUB_PREFIX
from forge_cli.resolve.wording import printable

if TYPE_CHECKING:
    from datasets import Dataset

_PLAIN = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
_FULL = re.compile(r"(?:datasets/)?(\w[\w.-]*/\w[\w.-]*)(?:/(\w[\w.-]*))?(?:@([\w./-]+))?")


def is_hub_name(path: str) -> bool:
    """Tells whether a source is written like a data set of the hub: ``org/name``, ``hf://org/name[/subset]``."""
    if path.startswith(HUB_PREFIX):
        return _FULL.fullmatch(path.removeprefix(HUB_PREFIX)) is not None
    return _PLAIN.fullmatch(path) is not None


def read_hub(name: str, split: str) -> Iterator[Row | BadRow]:
    """Reads the rows of a split from the library's memory-mapped table; columns that a row lacks come as ``None``.

    Raises:
        DataError: There is no such data set, subset, revision or split, or its files cannot be read.
        MachineError: The hub cannot be reached, and no copy of the data set lies on this machine.
    """
    dataset = _load(name, split)
    try:
        for number, values in enumerate(dataset, 1):
            yield Row(number, values)
    except (ValueError, OSError, ImportError) as error:
        raise DataError(f"a row cannot be read: {_first_line(error)}", where=name) from error


def fingerprint_hub(name: str, split: str) -> str:
    """Returns a digest of what the library knows a split by: data set, subset, commit and split."""
    return blake2b(_load(name, split)._fingerprint.encode()).hexdigest()


def _load(name: str, split: str) -> Dataset:
    from datasets import load_dataset_builder

    repository, subset, revision = _FULL.fullmatch(name.removeprefix(HUB_PREFIX)).groups()
    try:
        # Without the prefix, the library would take a folder of this name before the hub.
        builder = load_dataset_builder(f"hf://datasets/{repository}", subset, revision=revision)
        builder.download_and_prepare()
        commit, copied = builder.hash, type(builder).__module__.endswith(".cache")
        dataset = builder.as_dataset(split)
    except ConnectionError as error:
        command, then = f"hf download {repository} --repo-type dataset", "name its files in place of the data set"
        raise explain_absence(f"the data set {repository}", name, command, then) from error
    except Exception as error:
        fix = f"check the name and the split ({split}); a subset is written hf://{repository}/SUBSET, and a gated or "
        fix += "private one needs `hf auth login`"
        raise DataError(f"the data set cannot be loaded: {_first_line(error)}", where=name, fix=fix) from error
    if copied and revision not in (None, commit):
        # The library takes the newest copy, whatever revision was asked for.
        what = f"the hub cannot be reached, and the copy on this machine is of the revision {commit}"
        raise MachineError(what, where=name, fix=f"write @{commit}, or check the network")
    return dataset


def _first_line(error: Exception) -> str:
    return printable((str(error).strip() or type(error).__name__).splitlines()[0][:300])
