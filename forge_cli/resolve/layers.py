"""The layers of a run, weakest first: schema defaults, preset, recipe, ``model.adapter``, run file, ``--set``.

Mappings merge by key, lists and scalars are replaced whole, ``null`` switches a section off and a stronger layer
may switch it on again, with the schema's defaults. Every value remembers who said it, and whom it hid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from forge_cli.errors import ConfigError, Problem
from forge_cli.paths import data_root
from forge_cli.redaction import holds_secret
from forge_cli.resolve.adapter_file import find_adapter
from forge_cli.resolve.schema_tree import find_sections, is_on_by_default, is_optional, iterate_leaves
from forge_cli.resolve.wording import printable, show
from forge_cli.resolve.yaml_reader import Document, KeyPath, read_value, read_yaml

Kind = Literal["default", "preset", "recipe", "adapter", "file", "set"]
RANKS: dict[str, int] = {"default": 0, "preset": 1, "recipe": 2, "adapter": 3, "file": 4, "set": 5}
_MOST_RECIPES = 5
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789_-")
_DEFAULT_WHERE = "schema default"


class Origin(NamedTuple):
    """Who gave a value.

    Attributes:
        kind: The layer.
        where: The place in it: ``run.yaml:14:5``, ``preset qlora (qlora.yaml:9)``, ``--set``, ``schema default``.
        value: What it said; ``None`` also when it switched the section off.
    """

    kind: Kind
    where: str
    value: object


@dataclass
class Layers:
    """All layers on top of each other.

    Attributes:
        values: What the strongest said, ready for the schema.
        history: Dotted path to everybody who said something about it, weakest first. Sections have an entry of
            their own: who named them or switched them off.
        problems: What is wrong with the layers themselves.
        broken: Dotted paths that ``problems`` is about; nothing more should be said about them.
        inside: Dotted path of a setting to a function that places what is inside its value.
        source: Name of the run file.
    """

    values: dict
    history: dict[str, list[Origin]]
    problems: list[Problem] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    inside: dict[str, Callable[[KeyPath], str]] = field(default_factory=dict)
    source: str = ""


class _Layer(NamedTuple):
    kind: Kind
    label: str
    document: Document

    def where(self, path: KeyPath) -> str:
        """Returns the place of a path, in the words of an :class:`Origin`."""
        if self.kind not in ("preset", "recipe"):
            return self.document.where(path)
        place = self.document.where(path).rpartition("/")[2]
        return f"{self.label} ({place.rpartition(':')[0] or place})"


def load_preset(name: str) -> Document:
    """Reads a shipped preset by name.

    Raises:
        ConfigError: There is no such preset.
    """
    return _load("preset", name)


def load_recipe(name: str) -> Document:
    """Reads a shipped recipe by name.

    Raises:
        ConfigError: There is no such recipe.
    """
    return _load("recipe", name)


def _load(kind: str, name: str) -> Document:
    folder = data_root() / "configs" / "presets" if kind == "preset" else data_root() / "recipes"
    path = folder / f"{name}.yaml"
    if 0 < len(name) <= 64 and _NAME_CHARACTERS.issuperset(name) and path.is_file():
        return read_yaml(path)
    from forge_cli.resolve.nearness import find_nearest

    known = sorted(one.stem for one in folder.glob("*.yaml"))
    near = find_nearest(name, known)
    fix = f"did you mean {near}?" if near else f"known: {', '.join(known) or 'none'}"
    raise ConfigError(f"there is no {kind} {show(name)}", fix=fix)


def stack_layers(document: Document, overrides: Sequence[str]) -> Layers:
    """Merges all layers of a run.

    Args:
        document: The run file.
        overrides: ``path=value`` texts of ``--set``, weakest first.

    Returns:
        The merged values with their history; problems are collected, not raised.
    """
    layers = Layers(values={}, history={}, source=document.file)
    top = [_Layer("file", document.file, document)]
    top += [_Layer("set", "--set", one) for one in _read_overrides(overrides, layers.problems)]
    below = _find_layers_below(top, layers)
    if (adapter := find_adapter([one.document for one in [*below, *top]])) is not None:
        below.append(_Layer("adapter", adapter.file, adapter))
    for section in find_sections():
        if section == "" or is_on_by_default(section):
            _start_section(layers, section)
        if section:
            value = {} if is_on_by_default(section) else None
            layers.history[section] = [Origin("default", _DEFAULT_WHERE, value)]
    for layer in [*below, *top]:
        _merge_layer(layers, layer)
    return layers


def _read_overrides(overrides: Sequence[str], problems: list[Problem]) -> list[Document]:
    """Turns each ``path=value`` into a document with that one path."""
    documents = []
    for text in overrides:
        path, equals, value_text = text.partition("=")
        path = path.strip()
        if not equals or not path:
            what = f'no "=" in --set {show(text)}' if not equals else f"no path before the = in --set {show(text)}"
            problems.append(Problem("--set", "", what, fix="write --set path=value, for example --set lora.r=8"))
            continue
        parts: KeyPath = tuple(path.split("."))
        try:
            value = read_value(value_text, "--set")
        except ConfigError as error:
            problems.extend(Problem("--set", printable(path), one.what, one.why, one.fix) for one in error.problems)
            continue
        data = value.data["value"]
        for part in reversed(parts):
            data = {part: data}
        problems_here = [
            Problem("--set", f"{printable(path)}{one.path}", one.what, one.why, one.fix) for one in value.problems
        ]
        broken = {(*parts, *one[1:]) for one in value.broken}
        documents.append(Document("--set", data, {}, problems_here, broken))
    return documents


def _find_layers_below(top: list[_Layer], layers: Layers) -> list[_Layer]:
    """Finds the recipes and the preset that the layers name; the strongest layer that names one decides."""
    recipes: list[_Layer] = []
    seen: list[str] = []
    namer = _find_namer(top, "extends")
    while namer is not None:
        name = namer.document.data["extends"]
        if not isinstance(name, str):
            break
        if name in seen or len(seen) == _MOST_RECIPES:
            what = f"recipes extend each other in a circle: {' > '.join([*seen, name])}"
            what = what if name in seen else f"more than {_MOST_RECIPES} recipes on top of each other"
            layers.problems.append(Problem(namer.where(("extends",)), "extends", what))
            break
        recipe = _load_below(namer, "extends", "recipe", name, layers)
        if recipe is None:
            break
        seen.append(name)
        recipes.insert(0, recipe)
        namer = recipe if isinstance(recipe.document.data.get("extends"), str) else None
    presets: list[_Layer] = []
    namer = _find_namer([*recipes, *top], "preset")
    if namer is not None and isinstance(name := namer.document.data["preset"], str):
        preset = _load_below(namer, "preset", "preset", name, layers)
        presets = [preset] if preset else []
    return [*presets, *recipes]


def _find_namer(candidates: list[_Layer], key: str) -> _Layer | None:
    return next((layer for layer in reversed(candidates) if key in layer.document.data), None)


def _load_below(namer: _Layer, key: str, kind: Literal["preset", "recipe"], name: str, layers: Layers) -> _Layer | None:
    """Loads the preset or recipe a layer names; notes a problem at that layer when there is none."""
    try:
        document = load_preset(name) if kind == "preset" else load_recipe(name)
    except ConfigError as error:
        layers.broken.add(key)
        for one in error.problems:
            where = f"{namer.where((key,))}" if not one.where else one.where
            layers.problems.append(Problem(where, key, one.what, one.why, one.fix))
        return None
    for forbidden in ("preset", "extends") if kind == "preset" else ():
        if forbidden in document.data:
            layers.problems.append(Problem(document.where((forbidden,)), forbidden, "a preset stands on nothing else"))
    return _Layer(kind, f"{kind} {name}", document)


def _start_section(layers: Layers, section: str) -> None:
    """Switches a section on with the schema's defaults."""
    if section:
        layers.values[section] = {}
    for path, one in iterate_leaves(section):
        origins = layers.history.setdefault(path, [])
        if not one.is_required():
            default = one.get_default(call_default_factory=True)
            origins.append(Origin("default", _DEFAULT_WHERE, default))


