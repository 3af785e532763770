"""The model card: what was trained on what, and what was measured. It claims nothing else, and names no local path."""

from __future__ import annotations

import re
from pathlib import Path

from forge_cli.redaction import mask
from forge_cli.results.find import Run
from forge_cli.run.folder import write_atomic
from forge_cli.units import format_bytes, format_count, format_duration
from forge_cli.version import __version__

CARD_FILE = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def name_base(name: str) -> tuple[str, bool]:
    """Returns a model's name without local folders, and whether it is an id on the hub."""
    on_hub = _HUB_ID.fullmatch(name) is not None and not Path(name).exists()
    return (name, True) if on_hub else (Path(name).name or name, False)


def write_card(folder: Path, run: Run, **measured: dict | None) -> None:
    """Writes the card into a folder of weights; see :func:`build_card`."""
    write_atomic(folder / CARD_FILE, build_card(run, **measured))


def build_card(run: Run, *, merge: dict | None = None, gguf: dict | None = None, average: dict | None = None) -> str:
    """Builds the card from the run's plan and report.

    Args:
        run: The run.
        merge: What :func:`forge_cli.results.merge.merge_run` measured; None for an adapter or a trained model.
        gguf: What :func:`forge_cli.results.export.export_run` measured.
        average: Steps and losses of :func:`forge_cli.results.average.average_run`.
    """
    spec, report = run.plan.spec, run.report
    base, on_hub = name_base(spec.model.name)
    is_adapter = run.kind == "adapter" and not merge and not gguf
    head = [
        "---",
        *([f"base_model: {base}"] if on_hub else []),
        f"library_name: {'gguf' if gguf else 'peft' if is_adapter else 'transformers'}",
        f"pipeline_tag: text-{'classification' if spec.method == 'reward' else 'generation'}",
        "tags:",
        "- forge",
        f"- {spec.method}",
        "---",
        "",
    ]
    kind = _describe_kind(is_adapter, merge, gguf)
    if average:
        kind += f", the mean of steps {', '.join(str(one) for one in sorted(average['steps']))},"
    lines = [f"# {run.path.name}", "", f"{kind} of {base}.", ""]
    lines += ["## How it was trained", "", *_list_training(run), ""]
    if splits := report.get("data", {}).get("splits"):
        lines += ["## Data", "", "| split | rows read | rows used | tokens | trained tokens |", "|---|---|---|---|---|"]
        lines += [f"| {' | '.join(_count(one, name) for name in _COLUMNS)} |" for one in splits]
        lines.append("")
    if measured := _list_figures(report, merge, gguf, average):
        lines += ["## Measured", "", *[f"- {line}" for line in measured], ""]
    lines += ["## Load it", "", *_list_loading(run, is_adapter, gguf), ""]
    lines.append("Nothing else was measured. The card was written by Forge from the run's report.")
    return mask("\n".join([*head, *lines])) + "\n"


_COLUMNS = ("name", "rows_read", "rows_kept", "tokens", "trained_tokens")


def _count(split: dict, name: str) -> str:
    value = split.get(name, "")
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else str(value)


def _describe_kind(is_adapter: bool, merge: dict | None, gguf: dict | None) -> str:
    if gguf:
        return f"GGUF ({gguf['format']})"
    if merge:
        return f"Merged model ({merge['dtype']})"
    return "LoRA adapter" if is_adapter else "Fine-tuned model"


def _list_training(run: Run) -> list[str]:
    spec, report = run.plan.spec, run.report
    base, _ = name_base(spec.model.name)
    revision = f", revision {spec.model.revision}" if spec.model.revision else ""
    how = "all weights"
    if spec.lora:
        kind = "DoRA" if spec.lora.use_dora else "LoRA"
        how = f"{kind}, r {spec.lora.r}, alpha {spec.lora.lora_alpha:g}"
    quantized = f", base in {spec.quantization.bits} bits" if spec.quantization else ""
    trainable = report.get("trainable", {})
    parameters = trainable.get("num_trainable_parameters")
    lines = [f"- base model: {base}{revision}", f"- method: {spec.method}, {how}{quantized}"]
    if parameters:
        total = trainable["num_parameters"]
        lines.append(f"- trained parameters: {format_count(parameters)} of {format_count(total)}")
    if report:
        steps, seconds = report.get("steps"), report.get("training_seconds", 0)
        lines.append(f"- {steps} steps in {format_duration(seconds)}, {format_count(report.get('tokens') or 0)} tokens")
        compute = report.get("compute", {})
        lines.append(f"- on {compute.get('device')} in {compute.get('dtype')}")
    return [*lines, f"- Forge {__version__}, plan digest {run.plan.digest}"]


