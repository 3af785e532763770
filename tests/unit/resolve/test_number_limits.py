"""No number of a run file is without bounds, and the error names them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import pytest

from forge_cli.errors import ConfigError
from forge_cli.resolve.plan import resolve_plan
from forge_cli.resolve.schema_tree import find_sections
from forge_cli.schema.data import Source


def list_numbers(annotation: object, metadata: tuple) -> Iterator[tuple[type, list[object]]]:
    """Yields the number types inside an annotation, each with all that is said about it."""
    said = getattr(annotation, "__metadata__", ())
    own = [*metadata, *(item for one in said for item in getattr(one, "metadata", ()))]
    if annotation in (int, float):
        yield annotation, own
    for inner in get_args(annotation):
        yield from list_numbers(inner, tuple(own))


NUMBERS = {
    f"{section}.{name}".lstrip("."): own
    for section, owner in [*find_sections().items(), ("data.train", Source)]
    for name, one in owner.model_fields.items()
    for _, own in list_numbers(one.annotation, tuple(one.metadata))
}


def test_every_number_has_a_lowest_and_a_largest_value():
    assert len(NUMBERS) > 35
    for path, own in NUMBERS.items():
        for words in (("gt", "ge"), ("lt", "le")):
            limits = [getattr(one, word) for one in own for word in words if getattr(one, word, None) is not None]
            assert limits and all(abs(limit) <= 1e12 for limit in limits), path


@pytest.mark.parametrize("value", ["9" * 39, "1e300", "-" + "9" * 30])
@pytest.mark.parametrize("path", sorted(NUMBERS))
def test_the_error_names_the_range(path, value, tmp_path):
    section, _, name = path.rpartition(".")
    shown = f"[1, {value}]" if path == "preference.loss_weights" else value
    data = f"train: [{{path: rows.jsonl, {name}: {shown}}}]" if section == "data.train" else "train: rows.jsonl"
    text = "model: {name: forge-tiny}\n"
    if section == "data":
        data += f", {name}: {shown}"
    elif section != "data.train":
        text += f"{section}: {{{name}: {shown}}}\n" if section else f"{name}: {shown}\n"
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "run.yaml").write_text(f"{text}data: {{{data}}}\n")
    with pytest.raises(ConfigError) as caught:
        resolve_plan(tmp_path / "run.yaml", [])
    said = [str(one) for one in caught.value.problems if name in one.path]
    assert said, caught.value
    if path != "version" and not (value == "1e300" and "whole number" in said[0]):
        assert "must be a number that is " in said[0] and " and " in said[0], said
