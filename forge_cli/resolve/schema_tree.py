"""The schema as a tree of names, read from the pydantic classes without building a validator."""

from __future__ import annotations

from functools import cache
from types import MappingProxyType, UnionType
from typing import TYPE_CHECKING, Annotated, Literal, Union, get_args, get_origin

from forge_cli.schema.runspec import RunSpec
from forge_cli.schema.section import Section

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydantic.fields import FieldInfo


@cache
def find_sections() -> Mapping[str, type[Section]]:
    """Returns the sections of a run file by name; ``""`` is the run file itself."""
    sections: dict[str, type[Section]] = {"": RunSpec}
    for name, one in RunSpec.model_fields.items():
        for member in (one.annotation, *get_args(one.annotation)):
            if isinstance(member, type) and issubclass(member, Section):
                sections[name] = member
    return MappingProxyType(sections)


def is_optional(section: str) -> bool:
    """Tells whether ``null`` switches a section off."""
    return type(None) in get_args(RunSpec.model_fields[section].annotation)


def is_on_by_default(section: str) -> bool:
    """Tells whether a section is there when nobody names it."""
    one = RunSpec.model_fields[section]
    return one.is_required() or one.default_factory is not None


def find_field(path: str) -> FieldInfo | None:
    """Returns the field of a dotted path (``training.learning_rate``, ``lora``); ``None`` if there is none."""
    section, _, name = path.rpartition(".")
    owner = find_sections().get(section)
    return owner.model_fields.get(name) if owner else None


def iterate_leaves(section: str) -> Iterator[tuple[str, FieldInfo]]:
    """Yields dotted path and field of every setting of a section that is not a section itself."""
    sections = find_sections()
    for name, one in sections[section].model_fields.items():
        if section or name not in sections:
            yield (f"{section}.{name}" if section else name), one


@cache
def list_leaf_paths() -> tuple[str, ...]:
    """Returns the dotted path of every setting, sections left out."""
    return tuple(path for section in find_sections() for path, _ in iterate_leaves(section))


def list_members(annotation: object) -> list[object]:
    """Takes a union apart: its member types, literals and ``None``, without ``Annotated``."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return [member for one in get_args(annotation) for member in list_members(one)]
    if origin is Annotated:
        return list_members(get_args(annotation)[0])
    return [annotation]


def list_choices(annotation: object) -> list[object]:
    """Returns the literal values an annotation allows, those of a list's items included."""
    choices: list[object] = []
    for member in list_members(annotation):
        if get_origin(member) is Literal:
            choices.extend(get_args(member))
        elif get_origin(member) is list:
            choices.extend(list_choices(get_args(member)[0]))
    return choices
