"""Saves what was trained: written aside, then renamed, so that a folder is whole or absent."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig

from forge_cli import faults
from forge_cli.errors import DivergedError
from forge_cli.run.answers import find_end_tokens
from forge_cli.run.folder import ASKING_FILE, PARTIAL_SUFFIX, RunFolder


def weights_name(model) -> str:
    """Returns the name of the folder for what was trained: ``adapter`` or ``model``."""
    return "adapter" if hasattr(model, "peft_config") else "model"


def save_weights(model, tokenizer, folder: RunFolder, name: str, system_prompt: str | None = None) -> Path:
    """Saves the adapter or the model with its tokenizer and chat template.

    Args:
        model: A PEFT model (its adapter is saved) or a transformers model (all of it is).
        tokenizer: Saved beside it; its chat template goes along.
        folder: The run.
        name: Folder inside the run: ``adapter``, ``adapter-raw``, ``model`` or ``model-raw``.
        system_prompt: What all training conversations began with, if they did; saved with the end tokens, so that the
            model can be asked as it was trained.

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
    try:
        _write_files(model, tokenizer, partial, name, system_prompt)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for path in partial.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if target.exists():
        shutil.rmtree(target)
    faults.reach(f"export:{name}:rename")
    partial.rename(target)
    with contextlib.suppress(OSError):
        descriptor = os.open(folder.path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return target


def _write_files(model, tokenizer, partial: Path, name: str, system_prompt: str | None) -> None:
    use_cache, model.config.use_cache = model.config.use_cache, True
    try:
        model.save_pretrained(partial, **_save_options(model))
    finally:
        model.config.use_cache = use_cache
    # PEFT's is a form to fill in; `forge push` and `forge merge` write one that says something.
    (partial / "README.md").unlink(missing_ok=True)
    faults.reach(f"export:{name}")
    tokenizer.save_pretrained(partial)
    _save_asking(model, tokenizer, partial, system_prompt)


def _save_asking(model, tokenizer, partial: Path, system_prompt: str | None) -> None:
    """Saves how the model is asked and where it stops: chat templates end answers with tokens of their own."""
    ends = find_end_tokens(model, tokenizer)
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation = GenerationConfig(**{**generation.to_dict(), "eos_token_id": ends})
        generation.pad_token_id = tokenizer.pad_token_id
        generation.save_pretrained(partial)
    asking = {
        "system_prompt": system_prompt,
        "end_tokens": tokenizer.convert_ids_to_tokens(ends),
        "end_token_ids": ends,
    }
    (partial / ASKING_FILE).write_text(json.dumps(asking, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _save_options(model) -> dict[str, object]:
    """PEFT's automatic choice asks the hub whether the vocabulary grew; Forge never resizes it, so it knows."""
    if not hasattr(model, "peft_config"):
        return {}
    targets = model.peft_config["default"].target_modules or []
    return {
        "save_embedding_layers": any("embed" in name or "lm_head" in name for name in targets),
        "selected_adapters": ["default"],
    }
