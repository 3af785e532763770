"""Pydantic's errors in plain words, one problem per setting. Imported only when there are some."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from forge_cli.errors import Problem
from forge_cli.resolve.nearness import find_nearest
from forge_cli.resolve.schema_tree import find_field, find_sections, list_choices, list_members
from forge_cli.resolve.value_words import describe_range, describe_type, name_kind
from forge_cli.resolve.wording import show, show_float

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from forge_cli.resolve.layers import Layers

_RANGE_FAULTS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}
_EXAMPLES = {
    "model.name": "model: {name: forge-tiny}",
    "data.train": "data: {train: data/train.jsonl}",
    "lora.target_modules": "target_modules: [q_proj, v_proj]",
    "name": "name: my-run_1",
    "data.eval_fraction": "eval_fraction: 0.05",
    "training.max_steps": "max_steps: 1000",
}


def explain_values(error: ValidationError, layers: Layers) -> tuple[list[Problem], set[str]]:
    """Turns a validation error into located problems.

    Args:
        error: What pydantic found.
        layers: The merged layers, which know where each value came from.

    Returns:
        The problems, one per setting, and the paths of the settings that cannot be used.
    """
    problems: dict[str, Problem] = {}
    bad: set[str] = set()
    for one in error.errors(include_url=False, include_context=True):
        path, inside = _find_path(one["loc"])
        bad.add(path)
        key = path + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in inside)
        if key in problems or _is_broken(path, layers.broken) or _could_come_from_below(one["type"], layers.broken):
            continue
        problems[key] = _explain(one["type"], path, inside, one["input"], layers)
    return list(problems.values()), bad


def _is_broken(path: str, broken: set[str]) -> bool:
    section = path.rpartition(".")[0]
    return path in broken or (section != "" and section in broken)


def _could_come_from_below(fault: str, broken: set[str]) -> bool:
    """Tells whether a missing setting may be in a recipe that could not be read."""
    return fault == "missing" and "extends" in broken


def _find_path(loc: tuple[str | int, ...]) -> tuple[str, tuple[str | int, ...]]:
    """Cuts pydantic's union tags off a location: the dotted path of the setting, and the place inside its value."""
    length = 2 if len(loc) > 1 and loc[0] in find_sections() else 1
    rest = loc[length:]
    index = [part for part in rest if isinstance(part, int)][:1]
    # Behind the tag "source" comes the key of a source.
    key = [part for part in rest[rest.index("source") + 1 :][:1] if part != "[key]"] if "source" in rest else []
    return ".".join(str(part) for part in loc[:length]), (*index, *key)


def _explain(fault: str, path: str, inside: tuple[str | int, ...], value: object, layers: Layers) -> Problem:
    one = find_field(path)
    if inside and isinstance(inside[-1], str):
        return _explain_source(fault, path, inside, value, layers)
    index = inside[0] if inside else None
    if fault == "missing" or one is None:
        section = path.rpartition(".")[0]
        origin = layers.history[section][-1] if section else None
        where = origin.where if origin and origin.kind != "default" else layers.source
        return Problem(where, path, "is missing", fix=f"write {_EXAMPLES.get(path, path.rpartition('.')[2])}")
    where = layers.history[path][-1].where if index is None else layers.inside[path]((index,))
    shown = path if index is None else f"{path}[{index}]"
    if path == "version" and fault in _RANGE_FAULTS:
        return Problem(
            where, path, f"version {show(value)} of the run file's language; this Forge knows 1", fix="update Forge"
        )
    if fault in _RANGE_FAULTS:
        what = f"must be a number that is {describe_range(one) or 'finite'}; this is {show(value)}"
        return Problem(where, shown, what, fix=_example(path, one))
    if fault == "string_too_short":
        return Problem(where, shown, "is empty text", fix=_example(path, one))
    if fault == "string_pattern_mismatch":
        what = f"{show(value)} is not a folder name: letters, digits, . _ - (at most 100, not . first)"
        return Problem(where, shown, what, fix=_example(path, one))
    what = f"expected {describe_type(one.annotation)}; this is {name_kind(value)} {show(value)}"
    return Problem(where, shown, what, fix=_find_fix(path, one, value))


def _explain_source(fault: str, path: str, inside: tuple[str | int, ...], value: object, layers: Layers) -> Problem:
    """Explains a key of a source inside ``data.train`` or ``data.eval``."""
    from forge_cli.schema.data import Source

    key, place = str(inside[-1]), inside if fault != "missing" else inside[:-1]
    where = layers.inside[path](place)
    shown = path + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in inside)
    one = Source.model_fields.get(key)
    if one is None:
        near = find_nearest(key, Source.model_fields)
        fix = f"did you mean {near}?" if near else f"a source has {', '.join(Source.model_fields)}"
        return Problem(where, shown, "unknown key", fix=fix)
    if fault == "missing":
        return Problem(where, shown, "is missing", fix="write {path: data/train.jsonl}")
    if fault in _RANGE_FAULTS:
        what = f"must be a number that is {describe_range(one)}; this is {show(value)}"
        return Problem(where, shown, what, fix=f"write for example {key}: 1")
    what = f"expected {describe_type(one.annotation)}; this is {name_kind(value)} {show(value)}"
    return Problem(where, shown, what, fix=_find_fix(key, one, value))


def _find_fix(path: str, one: FieldInfo, value: object) -> str:
    """Says what to write instead of a value of the wrong kind."""
    key = path.rpartition(".")[2]
    members = list_members(one.annotation)
    if isinstance(value, str):
        lowered = value.strip().lower()
        if lowered in ("none", "null", "nil", "") and type(None) in members:
            return f"write {key}: null"
        if lowered in ("true", "false") and bool in members:
            return f"write {key}: {lowered}, without quotes"
        number = _read_number(value)
        if number is not None and (int in members or (float in members)):
            return f"write {key}: {show_float(number)}" + (", without quotes" if _is_plain(value) else "")
        near = find_nearest(value, [str(choice) for choice in list_choices(one.annotation)])
        if near is not None and near != value:
            return f"did you mean {near}?"
        if any(str(member).startswith("list[") for member in members):
            return f"write {key}: [{show(value)[1:-1]}]"
    elif isinstance(value, float) and value.is_integer() and int in members:
        return f"write {key}: {int(value)}"
    elif isinstance(value, (int, float)) and not isinstance(value, bool) and members == [str]:
        return f'write {key}: "{show(value)}", in quotes'
    if path == "freeze.first":
        return 'write first: 16 or first: "50%"'
    return _example(path, one)


def _read_number(text: str) -> float | None:
    """Reads what was probably meant as a number: ``"3"``, ``1_000``, ``1,000``."""
    try:
        number = float(text.strip().replace(",", "").replace("_", ""))
    except ValueError:
        return None
    return number if abs(number) < 1e15 else None


def _is_plain(text: str) -> bool:
    return "_" not in text and "," not in text


def _example(path: str, one: FieldInfo) -> str:
    if path in _EXAMPLES:
        return f"write for example {_EXAMPLES[path]}"
    default = one.get_default(call_default_factory=True)
    return f"write for example {path.rpartition('.')[2]}: {_show_example(default)}"


def _show_example(value: object) -> str:
    return value if isinstance(value, str) else show(value)
