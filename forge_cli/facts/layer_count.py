"""How many layers ``freeze.first`` means."""

from __future__ import annotations


def read_share(first: int | str) -> float | None:
    """Reads a share such as ``"50%"`` as a ratio; ``None`` when it is a count or is not a share."""
    if not isinstance(first, str) or not first.endswith("%"):
        return None
    try:
        ratio = float(first[:-1].strip()) / 100
    except ValueError:
        return None
    return ratio if 0 < ratio < 1 else None


def count_frozen_layers(first: int | str | None, num_hidden_layers: int) -> int:
    """Counts the decoder layers that ``freeze.first`` freezes; a share is rounded down.

    Args:
        first: A count (``16``) or a share (``"50%"``); ``None`` freezes none.
        num_hidden_layers: Decoder layers of the model.

    Returns:
        The count, between 0 and ``num_hidden_layers``.
    """
    if first is None:
        return 0
    share = read_share(first)
    # The small addend undoes what 0.29 * 100 loses to binary fractions.
    count = int(share * num_hidden_layers + 1e-9) if share is not None else int(first)
    return min(count, num_hidden_layers)
