"""Keeps the reference's log probabilities on disk, for the next run on the same weights and rows."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from forge_cli.paths import cache_root

_VERSION = "1"
_TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids", "label")
_ROWS_AT_ONCE = 1000


def cache_folder() -> Path:
    """Returns where the log probabilities are kept: below ``$FORGE_CACHE``, or ``~/.cache/forge``."""
    return cache_root() / "reference"


def fingerprint_weights(model: torch.nn.Module, *, without: str = "") -> str:
    """Hashes all weights of a model.

    Args:
        model: The model; of a quantised one the packed weights and their scales count.
        without: Part of the names that do not count, such as those of an adapter that is trained.
    """
    digest = hashlib.blake2b()
    for name, tensor in sorted(model.state_dict().items()):
        if without and without in name:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint_rows(dataset: Dataset, *parts: str) -> str:
    """Hashes the tokens of all rows, in their order, and whatever else the log probabilities depend on."""
    digest = hashlib.blake2b("\n".join((_VERSION, *parts)).encode(), digest_size=20)
    columns = [name for name in _TOKEN_COLUMNS if name in dataset.column_names]
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        for name in columns:
            column = table[name].combine_chunks()
            if name.endswith("_ids"):
                digest.update(column.value_lengths().to_numpy().tobytes())
                column = column.flatten()
            digest.update(column.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()


def find_cached(key: str, names: Sequence[str], num_rows: int) -> dict[str, torch.Tensor] | None:
    """Returns what was kept under a key, ``[N]`` for each name; ``None`` if nothing was, or it is not whole."""
    try:
        with safe_open(cache_folder() / f"{key}.safetensors", "pt") as file:
            columns = {name: file.get_tensor(name) for name in names}
            checksum = (file.metadata() or {}).get("checksum")
    except (OSError, SafetensorError):
        return None
    whole = all(one.shape == (num_rows,) and torch.isfinite(one).all() for one in columns.values())
    return columns if whole and checksum == _checksum(key, columns) else None


def store_cached(key: str, columns: dict[str, torch.Tensor]) -> str:
    """Keeps log probabilities under a key; written aside and renamed. Returns what became of them, in words."""
    path = cache_folder() / f"{key}.safetensors"
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(columns, partial, metadata={"checksum": _checksum(key, columns)})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        return f"they could not be kept for the next run: {error}"
    return f"kept in {path.parent}"


def _checksum(key: str, columns: dict[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(key.encode())
    for name, column in sorted(columns.items()):
        digest.update(name.encode() + column.contiguous().numpy().tobytes())
    return digest.hexdigest()
