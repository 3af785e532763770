"""Writes ``report.json`` and its readable twin ``report.md``."""

from __future__ import annotations

import json
import platform
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from forge_cli.build.adapter import TrainableReport
from forge_cli.build.compute import Compute, dtype_name
from forge_cli.build.data import PreparedData
from forge_cli.data.report_text import render_table
from forge_cli.errors import MachineError
from forge_cli.estimate.plan_memory import estimate_from_plan
from forge_cli.parts.memory import MemoryCallback
from forge_cli.parts.monitor import MonitorCallback
from forge_cli.report.page import write_page
from forge_cli.resolve.plan import Plan
from forge_cli.run.folder import PAGE_FILE, REPORT_FILE, RunFolder, write_atomic
from forge_cli.run.next_step import suggest_next
from forge_cli.run.preflight import compare_phases
from forge_cli.run.summary import verdict
from forge_cli.units import format_count

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")


@dataclass(frozen=True)
class TrainingFigures:
    """What was measured around the training: evaluations before and after, time and peak memory."""

    loss_before: dict[str, float]
    loss_after: dict[str, float]
    seconds: float
    memory: MemoryCallback


@dataclass(frozen=True)
class Findings:
    """Everything a run found out, before it is written down."""

    plan: Plan
    compute: Compute
    data: PreparedData
    trainable: TrainableReport
    monitor: MonitorCallback
    weights: Path
    training: TrainingFigures
    reference: dict[str, object] | None
    total_seconds: float
    samples: list[dict]
    exact_match_before: float | None
    exact_match_after: float | None


