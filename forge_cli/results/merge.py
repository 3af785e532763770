"""Merges an adapter into its unquantised base, and proves that the files on disk answer like base and adapter."""

from __future__ import annotations

import gc
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from forge_cli.build.compute import dtype_name
from forge_cli.checkpoints.disk import count_free_bytes, describe_shortage
from forge_cli.checkpoints.files import hash_file
from forge_cli.errors import ConfigError, ForgeError, MachineError, ModelError
from forge_cli.parts.state import count_bytes
from forge_cli.results.card import write_card
from forge_cli.results.find import Run
from forge_cli.results.load import LoadedRun, load_run
from forge_cli.results.merge_texts import Texts, collect_texts, list_differences, read_logits
from forge_cli.run.folder import ASKING_FILE, PARTIAL_SUFFIX, write_atomic

MERGE_FILE = "merge.json"
FLOAT32_BOUND = 1e-4
_ADAPTER_FILE = "adapter_model.safetensors"
_Say = Callable[[str], None]


def merge_run(
    run: Run,
    output: Path | None = None,
    *,
    which: str = "ema",
    dtype: str = "auto",
    most_difference: float | None = None,
    say: _Say = lambda text: None,
) -> dict[str, object]:
    """Merges a run's adapter, writes a model folder, reads it back and compares its logits.

    Args:
        run: A run that trained an adapter.
        output: Folder to write; default ``merged`` (``merged-raw``) inside the run.
        which: ``ema`` or ``raw``, as for :meth:`Run.weights`.
        dtype: ``auto`` (the format the run computes in here), ``float32``, ``bfloat16`` or ``float16``.
        most_difference: Largest allowed difference of a logit; default as :func:`bound_difference` says.
        say: Receives what is being done.

    Returns:
        What was measured, as plain data; ``folder`` is where the model lies.

    Raises:
        ConfigError: The run trained the whole model.
        ModelError: The written model differs from base and adapter, or the merge changed nothing. Nothing stays.
        MachineError: The folder holds something else, or does not fit on the disk.
    """
    began = time.monotonic()
    if run.kind == "model":
        raise ConfigError(
            "this run trained the whole model: there is nothing to merge",
            where=str(run.path),
            fix=f"use it as it is: {run.weights(which)}",
        )
    folder = run.weights(which)
    target = output or run.path / ("merged-raw" if which == "raw" else "merged")
    _refuse_foreign(target)
    say("loading the base in full and its adapter ...")
    loaded = load_run(_in_format(run, dtype), which=which, quantized=False)
    texts = collect_texts(run, loaded.tokenizer)
    with loaded.model.disable_adapter():
        base = read_logits(loaded.model, texts.rows)
    tuned = read_logits(loaded.model, texts.rows)
    say("merging ...")
    model = merge_adapter(loaded.model)
    partial = target.with_name(target.name + PARTIAL_SUFFIX)
    try:
        _write_model(model, loaded, folder, partial)
        attention, device = model.config._attn_implementation, loaded.compute.device
        weight_dtype, tokenizer = loaded.compute.weight_dtype, loaded.tokenizer
        del model, loaded
        release_memory()
        say("reading the written model back and comparing it ...")
        proof = _prove(partial, base, tuned, texts, tokenizer, weight_dtype, device, attention, most_difference)
        proof |= {"which": which, "adapter_sha256": hash_file(folder / _ADAPTER_FILE)}
        merged_logits = proof.pop("logits")
        proof["quantized"] = _measure_quantized(run, which, texts, merged_logits, say)
        proof["seconds"] = round(time.monotonic() - began, 1)
        write_atomic(partial / MERGE_FILE, json.dumps(proof, indent=1) + "\n")
        write_card(partial, run, merge=proof)
        publish(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return {"run": run.path.name, "folder": str(target), **proof}


def merge_adapter(model: torch.nn.Module) -> torch.nn.Module:
    """Merges in place and returns the plain model.

    An adapter on one end of tied embeddings must not change the other, so they are taken apart before.

    Raises:
        ModelError: The merge gives values that are not finite.
    """
    plain = model.get_base_model()
    ends = plain.get_input_embeddings(), plain.get_output_embeddings()
    inner = [getattr(end, "base_layer", getattr(end, "original_module", end)) for end in ends]
    was_tied = inner[1] is not None and inner[0].weight.data_ptr() == inner[1].weight.data_ptr()
    if was_tied and any(one is not whole for one, whole in zip(inner, ends, strict=True)):
        inner[1].weight = torch.nn.Parameter(inner[1].weight.detach().clone(), requires_grad=False)
    try:
        return model.merge_and_unload(safe_merge=True)  # the settings say then whether the ends are still the same
    except ValueError as error:
        raise ModelError("the adapter cannot be merged", why=str(error).split("\n")[0][:300]) from error


def find_merged(run: Run, which: str = "ema") -> Path | None:
    """Returns the merged folder inside a run if it belongs to the adapter that is there now."""
    folder = run.path / ("merged-raw" if which == "raw" else "merged")
    try:
        known = json.loads((folder / MERGE_FILE).read_text(encoding="utf-8"))
        return folder if known["adapter_sha256"] == hash_file(run.weights(which) / _ADAPTER_FILE) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def publish(partial: Path, target: Path) -> None:
    """Gives a folder that is written and synced its name; one that had it before goes last."""
    for path in partial.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    aside = target.with_name(f".{target.name}.old-{os.getpid()}")
    if target.exists():
        target.rename(aside)
    partial.rename(target)
    shutil.rmtree(aside, ignore_errors=True)


def release_memory() -> None:
    """Gives back what deleted models held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def bound_difference(dtype: torch.dtype, logits: list[torch.Tensor]) -> float:
    """Returns how far logits may lie apart: 16 roundings of the largest one in 16-bit formats; in float32 1e-4, or 40
    roundings where logits are so large that this is more (a 135M model with logits of 40 was measured at 21).

    A merged weight is rounded once to its format, and the path of an adapter is not; each layer adds roundings of its
    own, which largely cancel.
    """
    rounding = torch.finfo(dtype).eps * max(one.abs().max().item() for one in logits)
    return max(FLOAT32_BOUND, 40 * rounding) if dtype is torch.float32 else 16 * rounding


def _in_format(run: Run, dtype: str) -> Run:
    """Returns the run with another weight format; a precision that only GPUs have is left open without one."""
    spec, changed = run.plan.spec, Run(run.path)
    model = spec.model if dtype == "auto" else spec.model.model_copy(update={"dtype": dtype})
    training = spec.training if torch.cuda.is_available() else spec.training.model_copy(update={"precision": "auto"})
    plan = run.plan._replace(spec=spec.model_copy(update={"model": model, "training": training}))
    vars(changed)["plan"] = plan  # takes the place of the cached property
    return changed


def _refuse_foreign(target: Path) -> None:
    if target.exists() and not (target / MERGE_FILE).is_file():
        raise MachineError(
            f"this exists and was not written by forge merge: it has no {MERGE_FILE}",
            where=str(target),
            why="it would be lost",
            fix="choose another folder with --output",
        )


def _write_model(model: torch.nn.Module, loaded: LoadedRun, source: Path, partial: Path) -> None:
    needed = count_bytes(model.parameters())
    if count_free_bytes(partial) < needed:
        raise MachineError(
            describe_shortage(needed, partial, "the merged model does not fit"), where=str(partial.parent)
        )
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    loaded.tokenizer.save_pretrained(partial)
    for name in (ASKING_FILE, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, partial / name)


def _prove(
    folder: Path,
    base: list[torch.Tensor],
    tuned: list[torch.Tensor],
    texts: Texts,
    tokenizer,
    dtype: torch.dtype,
    device: str,
    attention: str,
    most_difference: float | None,
) -> dict[str, object]:
    """Reads a model with plain transformers and compares it; ``logits`` in the result are its own."""
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": device},
        attn_implementation=attention,
        use_safetensors=True,
        trust_remote_code=False,
    ).eval()
    logits = read_logits(model, texts.rows)
    bound = bound_difference(dtype, tuned) if most_difference is None else most_difference
    apart = list(list_differences(logits, tuned))
    worst = max(range(len(apart)), key=lambda i: apart[i].max())
    position, token = divmod(int(apart[worst].argmax()), apart[worst].shape[1])
    proof = {
        "dtype": dtype_name(dtype),
        "bytes": count_bytes(model.parameters()),
        "texts": len(texts.rows),
        "tokens": sum(map(len, texts.rows)),
        "texts_from": texts.source,
        "largest_difference": apart[worst].max().item(),
        "where": {"text": worst + 1, "position": position + 1, "token": tokenizer.convert_ids_to_tokens(token)},
        "mean_difference": _mean(apart),
        "bound": bound,
        "largest_effect": max(one.max().item() for one in list_differences(logits, base)),
        "mean_effect": _mean(list_differences(logits, base)),
    }
    proof["effect_share"], wanted = _share_effect(base, tuned, logits)
    proof["is_coarse"] = proof["mean_difference"] >= wanted
    _judge(proof, wanted)
    return {**proof, "logits": logits}


def _judge(proof: dict, wanted_effect: float) -> None:
    """Refuses a merge that changed nothing, or too much, or something else than the adapter does."""
    why, fix = "it would not answer like what was trained", "report it with the run's plan.yaml"
    if wanted_effect == 0:
        what, why = "the adapter changes nothing", "base and base with adapter answer the same"
        fix = "train for longer"
    elif proof["largest_effect"] == 0:
        what = "the merge changed nothing: the written model answers like its base"
    elif not proof["largest_difference"] <= proof["bound"]:
        what = (
            f"the merged model differs from base and adapter by up to {proof['largest_difference']:.3g}, "
            f"more than {proof['bound']:.3g}"
        )
    elif not 0.5 <= proof["effect_share"] <= 1.5:
        what = f"the merge holds {100 * proof['effect_share']:.0f} % of what the adapter does"
    else:
        return
    raise ModelError(what, where="merge", why=why, fix=fix)


def _share_effect(
    base: list[torch.Tensor], tuned: list[torch.Tensor], merged: list[torch.Tensor]
) -> tuple[float, float]:
    """Returns how much of the adapter's effect is in the merge (1: all of it), and the effect's mean size.

    The share is a projection: rounding, which points nowhere, does not change it, and a base with the adapter left out
    has none.
    """
    pairs = [((t - b).double(), (m - b).double()) for b, t, m in zip(base, tuned, merged, strict=True)]
    size = sum((wanted**2).sum().item() for wanted, _ in pairs)
    share = sum((wanted * got).sum().item() for wanted, got in pairs) / size if size else 0.0
    return share, _mean(list_differences(tuned, base))


def _mean(differences) -> float:
    sums = [(one.double().sum().item(), one.numel()) for one in differences]
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


def _measure_quantized(run: Run, which: str, texts: Texts, merged: list[torch.Tensor], say: _Say) -> dict | None:
    """Compares the quantised base with its adapter, which was trained, with the merged model; None without one."""
    quantization = run.plan.spec.quantization
    if quantization is None:
        return None
    say(f"comparing it with the {quantization.bits}-bit base that was trained on ...")
    try:
        loaded = load_run(run, which=which)
        with loaded.autocast():
            trained = read_logits(loaded.model, texts.rows)
    except (ForgeError, torch.OutOfMemoryError) as error:
        return {"bits": quantization.bits, "not_measured": str(error).split("\n")[0]}
    p, q = (torch.cat(one).log_softmax(-1).double() for one in (trained, merged))
    return {
        "bits": quantization.bits,
        "mean_difference": _mean(list_differences(trained, merged)),
        "kl_nats": (p.exp() * (p - q)).sum(-1).mean().item(),
        "top1_agreement_ratio": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
    }
