"""Types and ranges in plain words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args, get_origin

from forge_cli.resolve.schema_tree import list_members
from forge_cli.resolve.wording import show
from forge_cli.schema.data import Source

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_TYPES = {
    Source: "a source {path: ...}",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    type(None): "null",
}


def name_kind(value: object) -> str:
    """Names the kind of a value: ``the text``, ``the number``, ..."""
    for kind, name in ((bool, "the value"), ((int, float), "the number"), (str, "the text"), (list, "the list")):
        if isinstance(value, kind):
            return name
    return "the settings" if isinstance(value, dict) else "the value"


def describe_type(annotation: object) -> str:
    """Says what an annotation allows: ``a whole number or epoch``, ``one of nf4, fp4``, ``a list of texts``."""
    parts: list[str] = []
    for member in list_members(annotation):
        if get_origin(member) is Literal:
            choices = [str(one) for one in get_args(member)]
            parts.append(choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}")
        elif get_origin(member) is list:
            inner = get_args(member)[0]
            choices = describe_type(inner)
            parts.append(
                f"a list with items from {choices[7:]}"
                if choices.startswith("one of ")
                else "a list of texts"
                if inner is str
                else f"a list, each {choices}"
            )
        elif get_origin(member) is dict:
            parts.append("names with their values")
        else:
            parts.append(_TYPES.get(member, getattr(member, "__name__", str(member))))
    return " or ".join(parts)


def _list_metadata(annotation: object) -> list[object]:
    """Lists what is said about the members of a union and the items of a list."""
    own = getattr(annotation, "__metadata__", ())
    return [one for said in own for one in getattr(said, "metadata", ())] + [
        one for inner in get_args(annotation) for one in _list_metadata(inner)
    ]


def describe_range(one: FieldInfo) -> str:
    """Says which numbers a field allows: ``more than 0, at most 1``; empty when all."""
    words = {"gt": "more than", "ge": "at least", "lt": "less than", "le": "at most"}
    metadata = [*one.metadata, *_list_metadata(one.annotation)]
    limits = [(word, getattr(item, name, None)) for name, word in words.items() for item in metadata]
    return " and ".join(f"{word} {show(limit)}" for word, limit in limits if limit is not None)