def _merge_layer(layers: Layers, layer: _Layer) -> None:
    """Puts one layer on top of those below."""
    document = layer.document
    layers.problems.extend(document.problems)
    layers.broken |= {".".join(str(part) for part in path if isinstance(part, str)) for path in document.broken}
    _refuse_secrets(layers, layer, document.data, ())
    sections = find_sections()
    for key, value in document.data.items():
        path = (key,)
        if key not in sections[""].model_fields:
            _note_unknown(layers, layer, path, value)
        elif key not in sections:
            _put_leaf(layers, layer, path, layers.values, value)
        elif isinstance(value, dict):
            _merge_section(layers, layer, key, value)
        elif value is None and is_optional(key) and path not in document.broken:
            _switch_off(layers, key, Origin(layer.kind, layer.where(path), None))
        elif path not in document.broken:
            from forge_cli.resolve.unknown_keys import explain_not_a_section

            layers.problems.append(explain_not_a_section(layer.where(path), key, value))
            layers.broken.add(key)


def _merge_section(layers: Layers, layer: _Layer, section: str, values: dict) -> None:
    if layers.values.get(section) is None:
        _start_section(layers, section)
    layers.history[section].append(Origin(layer.kind, layer.where((section,)), {}))
    known = find_sections()[section].model_fields
    for key, value in values.items():
        if key in known:
            _put_leaf(layers, layer, (section, key), layers.values[section], value)
        else:
            _note_unknown(layers, layer, (section, key), value)


