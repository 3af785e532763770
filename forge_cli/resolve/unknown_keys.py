"""What somebody meant by a key that Forge does not have. Imported only when there is one."""

from __future__ import annotations

from forge_cli.errors import Problem
from forge_cli.paths import data_root
from forge_cli.resolve.nearness import find_nearest
from forge_cli.resolve.schema_tree import find_field, find_sections, is_optional, list_leaf_paths
from forge_cli.resolve.value_words import name_kind
from forge_cli.resolve.wording import printable, shorten, show
from forge_cli.resolve.yaml_reader import read_yaml

_ONLY_TEXT = {"model": "name", "data": "train"}


def explain_unknown(where: str, path: tuple[str, ...], value: object) -> tuple[Problem, tuple[str, ...]]:
    """Explains an unknown key.

    Args:
        where: Its place.
        path: Its path; all but the last part name a section.
        value: What it was set to.

    Returns:
        The problem, and the paths of the settings that were probably meant.
    """
    section, key = path[0] if len(path) > 1 else "", path[-1]
    dotted = ".".join(shorten(part) for part in path)
    # The bare name first: most foreign keys mean the same wherever they stand.
    what, meant, fix = _find_meaning(section, key, value)
    return Problem(where, dotted, what, fix=fix), meant


def _find_meaning(section: str, key: str, value: object) -> tuple[str, tuple[str, ...], str]:
    plain = key.lower().replace("-", "_")
    unknown = "unknown key"
    if "." in key and find_field(key):
        outer, _, inner = key.rpartition(".")
        return "a dotted path is not a key", (key,), f"write {outer}: {{{inner}: ...}}"
    foreign = load_foreign_keys()
    for name in (f"{section}.{plain}", plain):
        if name in foreign:
            target, note = foreign[name]
            said = f"Forge calls it {target}" if target else f"Forge has no {shorten(key)}"
            return unknown, (target,) if target else (), "; ".join(part for part in (said, note) if part)
    same_name = [one for one in list_leaf_paths() if one.rpartition(".")[2] == plain]
    if plain in find_sections()[section].model_fields:
        target = f"{section}.{plain}" if section else plain
        return unknown, (target,), f"did you mean {plain}?"
    if same_name:
        owner = same_name[0].rpartition(".")[0]
        said = f"belongs under {owner}: {same_name[0]}" if owner else f"belongs at the top level: {same_name[0]}"
        return unknown, tuple(same_name), said
    if plain in find_sections():
        return unknown, (), f"{plain} is a section at the top level"
    near = find_nearest(key, find_sections()[section].model_fields)
    if near:
        return unknown, (f"{section}.{near}" if section else near,), f"did you mean {near}?"
    leaves = {one.rpartition(".")[2]: one for one in reversed(list_leaf_paths())}
    near = find_nearest(key, leaves)
    if near:
        return unknown, (leaves[near],), f"did you mean {leaves[near]}?"
    owner = f"{section} has" if section else "the top level has"
    return unknown, (), f"{owner} {', '.join(find_sections()[section].model_fields)}"


def load_foreign_keys() -> dict[str, tuple[str | None, str]]:
    """Returns what keys of other tools are called here: name to (path or ``None``, note)."""
    data = read_yaml(data_root() / "configs" / "foreign_keys.yaml").data
    return {name: (one.get("to"), one.get("note", "")) for name, one in data.items()}


def explain_not_a_section(where: str, section: str, value: object) -> Problem:
    """Explains a scalar or list where settings belong, and ``null`` for a section that is always there."""
    if value is None:
        return Problem(where, section, "cannot be switched off", fix="remove the line, or put settings under it")
    what = f"settings are expected here, not {name_kind(value)} {show(value)}"
    if isinstance(value, str) and section in _ONLY_TEXT:
        fix = f"write {section}: {{{_ONLY_TEXT[section]}: {printable(value)}}}"
    elif is_optional(section):
        fix = f"write {section}: {{}} to switch it on with its defaults, {section}: null to switch it off"
    else:
        fix = f"put each setting on its own indented line below {section}:"
    return Problem(where, section, what, fix=fix)
