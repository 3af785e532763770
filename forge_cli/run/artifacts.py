"""Saves what was trained: written aside, then renamed, so that a folder is whole or absent."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import torch

from forge_cli.errors import DivergedError
from forge_cli.run.folder import PARTIAL_SUFFIX, RunFolder


def save_weights(model, tokenizer, folder: RunFolder, name: str) -> Path:
    """Saves the adapter or the model with its tokenizer and chat template.

    Args:
        model: A PEFT model (its adapter is saved) or a transformers model (all of it is).
        tokenizer: Saved beside it; its chat template goes along.
        folder: The run.
        name: Folder inside the run: ``adapter``, ``adapter-raw``, ``model`` or ``model-raw``.

    Returns:
        The folder that was written.

    Raises:
        DivergedError: A trained weight is not finite; nothing is written.
    """
    bad = [n for n, p in model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
    if bad:
        raise DivergedError(f"{len(bad)} trained tensors are not finite, {bad[0]} first", why="nothing was saved")
    target = folder.path / name
    partial = folder.path / (name + PARTIAL_SUFFIX)
    shutil.rmtree(partial, ignore_errors=True)
    use_cache, model.config.use_cache = model.config.use_cache, True
    try:
        model.save_pretrained(partial, **_save_options(model))
    finally:
        model.config.use_cache = use_cache
    tokenizer.save_pretrained(partial)
    for path in partial.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    with contextlib.suppress(OSError):
        descriptor = os.open(folder.path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return target


def _save_options(model) -> dict[str, object]:
    """PEFT's automatic choice asks the hub whether the vocabulary grew; Forge never resizes it, so it knows."""
    if not hasattr(model, "peft_config"):
        return {}
    targets = model.peft_config["default"].target_modules or []
    return {"save_embedding_layers": any("embed" in name for name in targets)}
