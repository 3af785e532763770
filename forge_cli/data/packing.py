"""Which rows share a sequence, and how many steps that makes."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence


def pack_lengths(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Packs rows best-fit decreasing: each, the longest first, into the fullest sequence that has room for it.

    Args:
        lengths: Tokens of each row, none above ``max_length``.
        max_length: Tokens that fit into a sequence.

    Returns:
        The numbers of the rows in each sequence. Every row is in exactly one; no row is cut.
    """
    sequences: list[list[int]] = []
    with_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms = 0  # bit r is set where a sequence has room for exactly r tokens more
    for row in sorted(range(len(lengths)), key=lambda one: (-lengths[one], one)):
        length = lengths[row]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, number = max_length, len(sequences)
            sequences.append([])
        sequences[number].append(row)
        left = room - length
        if left:
            with_room[left].append(number)
            rooms |= 1 << left
    return sequences


def count_sequences(counts: Sequence[int], max_length: int) -> int:
    """Counts the sequences that :func:`pack_lengths` makes, without a list of rows.

    Args:
        counts: Number of rows of each length, from length 0.
        max_length: Tokens that fit into a sequence.
    """
    with_room: Counter[int] = Counter()
    rooms, total = 0, 0
    for length in range(min(len(counts) - 1, max_length), 0, -1):
        left = counts[length]
        while left:
            fitting = rooms >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else max_length
            # A sequence takes rows of this length until none fits: it is the fullest one after each of them.
            each = room // length
            full = left // each if not fitting else min(with_room[room], left // each)
            number, rows = (full, each) if full else (1, left)
            if fitting:
                with_room[room] -= number
                rooms ^= (1 << room) if not with_room[room] else 0
            else:
                total += number
            left -= number * rows
            if rest := room - rows * length:
                with_room[rest] += number
                rooms |= 1 << rest
    return total


def count_steps(num_sequences: int, batch_size: int, accumulation_steps: int) -> int:
    """Counts the optimizer steps of one epoch, as the Trainer does.

    Units:
        Optimizer steps.
    """
    return max(1, math.ceil(math.ceil(num_sequences / batch_size) / accumulation_steps))
