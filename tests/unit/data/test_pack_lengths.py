"""Which rows share a sequence: every row exactly once, never too many tokens, no more sequences than others need."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from forge_cli.data.packing import count_sequences, count_steps, pack_lengths

SHAPES = {
    "even": lambda draw, limit: draw.randint(1, limit),
    "short": lambda draw, limit: draw.randint(1, max(1, limit // 8)),
    "like chats": lambda draw, limit: min(limit, max(1, int(draw.lognormvariate(math.log(limit / 6), 0.8)))),
    "two sizes": lambda draw, limit: draw.choice([max(1, limit // 3 + 1), max(1, limit // 2)]),
    "full": lambda draw, limit: limit,
}


def pack_first_fit(lengths: list[int], limit: int) -> int:
    """Counts the sequences when every row, as it comes, goes into the first one with room."""
    rooms: list[int] = []
    for length in lengths:
        place = next((i for i, room in enumerate(rooms) if room >= length), None)
        if place is None:
            rooms.append(limit - length)
        else:
            rooms[place] -= length
    return len(rooms)


def test_an_example_by_hand():
    # Longest first: 6 | 5, 5 opens no third as 5 + 5 = 10 | then 4 to the 6, 3 opens one, 2 to the 3 (10 - 3 = 7), 1.
    assert pack_lengths([4, 5, 6, 3, 5, 2, 1], 10) == [[2, 0], [1, 4], [3, 5, 6]]


def test_the_fullest_sequence_that_has_room_is_taken():
    # 7 and 6 open sequences with 3 and 4 left; the 3 goes where it fits best, the 4 where it still fits.
    assert pack_lengths([7, 6, 3, 4], 10) == [[0, 2], [1, 3]]
    assert pack_lengths([6, 7, 3, 4], 10) == [[1, 2], [0, 3]]


@pytest.mark.parametrize("limit", [1, 7, 64, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_any_length(shape, limit):
    for seed in range(10):
        draw = random.Random(f"{shape} {limit} {seed}")
        lengths = [SHAPES[shape](draw, limit) for _ in range(draw.choice([1, 50, 400]))]
        sequences = pack_lengths(lengths, limit)
        assert sorted(row for rows in sequences for row in rows) == list(range(len(lengths)))
        assert all(rows and sum(lengths[row] for row in rows) <= limit for rows in sequences)
        assert math.ceil(sum(lengths) / limit) <= len(sequences) <= pack_first_fit(lengths, limit)
        assert len(sequences) <= pack_first_fit(sorted(lengths, reverse=True), limit)
        counts = Counter(lengths)
        assert count_sequences([counts[length] for length in range(limit + 1)], limit) == len(sequences)


def test_no_rows_make_no_sequences():
    assert pack_lengths([], 10) == [] and count_sequences([0] * 11, 10) == 0


@pytest.mark.parametrize(
    ("sequences", "batch", "accumulation", "steps"),
    [
        (1, 8, 4, 1),
        (8, 8, 1, 1),
        (9, 8, 1, 2),
        (16, 2, 4, 2),
        (17, 2, 4, 3),
        (11, 8, 1, 2),
        (11, 1, 8, 2),
        (11, 2, 4, 2),
    ],
)
def test_steps_of_an_epoch(sequences, batch, accumulation, steps):
    """The last batch and the last window may be smaller; they are a step all the same."""
    batches = [min(batch, sequences - start) for start in range(0, sequences, batch)]
    windows = [batches[start : start + accumulation] for start in range(0, len(batches), accumulation)]
    assert count_steps(sequences, batch, accumulation) == len(windows) == steps
