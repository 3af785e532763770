"""The reference of dpo and kto: what it is, how it is held, and whether the run really starts from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from forge_cli.backend.preference import PreferenceTrainer
from forge_cli.backend.watching import kept_weights
from forge_cli.build.adapter import load_adapter, read_adapter_config
from forge_cli.build.compute import Compute
from forge_cli.build.model import load_model
from forge_cli.build.reference_cache import find_cached, fingerprint_rows, fingerprint_weights, store_cached
from forge_cli.errors import ModelError
from forge_cli.schema.runspec import RunSpec

METHODS = ("dpo", "kto")
_PEFT_NAME = "ref"  # TRL looks for an adapter of this name
# 16-bit log probabilities of a long answer are off by tenths; a wrong reference is off by far more.
_TOLERANCE = 1e-3
_TOLERANCE_16_BIT = 5e-2


@dataclass(frozen=True)
class Reference:
    """What a model is compared with.

    Attributes:
        text: In words.
        is_start: Whether it is the model as it is before the first update.
        adapter: Folder of an adapter to load beside the trained one; ``None`` for none.
        keeps_copy: Whether it is the trained adapter as it was.
        model: A frozen second model; ``None`` when the trained one with other adapters will do.
    """

    text: str
    is_start: bool
    adapter: str | None = None
    keeps_copy: bool = False
    model: torch.nn.Module | None = None


def prepare_reference(spec: RunSpec, compute: Compute) -> Reference | None:
    """Decides what the reference is and loads a second model where one is needed; ``None`` without a reference.

    Adapters switched off are the base, so LoRA needs no second model. Whole training does, in the compute format,
    unless all log probabilities are computed before it begins.

    Raises:
        ModelError: The folder cannot be loaded, or its adapter is not one.
    """
    if spec.method not in METHODS:
        return None
    section, wanted = spec.preference, spec.preference.reference
    if wanted == "auto":
        wanted = "adapter" if spec.model.adapter else "base"
    if wanted == "adapter":
        return Reference(f"the adapter {spec.model.adapter} as it is now", True, keeps_copy=True)
    if wanted == "base" and spec.lora:
        return Reference(f"{spec.model.name} without adapters", not spec.model.adapter)
    if wanted == "base":
        if section.precompute_ref_log_probs:
            return Reference(f"{spec.model.name} as it is now", True)
        return Reference(f"a frozen copy of {spec.model.name}", True, model=_load_frozen(spec, compute, None))
    if (Path(wanted).expanduser() / "adapter_config.json").is_file():
        config = read_adapter_config(wanted)
        if spec.lora:
            return Reference(f"{spec.model.name} with the adapter {wanted}", False, adapter=wanted)
        # Merged, as TRL's fused head needs a plain model.
        model = load_adapter(_load_frozen(spec, compute, None), wanted, config).merge_and_unload()
        return Reference(f"a frozen copy of {spec.model.name} with the adapter {wanted}", False, model=model)
    return Reference(f"the model in {wanted}", False, model=_load_frozen(spec, compute, wanted))


def _load_frozen(spec: RunSpec, compute: Compute, folder: str | None) -> torch.nn.Module:
    if folder is not None:
        own = spec.model.model_copy(update={"name": folder, "revision": None})
        spec = spec.model_copy(update={"model": own})
    model = load_model(spec, compute if spec.lora else replace(compute, weight_dtype=compute.dtype))
    return model.requires_grad_(False).eval()


def install_reference(
    trainer: PreferenceTrainer, spec: RunSpec, reference: Reference, compute: Compute, say: Callable[[str], None]
) -> dict[str, object]:
    """Gives a built trainer its reference, runs it beforehand if the plan says so, and tests the start.

    Args:
        trainer: Trainer of dpo or kto.
        spec: The run file.
        reference: From :func:`prepare_reference`.
        compute: Device and number formats.
        say: Takes what a user should know.

    Returns:
        For the report: ``text`` (what the reference is), ``start`` (what was measured, in words), ``start_loss`` and
        ``start_margin`` (of rewards: beta times nats).

    Raises:
        ModelError: The reference does not fit, or is not what the model starts from.
    """
    say(f"reference: {reference.text}")
    attach_reference(trainer, reference)
    if spec.preference.precompute_ref_log_probs:
        precompute_reference(trainer, compute, say)
    start = trainer.measure_start()
    words = check_start(start, spec, reference, compute)
    say(words)
    margin = start.get("rewards/margins")
    return {"text": reference.text, "start": words, "start_loss": start["loss"], "start_margin": margin}


def attach_reference(trainer: PreferenceTrainer, reference: Reference) -> None:
    """Gives a trainer its reference. TRL has copied the trained adapter by now; only a continued one needs that.

    Raises:
        ModelError: The reference's adapter does not fit the model.
    """
    model = trainer.model
    if _PEFT_NAME not in getattr(model, "peft_config", {}) or reference.keeps_copy:
        return
    with kept_weights(model):
        model.delete_adapter(_PEFT_NAME)
        if reference.adapter:
            load_adapter(model, reference.adapter, read_adapter_config(reference.adapter), name=_PEFT_NAME)
            model.set_adapter("default")


def release_reference(trainer: PreferenceTrainer) -> None:
    """Lets the reference go after training, so that it is neither saved nor kept in memory."""
    if _PEFT_NAME in getattr(trainer.model, "peft_config", {}):
        with kept_weights(trainer.model):
            trainer.model.delete_adapter(_PEFT_NAME)
    trainer.ref_model = None


def precompute_reference(trainer: PreferenceTrainer, compute: Compute, say: Callable[[str], None]) -> None:
    """Runs the reference over all rows once, or takes what an earlier run kept; then a second model can go.

    The key is made of the reference's weights, the number formats and the tokens of all rows, which stand for data,
    tokenizer, template and ``max_length``.
    """
    model = trainer.ref_model or trainer.model
    weights = fingerprint_weights(
        model, without=".default" if trainer.ref_model is None and hasattr(model, "peft_config") else ""
    )
    formats = f"{compute.dtype} {compute.autocast_dtype} {model.config._attn_implementation}"
    names = trainer.reference_columns
    for split in ("train", "eval"):
        dataset = getattr(trainer, f"{split}_dataset")
        batch_size = getattr(trainer.args, f"per_device_{split}_batch_size")
        if dataset is None:
            continue
        # KTO's mismatched answers are those of the same batch, or one of the training rows.
        paired = f"{batch_size} {trainer.stand_in}" if "ref_KL_logps" in names else 0
        key = fingerprint_rows(dataset, weights, formats, str(paired), *names)
        columns = find_cached(key, names, len(dataset))
        if columns is None:
            say(f"computing the reference's log probabilities of {len(dataset)} {split} rows ...")
            columns = trainer.compute_reference(dataset, batch_size)
            say(f"reference log probabilities computed, {store_cached(key, columns)}")
        else:
            say(f"reference log probabilities of {len(dataset)} {split} rows taken from an earlier run")
        for name in names:
            dataset = dataset.add_column(name, columns[name].tolist())
        setattr(trainer, f"{split}_dataset", dataset)
    trainer.precompute_ref_logps = True
    release_reference(trainer)


def check_start(start: dict[str, float], spec: RunSpec, reference: Reference, compute: Compute) -> str:
    """Tests before the first update that model and reference are what the run says they are.

    A model that starts as its own reference gets rewards of 0, and a sigmoid loss of ln 2.

    Returns:
        What was measured, in words.

    Raises:
        ModelError: They differ and should not.
    """
    margin = start.get("rewards/margins", 0.0)
    if not reference.is_start:
        return (
            f"before the first update the reward margin is {margin:.4f} on the first rows, not 0: the model does not "
            "start as its reference, as preference.reference says"
        )
    expected = {name: 0.0 for name in start if name.startswith("rewards/") and name != "rewards/accuracies"}
    if spec.method == "dpo" and (spec.preference.loss_type or "sigmoid") == "sigmoid":
        expected["loss"] = math.log(2)
    tolerance = _TOLERANCE if compute.dtype is torch.float32 else _TOLERANCE_16_BIT
    wrong = [f"{k} is {start[k]:.4f}, not {v:.4f}" for k, v in expected.items() if not abs(start[k] - v) <= tolerance]
    if wrong:
        raise ModelError(
            f"before the first update {', '.join(wrong)}",
            where="preference.reference",
            why=f"the model is to start as its reference ({reference.text}) and answers differently",
            fix="if that is meant, name the reference: preference.reference: base or a folder",
        )
    return f"model and reference agree at the start: loss {start['loss']:.4f}, reward margin {margin:.4f}"
