"""The order of a stream. It is not known how far it goes, so rows are drawn from a buffer of those that come next."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from forge_cli.units import MIB

BUFFER_ROWS = 10_000
BUFFER_BYTES = 256 * MIB
_NUMBER_BYTES = 36  # an int and the reference to it

Row = TypeVar("Row")


def mix_rows(
    rows: Iterable[Row], draw: random.Random, *, most_rows: int = BUFFER_ROWS, most_bytes: int = BUFFER_BYTES
) -> Iterator[Row]:
    """Mixes rows: one drawn from those that are held makes place for the next. Every row comes once.

    Args:
        rows: Plain data.
        draw: Decides the order.
        most_rows: Rows held, at most.
        most_bytes: Memory they take, at most, unless one row takes more.
    """
    held: list[tuple[int, Row]] = []
    held_bytes = 0
    for row in rows:
        held.append((_count_bytes(row), row))
        held_bytes += held[-1][0]
        while held and (len(held) > most_rows or held_bytes > most_bytes):
            place = draw.randrange(len(held))
            held[place], held[-1] = held[-1], held[place]
            size_bytes, drawn = held.pop()
            held_bytes -= size_bytes
            yield drawn
    draw.shuffle(held)
    yield from (row for _, row in held)


def _count_bytes(value: object) -> int:
    """Counts the memory of plain data; of token ids by their number alone, as there are many."""
    size_bytes = sys.getsizeof(value)
    if isinstance(value, dict):
        return size_bytes + sum(map(_count_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        if len(value) > 8 and isinstance(value[0], int):
            return _NUMBER_BYTES * len(value)
        return size_bytes + sum(map(_count_bytes, value))
    return size_bytes
