"""Which rows are trained, how often, and which are held back for evaluation."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator

from forge_cli.data.scan import Scan
from forge_cli.errors import DataError
from forge_cli.schema.data import DataSection
from forge_cli.units import count_of

HELD_BACK = 0xFFFF


def choose_rows(scan: Scan, data: DataSection, seed: int) -> array:
    """Draws rows by caps and weights, and holds some back.

    Args:
        scan: The first pass over the rows of a split.
        data: The section.
        seed: Of the run; the same seed draws the same rows.

    Returns:
        For every good row, in order, how often it is seen in an epoch; ``HELD_BACK`` where it is evaluated.

    Raises:
        DataError: A source has fewer rows than its cap or is left with none, or nothing is left to train on.
    """
    copies = array("H", [1]) * sum(scan.counts)
    for index, (source, count) in enumerate(zip(scan.sources, scan.counts, strict=True)):
        start = sum(scan.counts[:index])
        if source.rows is not None and source.rows > count:
            raise DataError(
                f"rows: {source.rows} are wanted, and there are {count}",
                where=source.path,
                fix=f"write rows: {count} or less, or weight: 2 to see rows twice",
            )
        if source.rows is None and source.weight == 1:
            continue
        wanted = count if source.rows is None else source.rows
        whole, share = divmod(source.weight, 1)
        more = round(share * wanted)
        if not int(whole) and not more:
            raise DataError(
                f"weight: {source.weight:g} of {count_of(wanted, 'row', 'rows')} draws none",
                where=source.path,
                fix="raise the weight, or remove the source",
            )
        # Text seeds are hashed the same way in every process.
        draw = random.Random(f"{seed}:{index}:{source.path}")
        chosen, extra = _draw(count, wanted, draw), _draw(wanted, more, draw)
        for row in range(start, start + count):
            copies[row] = int(whole) + next(extra) if next(chosen) else 0
    return _hold_back(copies, scan, data, seed)


def _hold_back(copies: array, scan: Scan, data: DataSection, seed: int) -> array:
    """Holds a share or a number of the chosen rows back, by a seeded draw."""
    if scan.name != "train" or (data.eval_fraction is None and data.eval_rows is None):
        return copies
    total = len(copies) - copies.count(0)
    wanted = data.eval_rows if data.eval_rows is not None else max(1, round(total * data.eval_fraction))
    if wanted >= total:
        name, value = ("eval_rows", data.eval_rows) if data.eval_rows else ("eval_fraction", data.eval_fraction)
        raise DataError(
            f"data.{name} {value:g} of {count_of(total, 'row', 'rows')} leaves nothing to train on",
            where=", ".join(source.path for source in scan.sources),
        )
    held_back = _draw(total, wanted, random.Random(seed))
    for row, count in enumerate(copies):
        if count and next(held_back):
            copies[row] = HELD_BACK
    return copies


def _draw(count: int, wanted: int, draw: random.Random) -> Iterator[bool]:
    """Tells of each of ``count`` rows whether it is among ``wanted`` drawn ones; every choice is equally likely.

    Source:
        Knuth, The Art of Computer Programming, volume 2, 3.4.2, algorithm S: it needs no list of the rows.
    """
    for left in range(count, 0, -1):
        is_drawn = draw.random() * left < wanted
        wanted -= is_drawn
        yield is_drawn