def _put_leaf(layers: Layers, layer: _Layer, path: KeyPath, target: dict, value: object) -> None:
    dotted = ".".join(str(part) for part in path)
    target[path[-1]] = value
    layers.history[dotted].append(Origin(layer.kind, layer.where(path), value))
    layers.inside[dotted] = lambda rest: layer.where((*path, *rest))


def _switch_off(layers: Layers, section: str, origin: Origin) -> None:
    layers.history[section].append(origin)
    was_on = layers.values.get(section) is not None
    # Not merely left out: some sections are on by default.
    layers.values[section] = None
    if was_on:
        for path, _ in iterate_leaves(section):
            layers.history[path].append(origin)


def _note_unknown(layers: Layers, layer: _Layer, path: KeyPath, value: object) -> None:
    if path in layer.document.broken:
        return
    from forge_cli.resolve.unknown_keys import explain_unknown

    problem, meant = explain_unknown(layer.where(path), tuple(str(part) for part in path), value)
    layers.problems.append(problem)
    layers.broken |= {problem.path, *meant}


def _refuse_secrets(layers: Layers, layer: _Layer, value: object, path: KeyPath) -> None:
    """Finds access tokens and passwords in what people wrote, wherever they stand."""
    if isinstance(value, str) and holds_secret(value):
        dotted = ".".join(printable(str(part)) for part in path)
        what = f"{show(value)} looks like an access token or a password"
        why = "secrets do not belong in run files, which are copied and shared"
        fix = "remove it, revoke it, and set HF_TOKEN in the environment"
        layers.problems.append(Problem(layer.where(path), dotted, what, why, fix))
        layers.broken.add(".".join(str(part) for part in path if isinstance(part, str)))
    elif isinstance(value, dict):
        for key, one in value.items():
            _refuse_secrets(layers, layer, one, (*path, key))
    elif isinstance(value, list):
        for index, one in enumerate(value):
            _refuse_secrets(layers, layer, one, (*path, index))