def write_report(findings: Findings, folder: RunFolder) -> dict:
    """Writes both files, notes that the run is finished, and returns the content of ``report.json``.

    Raises:
        MachineError: The disk does not take them; the weights are saved.
    """
    report = build_report(findings, folder)
    try:
        write_atomic(folder.path / REPORT_FILE, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        write_atomic(folder.path / "report.md", render_markdown(report))
        folder.note_facts(finished=True)
    except OSError as error:
        raise MachineError(
            f"the report cannot be written: {error.strerror}; the weights are saved in {findings.weights}",
            where=str(error.filename or folder.path),
            fix=f"make room, then: forge resume {folder.path}; only the weights and the report are written again",
        ) from error
    _write_page(report, findings.monitor.records, folder)
    return report


def _write_page(report: dict, records: list[dict], folder: RunFolder) -> None:
    """Writes ``report.html``; a run never fails for it, as ``forge report`` can write it again."""
    try:
        known = {**report, "created": folder.read_facts().get("created", "")}
        write_atomic(folder.path / PAGE_FILE, write_page(known, records, verdict(report), folder.path))
    except Exception as error:
        warnings.warn(f"{PAGE_FILE} was not written: {error}; try: forge report {folder.path}", stacklevel=2)


def build_report(findings: Findings, folder: RunFolder) -> dict:
    """Gathers the report as plain data. Units are in the names; ratios run from 0 to 1."""
    plan, monitor, training = findings.plan, findings.monitor, findings.training
    steps = [r for r in monitor.records if r.get("loss") is not None and not r.get("diverged")]
    losses = [r["loss"] for r in steps if not r.get("skipped")]
    on_gpu = findings.compute.device.startswith("cuda")
    gpu_bytes = torch.cuda.get_device_properties(0).total_memory if on_gpu else 0
    estimate = estimate_from_plan(plan)
    return {
        "run": folder.path.name,
        "digest": plan.digest,
        "weights": findings.weights.name,
        "losses": {
            "eval_before": training.loss_before.get("eval_loss"),
            "eval_raw": training.loss_after.get("eval_loss"),
            "eval_ema": training.loss_after.get("eval_ema_loss"),
            "train_first": losses[0] if losses else None,
            "train_last": losses[-1] if losses else None,
        },
        "exact_match_ratio": {"before": findings.exact_match_before, "after": findings.exact_match_after},
        "reference": findings.reference,
        "preferences": _gather_rewards(monitor.records),
        "steps": len(steps),
        "training_seconds": round(training.seconds, 2),
        "total_seconds": round(findings.total_seconds, 2),
        "tokens": monitor.num_tokens,
        "step_seconds": round(monitor.step_seconds, 2),
        "tokens_per_second": round(monitor.num_tokens / monitor.step_seconds, 1) if monitor.step_seconds else None,
        "peak_memory_bytes": training.memory.peak_bytes(),
        "peak_memory_of": "GPU, allocated" if on_gpu else "process, resident",
        # Forge's estimate is of GPU memory; beside a CPU's resident memory it would say nothing.
        "estimated_memory_bytes": estimate.total_bytes if on_gpu and estimate else None,
        "memory": {
            **training.memory.describe_device(),
            "phases": compare_phases(estimate, training.memory.phases),
        },
        "alarms": monitor.alarms,
        "data": findings.data.report.as_dict(),
        "trainable": asdict(findings.trainable),
        "samples": _samples(findings.samples, plan.spec.report.samples if plan.spec.report else 0),
        "compute": {
            "device": findings.compute.device_name,
            "dtype": dtype_name(findings.compute.dtype),
            "weight_dtype": dtype_name(findings.compute.weight_dtype),
            "reason": findings.compute.reason,
        },
        "environment": {"python": platform.python_version(), "system": platform.platform(), **_versions()},
        "plan": {path: {"value": o[-1].value, "from": o[-1].where} for path, o in sorted(plan.history.items()) if o},
        "method": {
            "name": plan.spec.method,
            "lora": plan.spec.lora is not None,
            "model": plan.spec.model.name,
            "ema": plan.spec.ema is not None,
        },
        "next": suggest_next(plan.spec, folder.path, gpu_bytes),
    }


def _gather_rewards(records: list[dict]) -> list[dict]:
    """Picks rewards of the first, middle and last logging step and of all evaluations; empty without preferences."""
    logged = [record for record in records if "rewards/margins" in record]
    found = [_read_rewards(logged[i], "", "training") for i in sorted({0, len(logged) // 2, len(logged) - 1}) if logged]
    for record in records:
        for prefix, of in (("eval_", "held out"), ("eval_ema_", "held out, EMA")):
            if "eval_loss" in record and f"{prefix}rewards/margins" in record:
                found.append(_read_rewards(record, prefix, of))
    return found


def _read_rewards(record: dict, prefix: str, of: str) -> dict:
    names = ("chosen", "rejected", "margins", "accuracies")
    return {"step": record["step"], "of": of} | {name: record.get(f"{prefix}rewards/{name}") for name in names}


def _preference_lines(rewards: list[dict], reference: dict | None) -> list[str]:
    """Renders what the model was compared with, and rewards as a table: 0 as long as it is its own reference."""
    if not rewards and not reference:
        return []
    compared = [f"Reference: {reference['text']}; {reference['start']}.", ""] if reference else []
    lines = [
        "## Preferences",
        "",
        *compared,
        "| rows | step | better | worse | margin | better wins |",
        "|---|---|---|---|---|---|",
    ]
    for entry in rewards:
        figures = ["" if entry[name] is None else f"{entry[name]:.4f}" for name in ("chosen", "rejected", "margins")]
        share = "" if entry["accuracies"] is None else f"{100 * entry['accuracies']:.1f} %"
        lines.append("| " + " | ".join([entry["of"], str(entry["step"]), *figures, share]) + " |")
    return [*lines, ""]


def _samples(samples: list[dict], shown: int) -> list[dict]:
    """Keeps the first rows of the evaluation split and all prompts of the run file; the rendered prompt is left out."""
    rows = [s for s in samples if s["wanted"] is not None][:shown]
    chosen = rows + [s for s in samples if s["wanted"] is None]
    return [{key: s[key] for key in ("shown", "wanted", "before", "after")} for s in chosen]


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def render_markdown(report: dict) -> str:
    """Renders the report for people."""
    trainable = report["trainable"]
    lines = [f"# Run {report['run']}", "", *[f"- {line}" for line in verdict(report)], ""]
    lines += [
        f"Trained {format_count(trainable['num_trainable_parameters'])} of "
        f"{format_count(trainable['num_parameters'])} parameters of {report['method']['model']} on "
        f"{report['compute']['device']} in {report['compute']['dtype']} ({report['compute']['reason']}).",
        "",
        *_freeze_lines(trainable["freeze"]),
        "## Data",
        "",
        *render_table(report["data"]["splits"]),
        "",
        *_preference_lines(report["preferences"], report["reference"]),
        "## Alarms",
        "",
        *([f"- step {a['step']}: {a['message']}" for a in report["alarms"]] or ["none"]),
        "",
    ]
    if report["samples"]:
        lines += ["## Answers before and after", ""]
    for sample in report["samples"]:
        lines += [f"**{_inline(sample['shown'])}**", ""]
        if sample["wanted"] is not None:
            lines.append(f"- wanted: {_inline(sample['wanted'])}")
        lines += [f"- before: {_inline(sample['before'])}", f"- after: {_inline(sample['after'])}", ""]
    lines += [*_usage_lines(report), "## Settings and who said so", "", "| setting | value | from |", "|---|---|---|"]
    lines += [f"| {path} | {_inline(str(e['value']))} | {e['from']} |" for path, e in report["plan"].items()]
    environment = ", ".join(f"{name} {number}" for name, number in report["environment"].items())
    return "\n".join([*lines, "", "## Environment", "", environment, ""])


def _freeze_lines(freeze: dict | None) -> list[str]:
    if not freeze:
        return []
    how = "run forward only" if freeze["prefix_without_grad"] else f"need a backward pass for {freeze['blocked_by']}"
    return [f"{freeze['num_frozen_layers']} of {freeze['num_layers']} decoder layers are frozen and {how}.", ""]


def _usage_lines(report: dict) -> list[str]:
    """Shows how to load the result with the plain libraries."""
    lora, model = report["method"]["lora"], report["method"]["model"]
    kind, extra = "CausalLM", ""
    if report["method"]["name"] == "reward":
        kind, extra = "SequenceClassification", ", num_labels=1"
    load = [
        f"from transformers import AutoModelFor{kind}, AutoTokenizer",
        f'tokenizer = AutoTokenizer.from_pretrained("{report["weights"]}")',
    ]
    if lora:
        load.insert(0, f"from peft import AutoPeftModelFor{kind}")
        load.pop(1)
        load.insert(1, "from transformers import AutoTokenizer")
        place = f'"{report["weights"]}"{extra}'
        load.append(f"model = AutoPeftModelFor{kind}.from_pretrained({place})  # base: {model}")
    else:
        load.append(f'model = AutoModelFor{kind}.from_pretrained("{report["weights"]}"{extra})')
    if extra:
        load.append("model.config.pad_token_id = tokenizer.pad_token_id  # the score is taken at the last other token")
    kept = [f"`{report['weights']}` holds the EMA weights, `{report['weights']}-raw` the raw ones.", ""]
    return ["## Use it", "", *(kept if report["method"]["ema"] else []), "```python", *load, "```", ""]


def _inline(text: str) -> str:
    """Puts generated text on one line, with control characters shown, so that it cannot disturb the page."""
    shown = "".join(c if c.isprintable() else " " for c in text.replace("\n", " ⏎ "))
    return shown.replace("|", "\\|").replace("`", "'") or "(nothing)"
