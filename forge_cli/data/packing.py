"""Which rows share a sequence, and how many steps that makes."""

from __future__ import annotations

import math
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
    with_room: list[list[int]] = [[] for _ in range(max_length + 1)]
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


def count_steps(num_sequences: int, batch_size: int, accumulation_steps: int) -> int:
    """Counts the optimizer steps of one epoch, as the Trainer does.

    Units:
        Optimizer steps.
    """
    return max(1, math.ceil(math.ceil(num_sequences / batch_size) / accumulation_steps))