def _list_figures(report: dict, merge: dict | None, gguf: dict | None, average: dict | None) -> list[str]:
    losses, match = report.get("losses", {}), report.get("exact_match_ratio", {})
    lines = []
    if losses.get("eval_before") is not None and losses.get("eval_raw") is not None:
        line = f"held-out loss {losses['eval_before']:.4f} before, {losses['eval_raw']:.4f} after"
        lines.append(line + (f", {losses['eval_ema']:.4f} with EMA weights" if losses.get("eval_ema") else ""))
    elif losses.get("train_last") is not None:
        lines.append(
            f"training loss {losses['train_first']:.4f} at the first step, {losses['train_last']:.4f} at the last; "
            "no rows were held out"
        )
    if match.get("after") is not None:
        lines.append(
            f"exact answers on held-out rows: {100 * match['before']:.1f} % before, {100 * match['after']:.1f} % after"
        )
    if report.get("peak_memory_bytes"):
        lines.append(f"peak memory {format_bytes(report['peak_memory_bytes'])} ({report['peak_memory_of']})")
    if merge:
        lines.append(
            f"merged against base and adapter: logits differ by at most {merge['largest_difference']:.2g} "
            f"on {merge['tokens']} tokens of {merge['texts_from']}; the adapter changes them by up to "
            f"{merge['largest_effect']:.2g}"
        )
        if (quantized := merge.get("quantized")) and "kl_nats" in quantized:
            lines.append(
                f"the {quantized['bits']}-bit base it was trained on, with the adapter, against this model: "
                f"KL {quantized['kl_nats']:.3g} nats, same likeliest token "
                f"{100 * quantized['top1_agreement_ratio']:.1f} %"
            )
    if gguf and gguf["checked"]:
        lines.append(f"against the model it was made from: {gguf['equal']} of {gguf['compared']} greedy tokens equal")
    if average and average["losses"]:
        lines.append(
            f"held-out loss {average['losses']['last']:.4f} of the last checkpoint, "
            f"{average['losses']['average']:.4f} of this average"
        )
    return lines


def _list_loading(run: Run, is_adapter: bool, gguf: dict | None) -> list[str]:
    if gguf:
        name = gguf["file_name"]
        lines = ["```sh", f"llama-cli -m {name}", "ollama create my-model -f Modelfile", "```", ""]
        if gguf["checked"]:
            load = f'AutoModelForCausalLM.from_pretrained("FOLDER", gguf_file="{name}")'
            lines += ["Or with transformers and the gguf package:", "", "```python", load, "```"]
        return lines
    kind, package = ("AutoPeftModelFor", "peft") if is_adapter else ("AutoModelFor", "transformers")
    kind += "SequenceClassification" if run.plan.spec.method == "reward" else "CausalLM"
    lines = ["```python", f"from {package} import {kind}", "from transformers import AutoTokenizer", ""]
    lines += ['tokenizer = AutoTokenizer.from_pretrained("FOLDER")', f'model = {kind}.from_pretrained("FOLDER")', "```"]
    base, on_hub = name_base(run.plan.spec.model.name)
    if is_adapter and not on_hub:
        lines += ["", f"The base model, {base}, is not on the hub: `base_model_name_or_path` has to name your copy."]
    asking = run.asking()
    if asking.get("end_tokens"):
        lines += ["", f"Answers end with {', '.join(f'`{one}`' for one in asking['end_tokens'])}."]
    if asking.get("system_prompt"):
        lines.append("All training conversations began with the system prompt in `chat.json`.")
    return lines
