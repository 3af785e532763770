"""YAML events to plain data: counts before it builds, and remembers where everything stood."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import yaml

from forge_cli.errors import ConfigError, Problem
from forge_cli.resolve.scalars import ScalarFault, resolve_scalar
from forge_cli.resolve.wording import shorten, show

MAX_DEPTH = 40
MAX_NODES = 10_000
MAX_SCALAR = 100_000

KeyPath = tuple[str | int, ...]
# libyaml is ten times faster; the pure Python parser gives the same events.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Position(NamedTuple):
    """A place in a file; both numbers count from 1."""

    line: int
    column: int


class _Anchor(NamedTuple):
    """A finished ``&name`` node: where it was built, and how much an alias of it would add."""

    value: object
    path: KeyPath
    nodes: int
    height: int


class Builder:
    """Builds the data of one YAML text.

    Args:
        text: The text.
        file: Its name in messages.
        root: Path of the root value; a run file's root has none.
    """

    def __init__(self, text: str, file: str, root: KeyPath = ()) -> None:
        self.positions: dict[KeyPath, Position] = {}
        self.problems: list[Problem] = []
        self.broken: set[KeyPath] = set()
        self._text = text
        self._file = file
        self._root = root
        self._events: Iterator[yaml.Event] = yaml.parse(text, Loader=LOADER)
        self._anchors: dict[str, _Anchor | None] = {}
        self._nodes = 0
        self._height = 0

    def build_root(self) -> object:
        """Builds the one document of the text; ``None`` when there is none.

        Raises:
            ConfigError: The text is not YAML, is too deep or too big, or holds several documents.
        """
        try:
            next(self._events)
            event = next(self._events)
            if isinstance(event, yaml.StreamEndEvent):
                if self._root:
                    self._report(event, self._root, "there is no value", "write one; null for none")
                return None
            event = next(self._events)
            empty = isinstance(event, yaml.ScalarEvent) and not event.value and event.implicit[0] and not self._root
            value = None if empty else self._build(event, self._root, 0)
            next(self._events)
            event = next(self._events)
            if not isinstance(event, yaml.StreamEndEvent):
                raise self._fatal(event, "a second document starts here (---)", "a run file is one document; split it")
            return value
        except yaml.YAMLError as error:
            from forge_cli.resolve.syntax_faults import explain_syntax

            raise ConfigError.from_problems([*self.problems, explain_syntax(error, self._text, self._file)]) from None

    def _build(self, event: yaml.Event, path: KeyPath, depth: int, into: dict | None = None) -> object:
        """Builds the node that starts with an event."""
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise self._fatal(event, f"more than {MAX_NODES} values", "is this a data file?")
        if depth > MAX_DEPTH:
            raise self._fatal(event, f"nested more than {MAX_DEPTH} levels deep", "a run file has 2 or 3 levels")
        if isinstance(event, yaml.AliasEvent):
            return self._expand(event, path, depth)
        if event.tag is not None:
            self._report(event, path, f"tags are not allowed: {_show_tag(event.tag)}", "write the value without it")
        if event.anchor is None:
            return self._build_content(event, path, depth, into)
        before, outer, self._height = self._nodes, self._height, depth
        self._anchors[event.anchor] = None
        value = self._build_content(event, path, depth, into)
        anchor = _Anchor(value, path, self._nodes - before + 1, self._height - depth)
        self._anchors[event.anchor] = anchor
        self._height = max(outer, self._height)
        return value

    def _build_content(self, event: yaml.Event, path: KeyPath, depth: int, into: dict | None) -> object:
        self._height = max(self._height, depth)
        if isinstance(event, yaml.ScalarEvent):
            return self._build_scalar(event, path)
        if isinstance(event, yaml.MappingStartEvent):
            return self._build_mapping(path, depth, {} if into is None else into)
        items: list[object] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            item_path = (*path, len(items))
            self.positions[item_path] = _position(event)
            items.append(self._build(event, item_path, depth + 1))
        return items

    def _build_mapping(self, path: KeyPath, depth: int, target: dict) -> dict:
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._read_key(event, path, depth)
            value_event = next(self._events)
            if key is None:
                self._skip(value_event, path, depth, quietly=not isinstance(event, yaml.ScalarEvent))
            elif key not in target:
                self.positions[*path, key] = _position(event)
                target[key] = self._build(value_event, (*path, key), depth + 1)
            else:
                self._build_twice(event, value_event, (*path, key), depth, target)
        return target

    def _build_twice(self, event: yaml.Event, value_event: yaml.Event, path: KeyPath, depth: int, target: dict) -> None:
        """Reports a key given twice; the first value stays, and a second section is read into the first."""
        key = path[-1]
        first, second = self.positions.get(path), _position(event)
        lines = f"lines {first.line} and {second.line}" if first else f"line {second.line}"
        self._report(event, path, f"the key {show(key)} is given twice: {lines}", "keep one of them", breaks=False)
        if isinstance(value_event, yaml.MappingStartEvent) and isinstance(target[key], dict):
            target[key] = self._build(value_event, path, depth + 1, into=dict(target[key]))
        else:
            self._skip(value_event, path, depth)

    def _skip(self, event: yaml.Event, path: KeyPath, depth: int, quietly: bool = False) -> None:
        """Reads a node and forgets it; unless quietly, what is wrong inside it is still reported."""
        kept = self.positions, self.broken, self.problems
        self.positions, self.broken, self.problems = {}, set(), list(self.problems)
        self._build(event, path, depth + 1)
        problems = self.problems
        self.positions, self.broken, self.problems = kept
        if not quietly:
            self.problems = problems

    def _read_key(self, event: yaml.Event, path: KeyPath, depth: int) -> str | None:
        if isinstance(event, yaml.AliasEvent):
            self._report(event, path, "a key cannot be an alias", "write the key out", breaks=False)
            return None
        if not isinstance(event, yaml.ScalarEvent):
            self._report(
                event,
                path,
                "a key cannot be a mapping or a list",
                'if {{ }} or [ ] belong to the text, quote it: "{{ x }}"',
            )
            self._skip(event, path, depth, quietly=True)
            return None
        plain = event.style in (None, "")
        if event.tag is not None:
            self._report(
                event, path, f"tags are not allowed: {_show_tag(event.tag)}", "write the key without it", breaks=False
            )
            return None
        if plain and event.value == "<<":
            self._report(
                event,
                path,
                "merge keys (<<) are not allowed",
                "put the shared settings in a recipe and name it with extends:",
                breaks=False,
            )
            return None
        if not plain:
            return event.value
        try:
            key = resolve_scalar(event.value)
        except ScalarFault as fault:
            self._report(event, path, f"as a key, {fault.what}", f'quote it ("{shorten(event.value)}")', breaks=False)
            return None
        if not isinstance(key, str):
            self._report(event, path, f"a key must be text, not {show(key)}", "quote it if it is meant", breaks=False)
            return None
        return key

    def _build_scalar(self, event: yaml.ScalarEvent, path: KeyPath) -> object:
        text = event.value
        if len(text) > MAX_SCALAR:
            raise self._fatal(event, f"a text of {len(text)} characters", f"at most {MAX_SCALAR} are read")
        if event.style not in (None, ""):
            return text
        if not text:
            if event.tag is None:
                self._report(
                    event,
                    path,
                    "there is no value",
                    "write one; null for none, {} for a section with its defaults, or remove the line",
                )
            return text
        try:
            return resolve_scalar(text)
        except ScalarFault as fault:
            self._report(event, path, fault.what, fault.fix)
            return text

    def _expand(self, event: yaml.AliasEvent, path: KeyPath, depth: int) -> object:
        """Gives the value of ``*name``, after counting what it would add."""
        if event.anchor not in self._anchors:
            self._report(
                event,
                path,
                f"there is no anchor &{shorten(event.anchor)} above",
                "quote the value if the * is part of it",
            )
            return f"*{event.anchor}"
        anchor = self._anchors[event.anchor]
        if anchor is None:
            raise self._fatal(event, f"the alias *{shorten(event.anchor)} contains itself", "write the value out")
        self._nodes += anchor.nodes
        if self._nodes > MAX_NODES:
            raise self._fatal(event, f"aliases expand to more than {MAX_NODES} values", "write the values out")
        if depth + anchor.height > MAX_DEPTH:
            raise self._fatal(event, f"aliases nest more than {MAX_DEPTH} levels deep", "write the values out")
        self._height = max(self._height, depth + anchor.height)
        length = len(anchor.path)
        self.broken |= {(*path, *one[length:]) for one in self.broken if one[:length] == anchor.path}
        return anchor.value

    def _report(self, event: yaml.Event, path: KeyPath, what: str, fix: str, breaks: bool = True) -> None:
        """Notes a fault that does not stop the reading; an empty value is placed at its key."""
        if breaks:
            self.broken.add(path)
        empty = isinstance(event, yaml.ScalarEvent) and not event.value and event.style in (None, "")
        position = self.positions[path] if empty and path in self.positions else _position(event)
        where = f"{self._file}:{position.line}:{position.column}"
        self.problems.append(Problem(where, ".".join(shorten(str(part)) for part in path), what, fix=fix))

    def _fatal(self, event: yaml.Event, what: str, fix: str) -> ConfigError:
        position = _position(event)
        where = f"{self._file}:{position.line}:{position.column}"
        return ConfigError.from_problems([*self.problems, Problem(where, "", what, fix=fix)])


def _position(event: yaml.Event) -> Position:
    return Position(event.start_mark.line + 1, event.start_mark.column + 1)


def _show_tag(tag: str) -> str:
    return shorten(tag.replace("tag:yaml.org,2002:", "!!"))
