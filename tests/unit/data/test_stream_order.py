"""A stream is mixed within a buffer: every row once, by the seed, within bounds of rows and of memory."""

from __future__ import annotations

import math
import random
import statistics
import tracemalloc
from collections import Counter

from forge_cli.data.stream_order import mix_rows
from forge_cli.units import MIB


def mix(count: int, seed: object, **bounds) -> list[int]:
    return [row["n"] for row in mix_rows(({"n": i} for i in range(count)), random.Random(seed), **bounds)]


def test_every_row_comes_once_and_in_an_order_of_the_seed():
    first, again, other = mix(500, "0:0"), mix(500, "0:0"), mix(500, "0:1")
    assert first == again != other
    assert sorted(first) == sorted(other) == list(range(500))
    assert list(mix_rows([], random.Random(0))) == []


def test_what_fits_into_the_buffer_is_mixed_evenly():
    orders = Counter(tuple(mix(3, seed)) for seed in range(6000))
    assert len(orders) == 6
    # 1000 each are expected; 5 standard deviations of a binomial are 144.
    assert all(abs(count - 1000) < 144 for count in orders.values())


def test_a_longer_stream_is_mixed_within_the_buffer():
    order = mix(60_000, 3, most_rows=1000)
    assert max(number - place for place, number in enumerate(order)) <= 1000, "no further ahead than the buffer"
    # The wait of a row is exponential with the buffer's size as its mean; |wait - mean| is 2 / e of that on average.
    moves = [abs(number - place) for place, number in enumerate(order) if 10_000 < number < 50_000]
    assert abs(statistics.fmean(moves) / (1000 * 2 / math.e) - 1) < 0.03


def test_long_rows_are_held_by_their_bytes():
    """Texts, lists of texts and lists of numbers; 100 rows of 1 MiB are never held at once."""

    def give():
        for i in range(100):
            value = ["x" * MIB, [{"content": "x" * MIB}], list(range(10**6, 10**6 + MIB // 36))][i % 3]
            yield {"n": i, "value": value}

    tracemalloc.start()
    seen = [row["n"] for row in mix_rows(give(), random.Random(0), most_bytes=16 * MIB)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 24 * MIB
    assert sorted(seen) == list(range(100)) and seen != sorted(seen)


def test_a_tuple_of_a_reader_counts_as_what_it_holds():
    rows = ((0, number, {"text": "x" * MIB}) for number in range(20))
    held = mix_rows(rows, random.Random(0), most_bytes=4 * MIB)
    _, number, _ = next(held)
    assert number <= 4
