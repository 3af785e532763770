"""Measurements of steps on their way from the device to a line of JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch


def pick_rewards(metrics: Mapping[str, object]) -> dict[str, object]:
    """Picks the rewards and log probabilities of better and worse answers, with ``eval_`` before their names or not."""
    return {name: value for name, value in metrics.items() if "rewards/" in name or "logps/" in name}


def read_steps(
    steps: Sequence[Mapping[str, torch.Tensor | None]], index: torch.Tensor | None, num_groups: int
) -> tuple[list[tuple[float, float | None]], list[list[float]]]:
    """Moves the measurements of some steps to the host in one transfer.

    Args:
        steps: Each with ``total []``, ``norms [P]`` and ``loss []`` or ``None``.
        index: ``[P]`` group of each parameter; ``None`` leaves the groups out.
        num_groups: Number of groups.

    Returns:
        Gradient norm and loss of every step, and the norm of every group at every step.
    """
    device = steps[0]["total"].device
    blank = torch.full((), math.nan, device=device)
    columns = [
        torch.stack([one["total"], blank if one["loss"] is None else one["loss"].to(device, torch.float32)])
        for one in steps
    ]
    if index is not None:
        squares = torch.stack([one["norms"] for one in steps]) ** 2
        sums = torch.zeros(len(steps), num_groups, device=device).index_add_(1, index.to(device), squares)
        columns.append(sums.sqrt().flatten())
    flat = torch.cat(columns).tolist()
    width = 2 * len(steps)
    pairs = [
        (flat[2 * place], flat[2 * place + 1] if one["loss"] is not None else None) for place, one in enumerate(steps)
    ]
    return pairs, [flat[start : start + num_groups] for start in range(width, len(flat), num_groups)]


def encode_record(record: Mapping[str, object]) -> str:
    """Writes a record as a line. JSON has no NaN; a lost value is written as text rather than as an invalid file."""
    return json.dumps({key: _as_json(value) for key, value in record.items()}) + "\n"


def _as_json(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _as_json(one) for key, one in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class RecordFile:
    """A file of JSON lines that a run appends to. A disk that takes none must not end a training.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_told = False

    def append(self, record: Mapping[str, object]) -> str:
        """Appends a record; returns what a user should know the first time that one is lost."""
        try:
            with self.path.open("ab+") as file:
                # Half a line, left by a full disk, must not spoil this one.
                if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                    file.write(b"\n")
                file.write(encode_record(record).encode())
        except OSError as error:
            is_told, self._is_told = self._is_told, True
            lost = (
                f"{self.path.name} cannot be written ({error.strerror}); training goes on, and these records are lost"
            )
            return "" if is_told else lost
        return ""


def number_rows(rows: Sequence[int]) -> list[str]:
    """Names rows by their number, where nothing better is known."""
    return [f"row {row}" for row in rows]
