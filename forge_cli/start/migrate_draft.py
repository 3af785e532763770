"""A run file in the making: what each key of the other tool's file became."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_origin

from forge_cli.resolve.schema_tree import find_field, list_members
from forge_cli.resolve.wording import show
from forge_cli.resolve.yaml_reader import KeyPath
from forge_cli.start.migrate_source import Source, load_table, plain_name, show_key

CARRIED, UNSUPPORTED, DECIDED, UNNEEDED, DIFFERS, UNKNOWN = KINDS = (
    "carried", "not supported", "Forge decides", "not needed", "differs", "unknown key",
)  # fmt: skip
_OFF = (None, False, "", "no", "none", "None", 0, "false")


class Line(NamedTuple):
    """What became of a key, or what a value means here.

    Attributes:
        key: The key in the other tool's file; a setting of Forge for a default that no key gave.
        kind: One of ``KINDS``.
        text: Why, or how it differs.
        where: ``file:line:column``; empty for a default.
        to: Settings that hold its value now.
    """

    key: str
    kind: str
    text: str
    where: str
    to: tuple[str, ...] = ()


class Draft:
    """Settings on their way, and one line for every key of the source.

    Args:
        source: The other tool's file.
        tool: Its name among ``TOOLS``.
    """

    def __init__(self, source: Source, tool: str) -> None:
        self.source, self.tool, self.table = source, tool, load_table(tool)
        self.shared = load_table("shared")
        self.name: str = self.table["name"]
        self.values: dict[str, object] = {}
        self.keys: dict[str, list[KeyPath]] = {}
        self.lines: dict[KeyPath, Line] = {}
        self.notes: list[Line] = []
        self.facts: dict[str, tuple[object, KeyPath]] = {}
        self.forms: set[str | None] = set()  # of the training rows
        self._entries: dict[str, object] = {}
        for table in (self.shared, self.table) if self.table["uses_shared"] else (self.table,):
            for group in table["leave"]:
                self._entries |= dict.fromkeys(group["keys"], (group["kind"], group["why"]))
            self._entries |= table["carry"]
        for key, value in source.leaves.items():
            if plain_name(key).split(".")[0] not in self.table["data"]:
                self._place(key, value)

    def _place(self, key: KeyPath, value: object) -> None:
        """Makes one key a setting, a fact, or a line that says why not."""
        parts = plain_name(key).split(".")
        known = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        name = next((one for one in known if one in self._entries), "")
        entry = self._entries.get(name)
        if entry is None:
            return self.leave(key, UNKNOWN, _find_hint(parts[-1]))
        if isinstance(entry, tuple):
            off = not isinstance(value, (dict, list)) and value in _OFF
            return self.leave(key, UNNEEDED, f"it is {show(value)}") if off else self.leave(key, *entry)
        if name != ".".join(parts):
            return self.leave(key, UNSUPPORTED, f"{name} has one value here")
        if value in (None, "", [], {}):
            return self.leave(key, UNNEEDED, "it is empty")
        entry = {"to": entry} if isinstance(entry, str) else entry
        if entry["to"].startswith("."):
            if entry["to"] in self.facts:
                return self.leave(key, UNNEEDED, f"{show_key(self.facts[entry['to']][1])} says it already")
            self.facts[entry["to"]] = (value, key)
            return None
        if "values" in entry:
            return self.look_up(entry["to"], value, key, entry["values"])
        return self.carry(entry["to"], value, key, note=entry.get("note", ""))

    def look_up(self, path: str, value: object, key: KeyPath, table: str) -> None:
        """Carries a value by a table of values; says so where Forge has none like it."""
        known = self.table.get("values", {}).get(table) or self.shared["values"][table]
        name = str(value).lower() if table != "components" else str(value).rpartition(".")[2]
        if name not in known:
            kept = self.values.get(path, find_field(path).default)
            return self.leave(key, UNSUPPORTED, f"Forge has no {show(value)}; {path} stays {show(kept)}")
        found = known[name]
        if found is None:
            return self.leave(key, UNNEEDED, f"it is {show(value)}, which changes nothing")
        ours, note = found if isinstance(found, list) else (found, "")
        return self.carry(path, ours, key, note=note and f"{show(value)} is {show(ours)} here: {note}")

    def carry(self, path: str, value: object, *keys: KeyPath, note: str = "") -> None:
        """Sets a setting from keys; the first one that says more than the default stays."""
        value, field = _coerce(path, value), find_field(path)
        if path in self.values and self.values[path] != value:
            if field is not None and value == field.default:
                for key in keys:
                    self.leave(key, UNNEEDED, f"another key says {show(self.values[path])}")
                return
            if field is None or self.values[path] != field.default:
                for key in keys:
                    self.leave(key, DIFFERS, f"{path} is {show(self.values[path])} already, by another key")
                return
            for key in self.keys.pop(path, []):
                self.leave(key, UNNEEDED, f"another key says {show(value)}")
        self.values[path] = value
        self.keys.setdefault(path, []).extend(keys)
        for key in keys:
            to = (*self.lines[key].to, path) if key in self.lines else (path,)
            self.lines[key] = Line(show_key(key), CARRIED, "", self.source.where(key), to)
        if note:
            self.note(path, note)

    def leave(self, key: KeyPath, kind: str, why: str) -> None:
        """Says why a key has no setting."""
        self.lines[key] = Line(show_key(key), kind, why, self.source.where(key))

    def drop(self, path: str, kind: str, why: str) -> None:
        """Takes a setting back and says why, for every key that gave it."""
        self.values.pop(path, None)
        for key in self.keys.pop(path, []):
            to = tuple(one for one in self.lines[key].to if one != path)
            self.lines[key] = Line(
                show_key(key), CARRIED if to else kind, "" if to else why, self.source.where(key), to
            )
        self.notes = [one for one in self.notes if path not in one.to]

    def drop_section(self, section: str, why: str) -> None:
        """Takes back every setting of a section that is off."""
        for path in [one for one in self.values if one.startswith(f"{section}.")]:
            self.drop(path, UNNEEDED, why)

    def note(self, path: str, text: str) -> None:
        """Notes that a value means something else here."""
        keys = self.keys.get(path, [])
        where = self.source.where(keys[0]) if keys else ""
        self.notes.append(Line(", ".join(show_key(key) for key in keys) or path, DIFFERS, text, where, (path,)))

    def look(self, name: str, default: object = None) -> object:
        """Returns a fact."""
        return self.facts[name][0] if name in self.facts else default

    def look_number(self, name: str) -> object:
        """Returns a fact, as a number where its text is one."""
        value = self.look(name)
        return _read_number(value) if isinstance(value, str) else value

    def pop(self, *names: str) -> list[KeyPath]:
        """Takes facts away and returns their keys."""
        return [self.facts.pop(name)[1] for name in names if name in self.facts]


def _find_hint(name: str) -> str:
    from forge_cli.resolve.unknown_keys import load_foreign_keys

    target, note = load_foreign_keys().get(name.lower(), (None, ""))
    hint = "; ".join(part for part in (f"Forge calls it {target}" if target else "", note) if part)
    return hint or "no key of this tool that Forge knows"


def _coerce(path: str, value: object) -> object:
    """Gives text the type that the setting has: other readers take 1e-5 for text, and lists are written with commas."""
    field = find_field(path)
    members = list_members(field.annotation) if field else []
    kinds = [get_origin(one) or one for one in members]
    if isinstance(value, str) and str not in members:
        if list in kinds and (Literal not in kinds or "," in value):
            return [one.strip() for one in value.split(",") if one.strip()]
        if bool in members and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if float in members or int in members:
            value = _read_number(value)
    if isinstance(value, float) and int in members and float not in members and value.is_integer():
        return int(value)
    return str(value) if type(value) in (int, float) and str in members and len(members) <= 2 else value


def _read_number(text: str) -> float | int | str:
    try:
        number = float(text)
    except ValueError:
        return text
    return int(text) if text.lstrip("+-").isdecimal() and len(text) < 20 else number
