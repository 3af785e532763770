"""Equal rows are found in parts that fit into memory, as a dictionary of all rows finds them."""

from __future__ import annotations

import random
from array import array

import pytest

from forge_cli.data import repeats
from forge_cli.data.repeats import RowDigests, find_in_both, find_repeats


def fill(values: list[int], tmp_path, first: int = 1) -> RowDigests:
    """Rows of one token, numbered from ``first``."""
    rows = RowDigests(tmp_path)
    for number, value in enumerate(values, first):
        rows.add(number, ({"input_ids": array("i", [value]), "labels": array("i", [number])},))
    return rows


@pytest.mark.parametrize("part_rows", [7, 64, 10_000])
@pytest.mark.parametrize("texts", [1, 5, 300, 10**9])
def test_repeats_are_those_of_a_dictionary(tmp_path, monkeypatch, part_rows, texts):
    monkeypatch.setattr(repeats, "PART_ROWS", part_rows)
    monkeypatch.setattr(repeats, "_BLOCK_BYTES", 16 * 13)
    draw = random.Random(texts)
    values = [draw.randrange(min(texts, 2**31)) for _ in range(700)]
    earlier: dict[int, list[int]] = {}
    for number, value in enumerate(values, 1):
        earlier.setdefault(value, []).append(number)
    pairs = sorted((found[1], found[0]) for found in earlier.values() if len(found) > 1)
    assert find_repeats(fill(values, tmp_path), 3) == (len(values) - len(earlier), pairs[:3])

    held = [draw.randrange(min(2 * texts, 2**31)) for _ in range(200)]
    both = [(number, earlier[value][0]) for number, value in enumerate(held, 1) if value in earlier]
    assert find_in_both(fill(held, tmp_path), fill(values, tmp_path), 3) == (len(both), both[:3])


def test_a_row_is_what_is_trained_of_it(tmp_path):
    """Columns of ids count, with the border between them; labels and numbers do not."""
    rows = RowDigests(tmp_path)
    whole = {"prompt_ids": array("i", [1, 2]), "chosen_ids": array("i", [3]), "row": 1}
    rows.add(1, (whole,))
    rows.add(2, ({"prompt_ids": array("i", [1]), "chosen_ids": array("i", [2, 3])},))
    rows.add(3, ({**whole, "label": True, "row": 3},))
    rows.add(4, ())
    assert find_repeats(rows, 3) == (1, [(3, 1)])


def test_no_rows_and_no_trace(tmp_path):
    rows = RowDigests(tmp_path)
    assert find_repeats(rows, 3) == (0, []) and find_in_both(rows, fill([1], tmp_path), 3) == (0, [])
    fill([1, 2], tmp_path).close()
    assert not list(tmp_path.iterdir())
