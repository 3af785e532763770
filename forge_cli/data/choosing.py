"""Which rows are trained, how often, and which are held back for evaluation."""

from __future__ import annotations

import random
from array import array

from forge_cli.data.scan import Scan
from forge_cli.errors import DataError
from forge_cli.schema.data import DataSection

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
        # Text seeds are hashed the same way in every process.
        draw = random.Random(f"{seed}:{index}:{source.path}")
        chosen = set(draw.sample(range(count), source.rows)) if source.rows is not None else range(count)
        whole, share = divmod(source.weight, 1)
        extra = set(draw.sample(sorted(chosen), round(share * len(chosen)))) if share else ()
        if not int(whole) and not extra:
            raise DataError(
                f"weight: {source.weight:g} of {len(chosen)} rows draws none",
                where=source.path,
                fix="raise the weight, or remove the source",
            )
        for row in range(count):
            copies[start + row] = (int(whole) + (row in extra)) if row in chosen else 0
    return _hold_back(copies, scan, data, seed)


def _hold_back(copies: array, scan: Scan, data: DataSection, seed: int) -> array:
    """Holds a share or a number of the chosen rows back, by a seeded draw."""
    if scan.name != "train" or (data.eval_fraction is None and data.eval_rows is None):
        return copies
    chosen = [row for row, count in enumerate(copies) if count]
    wanted = data.eval_rows if data.eval_rows is not None else max(1, round(len(chosen) * data.eval_fraction))
    if wanted >= len(chosen):
        name, value = ("eval_rows", data.eval_rows) if data.eval_rows else ("eval_fraction", data.eval_fraction)
        raise DataError(
            f"data.{name} {value:g} of {len(chosen)} rows leaves nothing to train on",
            where=", ".join(source.path for source in scan.sources),
        )
    for place in random.Random(seed).sample(range(len(chosen)), wanted):
        copies[chosen[place]] = HELD_BACK
    return copies
