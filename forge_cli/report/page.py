"""The page of one run, and the page that lays several over each other."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from forge_cli.report.document import escape, render_document, render_list, render_table
from forge_cli.report.figures import draw_lengths, draw_overlaid, draw_run
from forge_cli.units import format_bytes, format_count, format_duration

_MOST_ALARMS = 200
_MOST_SAMPLES = 50
_NO_TEXT = "(nothing)"
# What a row of the data table says, and whether it is left out where it is 0 in all splits.
_DATA_ROWS = (
    ("format", "format", False),
    ("rows read", "rows_read", False),
    ("bad, skipped", "rows_bad", True),
    ("left out or held back", "rows_unused", True),
    ("dropped, too long", "rows_dropped", True),
    ("rows kept", "rows_kept", False),
    ("cut, too long", "rows_truncated", True),
    ("split, too long", "rows_split", True),
    ("answers lost in part or whole", "rows_lost", True),
    ("duplicates", "rows_duplicate", False),
    ("with text of special tokens", "rows_escaped", True),
    ("without a trained token", "rows_untrained", True),
    ("without a trained end token", "rows_without_end", True),
    ("tokens", "tokens", False),
    ("trained tokens", "trained_tokens", False),
    ("longest, before cutting", "longest_tokens", False),
    ("data.max_length", "max_length", True),
)


def write_page(report: Mapping, records: Sequence[Mapping], verdict: Sequence[str], folder: Path) -> str:
    """Writes the page of a run.

    Args:
        report: Content of ``report.json``, or as much of it as is known; what is missing has no section.
        records: Lines of ``metrics.jsonl``.
        verdict: What to read first, a line each.
        folder: The run folder, as the commands to type next should name it.

    Returns:
        A whole HTML file that needs no other.
    """
    method, plan = report.get("method") or {}, report.get("plan") or {}
    subtitle = " · ".join(str(one) for one in (method.get("name"), method.get("model"), _start(report)) if one)
    figures = [*draw_run(report, records), *filter(None, [draw_lengths(report)])]
    sections = {
        "Curves": "",
        "Answers": _write_samples(report.get("samples") or []),
        "Alarms": _write_alarms(report.get("alarms") or []),
        "Data": _write_data(report.get("data") or {}, (plan.get("data.packing") or {}).get("value") is True),
        "Model": _write_model(report),
        "Plan": _write_plan(plan),
        "Environment": render_table((report.get("environment") or {}).items()),
        "Next": "".join(f"<pre>{escape(line)}</pre>" for line in list_commands(report, folder)),
    }
    return render_document(f"Run {report.get('run') or folder.name}", subtitle, verdict, figures, sections)


def write_comparison(
    runs: Mapping[str, Sequence[Mapping]], differences: Sequence[Sequence[str]], figures: Sequence[Sequence[str]]
) -> str:
    """Writes the page of several runs.

    Args:
        runs: Name of each run to its lines of ``metrics.jsonl``.
        differences: A row for each setting that differs: its path, then one cell a run.
        figures: A row for each figure: its name, then one cell a run.
    """
    names = list(runs)
    count = "1 setting differs" if len(differences) == 1 else f"{len(differences)} settings differ"
    sections = {
        "Curves": "",
        "Settings that differ": render_table(differences, ("setting", *names)) or "<p>None.</p>",
        "Figures": render_table(figures, ("", *names), numbers=True),
    }
    return render_document(", ".join(names), f"{len(names)} runs", [count], draw_overlaid(runs), sections)


def list_commands(report: Mapping, folder: Path) -> list[str]:
    """Lists what to type next, most useful first.

    Args:
        report: As for :func:`write_page`; a run without ``losses`` has not ended, one with a ``holder`` goes on.
        folder: The run folder.
    """
    place, method = shlex.quote(str(folder)), report.get("method") or {}
    if "losses" not in report:
        return [f"forge watch {place}" if report.get("holder") else f"forge resume {place}"]
    asked = [] if method.get("name") == "reward" else [f"forge chat {place}"]
    merged = [f"forge merge {place}"] if method.get("lora") else []
    return [*asked, f"forge eval {place}", *merged, *([str(report["next"])] if report.get("next") else [])]


def _start(report: Mapping) -> str:
    return str(report.get("created") or "")[:16].replace("T", " ")


def _write_samples(samples: Sequence[Mapping]) -> str:
    parts = []
    for sample in samples[:_MOST_SAMPLES]:
        wanted = sample.get("wanted")
        answers = [("before", sample.get("before")), ("after", sample.get("after"))]
        boxes = "".join(f"<div><h4>{name}</h4>{_write_text(text)}</div>" for name, text in answers)
        expected = "" if wanted is None else f"<h4>wanted</h4>{_write_text(wanted)}"
        parts.append(
            f'<article class="sample"><h3 dir="auto">{escape(sample.get("shown"))}</h3>{expected}'
            f'<div class="pair">{boxes}</div></article>'
        )
    return "".join(parts)


def _write_text(text: object) -> str:
    return f'<pre dir="auto">{escape(text or _NO_TEXT)}</pre>'


def _write_alarms(alarms: Sequence[Mapping]) -> str:
    if not alarms:
        return "<p>None.</p>"
    rows = [(f"step {one.get('step')}", one.get("alarm"), one.get("message")) for one in alarms[:_MOST_ALARMS]]
    left = len(alarms) - len(rows)
    more = f"<p>{left} more are in metrics.jsonl.</p>" if left else ""
    return render_table(rows, ("step", "kind", "what happened")) + more


def _write_data(data: Mapping, is_packed: bool) -> str:
    splits = data.get("splits") or []
    rows = [
        (label, *(_write_number(split.get(key)) for split in splits))
        for label, key, is_optional in _DATA_ROWS
        if not is_optional or any(split.get(key) for split in splits)
    ]
    notes = []
    if overlap := data.get("rows_in_both"):
        notes.append(f"{overlap} rows are in more than one split.")
    if data.get("steps_per_epoch"):
        notes.append(f"{data['steps_per_epoch']} steps per epoch.")
    # Without packing these say what it would make of the rows.
    if is_packed and data.get("packed_ratio"):
        notes.append(f"Packed into {data['packed_sequences']} sequences, {100 * data['packed_ratio']:.0f} % filled.")
    if data.get("system_prompt"):
        notes.append(f"Every conversation begins with: {data['system_prompt']}")
    table = render_table(rows, ("", *(str(one.get("name")) for one in splits)), numbers=True) if splits else ""
    return table + (render_list(notes) if notes else "")


def _write_number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def _write_model(report: Mapping) -> str:
    trainable, compute, rows = report.get("trainable") or {}, report.get("compute") or {}, []
    if count := trainable.get("num_parameters"):
        trained = trainable["num_trainable_parameters"]
        share = f"{format_count(trained)} of {format_count(count)} ({100 * trained / count:.2f} %)"
        rows.append(("trained parameters", share))
    if modules := trainable.get("target_modules"):
        rows.append(("adapters on", ", ".join(modules)))
    if freeze := trainable.get("freeze"):
        how = "forward only" if freeze.get("prefix_without_grad") else f"backward for {freeze.get('blocked_by')}"
        frozen = f"{freeze.get('num_frozen_layers')} of {freeze.get('num_layers')} decoder layers, run {how}"
        rows.append(("frozen layers", frozen))
    if compute:
        rows.append(("computed on", f"{compute.get('device')} in {compute.get('dtype')}: {compute.get('reason')}"))
    if reference := report.get("reference"):
        rows.append(("compared with", f"{reference.get('text')}; {reference.get('start')}"))
    if peak := report.get("peak_memory_bytes"):
        estimated = report.get("estimated_memory_bytes")
        beside = f"; estimated {format_bytes(estimated)}" if estimated else ""
        rows.append(("peak memory", f"{format_bytes(peak)} ({report.get('peak_memory_of')}){beside}"))
    if report.get("training_seconds") is not None:
        whole = format_duration(report.get("total_seconds") or 0)
        rows.append(("time", f"{format_duration(report['training_seconds'])} of training, {whole} in all"))
    if (report.get("method") or {}).get("ema") and report.get("weights"):
        kept = report["weights"]
        rows.append(("weights", f"{kept}: averaged (EMA), to be used; {kept}-raw: of the last step"))
    return render_table(rows)


def _write_plan(plan: Mapping[str, Mapping]) -> str:
    """Shows what somebody chose, and all settings folded, to be searched."""
    rows = [(path, write_value(one["value"]), one["from"]) for path, one in plan.items() if one["value"] != {}]
    chosen = [row for row in rows if row[2] != "schema default"]
    header = ("setting", "value", "from")
    if not rows:
        return ""
    return (
        render_table(chosen, header) + f"<details><summary>All {len(rows)} settings</summary>"
        '<input type="search" id="filter" aria-label="Filter the settings" placeholder="Filter, as in learning_rate">'
        f"{render_table(rows, header, name='settings')}</details>"
    )


def write_value(value: object) -> str:
    """Writes a value of a plan; equal values look equal, whoever wrote them."""
    if isinstance(value, list | tuple):
        return ", ".join(str(one) for one in value) or "none"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "on" if value == {} else {"None": "none", "True": "yes", "False": "no"}.get(repr(value), str(value))
