"""As much of ``report.json`` as can be told of a run that has not ended: from its plan and its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from forge_cli.report.series import last_step, read_series
from forge_cli.resolve.plan import Plan
from forge_cli.units import count_of


def gather_report(name: str, plan: Plan | None, plan_text: str, records: Sequence[Mapping]) -> dict:
    """Gathers what is known so far, under the names of ``report.json``; ``losses`` is not among them.

    Args:
        name: Name of the run.
        plan: Its plan; ``None`` if it cannot be read.
        plan_text: Content of ``plan.yaml``, whose comments say where each value came from.
        records: Lines of ``metrics.jsonl``.
    """
    report = {"run": name, "steps": last_step(records), "alarms": [one for one in records if "alarm" in one]}
    if plan is None:
        return report
    spec, lines = plan.spec, plan_text.splitlines()

    def find_origin(where: str) -> str:
        place = where.split(":")
        line = int(place[1]) if len(place) > 1 and place[1].isdigit() else 0
        return lines[line - 1].rpartition("  # ")[2] if 0 < line <= len(lines) and "  # " in lines[line - 1] else where

    return report | {
        "method": {"name": spec.method, "model": spec.model.name, "lora": bool(spec.lora), "ema": bool(spec.ema)},
        "planned_steps": spec.training.max_steps,
        "plan": {
            path: {"value": origins[-1].value, "from": find_origin(origins[-1].where)}
            for path, origins in sorted(plan.history.items())
            if origins
        },
    }


def describe_progress(report: Mapping, records: Sequence[Mapping], holder: str) -> list[str]:
    """Says in at most three lines how far a run has come.

    Args:
        report: As :func:`gather_report` returns it.
        records: Lines of ``metrics.jsonl``.
        holder: The process that carries it out; empty if none does.
    """
    planned = f" of {report['planned_steps']}" if report.get("planned_steps") else ""
    is_diverged = bool(records) and bool(records[-1].get("diverged"))
    state = f"in use by {holder}" if holder else "it diverged" if is_diverged else "stopped"
    lines = [f"not finished, step {report['steps']}{planned}: {state}"]
    for measure, name in (("eval_loss", "held-out loss"), ("loss", "training loss")):
        if len((series := read_series(records, measure)).steps) > (measure == "eval_loss"):
            (first, *_, last), (start, *_, end) = 2 * series.steps, 2 * series.values
            later = f", {end:.4f} at step {last}" if last != first else ""
            lines.append(f"{name} {start:.4f} at step {first}{later}")
            break
    return [*lines, count_of(len(report["alarms"]), "alarm", "alarms")]
