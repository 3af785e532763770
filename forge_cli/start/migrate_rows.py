"""One data set of another tool: its keys, each used once, and the source that Forge makes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from forge_cli.resolve.sources import HUB_PREFIX, is_data_file
from forge_cli.resolve.wording import show
from forge_cli.resolve.yaml_reader import KeyPath
from forge_cli.start.migrate_draft import DIFFERS, UNKNOWN, UNNEEDED, UNSUPPORTED, Draft

_LOADERS = ("json", "jsonl", "csv", "parquet", "text", "arrow", None)
MOST_BYTES = 5_000_000  # of a file that is only looked at
_SLICE = re.compile(r"(\w+)\[:(\d{1,9})\]")


class DataSet:
    """The keys of one data set.

    Args:
        draft: The run file in the making.
        place: Where they stand.
        value: What they say.
    """

    def __init__(self, draft: Draft, place: KeyPath, value: dict) -> None:
        self.draft, self.place, self.value = draft, place, value
        self.left = [key for key in draft.source.leaves if key[: len(place)] == place and len(key) > len(place)]
        self.used: list[KeyPath] = []

    def _keys(self, name: str) -> list[KeyPath]:
        found = [key for key in (*self.left, *self.used) if key[len(self.place)] == name]
        self.left, self.used = ([key for key in keys if key not in found] for keys in (self.left, self.used))
        return found

    def take(self, name: str, default: object = None) -> object:
        """Returns the value of a key, which counts as carried; an empty one is not there."""
        keys, value = self._keys(name), self.value.get(name)
        if value not in (None, "", [], {}):
            self.used += keys
            return value
        for key in keys:
            self.draft.leave(key, UNNEEDED, "it is empty")
        return default

    def carry(self, path: str, value: object, name: str) -> None:
        """Carries a key to a setting other than the rows."""
        self.draft.carry(path, value, *self._keys(name))

    def leave(self, name: str, kind: str, why: str) -> None:
        """Reports a key, whether it was taken or not."""
        for key in self._keys(name):
            self.draft.leave(key, kind, why)

    def take_split(self, name: str) -> dict:
        """Returns the part of a source that a split says."""
        split = self.take(name)
        match = _SLICE.fullmatch(split) if isinstance(split, str) else None
        if match:
            self.draft.note("data.train", f"{show(split)}: as many rows are drawn by the seed here, not the first ones")
            rows = {"rows": int(match.group(2))} if int(match.group(2)) else {}
            return rows | ({} if match.group(1) == "train" else {"split": match.group(1)})
        if split is not None and not re.fullmatch(r"[\w.-]+", str(split)):
            self.leave(name, UNSUPPORTED, "a split is one name here; rows: N draws N rows of it")
            return {}
        return {} if split in (None, "train") else {"split": str(split)}

    def take_paths(self, name: str, files: str, usual: str | None = None) -> list[str]:
        """Returns what a loader and its files name."""
        path, listed = self.take(name, usual), self.take(files, [])
        listed = next(iter(listed.values()), []) if isinstance(listed, dict) else listed
        listed = [one for one in (listed if isinstance(listed, list) else [listed]) if isinstance(one, str) and one]
        if listed and path in _LOADERS:
            return listed
        if listed and is_data_file(str(path)):
            return [str(Path(str(path)) / one) for one in listed]
        if listed:
            self.leave(files, DIFFERS, "a split of a hub data set is read, not single files of it")
        return [str(path)] if path else []

    def add(self, target: str, paths: list[str], source: dict, form: str | None) -> None:
        """Adds a source for each path, and reports what is left by the table of the tool."""
        add_sources(self.draft, target, [{"path": path, **source} for path in paths], self.used, form)
        reasons = {one: (row["kind"], row["why"]) for row in self.draft.table.get("rows", []) for one in row["keys"]}
        for key in self.left:
            kind, why = reasons.get(str(key[len(self.place)]), (UNKNOWN, "no key of a data set that Forge knows"))
            off = kind != UNKNOWN and self.draft.source.leaves[key] in (None, "", [], {}, False)
            self.draft.leave(key, UNNEEDED if off else kind, "it is off" if off else why)


def list_data_sets(draft: Draft, name: str) -> list[DataSet]:
    """Returns the data sets under a key: one, or a list of them."""
    value = draft.source.data.get(name)
    places = (
        [((name, index), one) for index, one in enumerate(value)] if isinstance(value, list) else [((name,), value)]
    )
    return [DataSet(draft, place, one) for place, one in places if isinstance(one, dict) and one]


def add_sources(draft: Draft, target: str, sources: list[dict], keys: list[KeyPath], form: str | None) -> None:
    """Adds sources to the rows; their format is named when all agree."""
    if not sources:
        return
    plain: list = [one["path"] if list(one) == ["path"] else one for one in sources]
    known = draft.values.get(target)
    plain = [*(known if isinstance(known, list) else [known] if known else []), *plain]
    draft.values.pop(target, None)
    draft.carry(target, plain[0] if len(plain) == 1 else plain, *keys)
    if target == "data.train":
        draft.forms.add(form)
        draft.values.pop("data.format", None)
        if len(draft.forms) == 1 and form is not None:
            draft.values["data.format"] = form


def name_hub(path: str, subset: object = None, revision: object = None) -> str:
    """Writes a hub data set with its subset and revision."""
    if is_data_file(path) or not (subset or revision):
        return path
    return f"{HUB_PREFIX}{path}" + (f"/{subset}" if subset else "") + (f"@{revision}" if revision else "")


def count_rows(path: str, usual: int) -> int:
    """Counts the rows of a small local file; what cannot be counted has ``usual`` rows."""
    try:
        file = Path(path)
        if file.suffix not in (".json", ".jsonl") or not file.is_file() or file.stat().st_size > MOST_BYTES:
            return usual
        text = file.read_text(encoding="utf-8")
        return len(json.loads(text)) if file.suffix == ".json" else len(text.splitlines())
    except (OSError, ValueError, TypeError, RecursionError):
        return usual
