"""A micro batch in parts: its examples are kept, cut and collated again; what TRL noted of the parts becomes one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass
class Split:
    """Into how many parts a micro batch is cut; kept for the rest of a run, resumed or not."""

    num_parts: int = 1

    def state_dict(self) -> dict[str, object]:
        """Returns the number."""
        return {"num_parts": self.num_parts}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Takes up a number, unless memory has asked for a higher one since."""
        self.num_parts = max(self.num_parts, int(state["num_parts"]))


@dataclass(frozen=True)
class KeptExamples:
    """The examples of a batch; an object of its own, so that nothing looks for tensors in every token."""

    examples: Sequence[dict]


class KeepingCollator:
    """Leaves the examples with their batch as ``examples``, so that it can be collated again in parts.

    Args:
        collate: Makes a batch with ``rows`` and ``real_tokens``.
    """

    def __init__(self, collate: Callable[[Sequence[dict]], dict]) -> None:
        self.collate = collate

    def __call__(self, examples: Sequence[dict]) -> dict[str, object]:
        """Collates."""
        return {**self.collate(examples), "examples": KeptExamples(examples)}


def list_pieces(examples: Sequence[dict]) -> list[dict]:
    """Takes packed sequences apart into their rows, which do not see each other; other examples stay as they are."""
    pieces: list[dict] = []
    for one in examples:
        start = 0
        for length in one.get("seq_lengths") or ():
            columns = {name: one[name][start : start + length] for name in ("input_ids", "labels")}
            pieces.append({**columns, "seq_lengths": [length]})
            start += length
        if not start:
            pieces.append(one)
    return pieces


def cut(examples: Sequence[dict], num_parts: int) -> list[Sequence[dict]]:
    """Cuts examples into parts as equal as can be; packed ones into their rows where there are fewer examples."""
    if num_parts > len(examples):
        examples = list_pieces(examples)
    size = math.ceil(len(examples) / num_parts)
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def join_figures(figures: Mapping[str, list[float]], before: Mapping[str, int], shares: Sequence[float]) -> None:
    """Turns the figures of a micro batch's parts into one, as if it had been whole.

    Args:
        figures: Name to values, one for every part at the end.
        before: Name to how many values there were before the parts.
        shares: Each part's share of the rows (0 to 1).
    """
    for name, values in figures.items():
        new = values[before.get(name, 0) :]
        if len(new) > 1:
            weights = shares if len(new) == len(shares) else [1.0] * len(new)
            mean = sum(v * w for v, w in zip(new, weights, strict=True)) / sum(weights)
            values[before.get(name, 0) :] = [mean]
