"""What runs have to show, whether they have ended or not, and how they differ."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from forge_cli.checkpoints.lock import find_holder
from forge_cli.errors import ForgeError, MachineError
from forge_cli.report.page import list_commands, write_comparison, write_page, write_value
from forge_cli.report.series import as_number, read_series
from forge_cli.report.unfinished import describe_progress, gather_report
from forge_cli.results.find import Run
from forge_cli.run.folder import PLAN_FILE, write_atomic
from forge_cli.run.summary import verdict
from forge_cli.units import format_bytes, format_count, format_duration

PAGE_FILE = "report.html"
# They name a run or say where values came from; the values themselves are compared.
_NO_DIFFERENCE = {"name", "output_dir", "preset", "extends"}


@dataclass(frozen=True)
class Result:
    """A run as it stands.

    Attributes:
        run: Where it is.
        report: Content of ``report.json``, with ``created``; of a run that has not ended as much as is known.
        lines: What to say first, at most three lines.
        state: ``finished``, ``running`` or ``stopped at step N``.
        figures: Name of a figure to its value; ``None`` where it is not known. Losses are means over tokens.
    """

    run: Run
    report: dict
    lines: list[str]
    state: str
    figures: dict[str, float | None]

    @property
    def commands(self) -> list[str]:
        """What to type next."""
        return list_commands(self.report, self.run.path)


def read_result(run: Run) -> Result:
    """Reads a run; what cannot be read is left out."""
    created = {"created": str(run.facts.get("created", ""))}
    if run.facts.get("finished") and "losses" in run.report:
        report = created | run.report
        return Result(run, report, verdict(report), "finished", _read_figures(report, run.records))
    try:
        plan = run.plan
        text = (run.path / PLAN_FILE).read_text(encoding="utf-8")
    except (ForgeError, OSError, ValueError):
        plan, text = None, ""
    holder = find_holder(run.path)
    report = {**created, "holder": holder, **gather_report(run.path.name, plan, text, run.records)}
    lines = describe_progress(report, run.records, holder)
    state = "running" if holder else f"stopped at step {report['steps']}"
    return Result(run, report, lines, state, _read_figures(report, run.records))


def write_run_page(result: Result) -> Path:
    """Writes ``report.html`` into the run folder and returns its path.

    Raises:
        MachineError: It cannot be written.
    """
    page = write_page(result.report, result.run.records, result.lines, result.run.path)
    return _write(result.run.path / PAGE_FILE, page)


def write_comparison_page(results: Mapping[str, Result], path: Path) -> Path:
    """Writes one page with the curves of several runs, by name, and returns its path.

    Raises:
        MachineError: It cannot be written.
    """
    records = {name: one.run.records for name, one in results.items()}
    page = write_comparison(records, list_differences(list(results.values())), list_figures(list(results.values())))
    return _write(path, page)


def name_results(results: Sequence[Result]) -> dict[str, Result]:
    """Names runs by their folders; folders of one name by their whole paths."""
    names = [one.run.path.name for one in results]
    return {
        (str(one.run.path) if names.count(name) > 1 else name): one for name, one in zip(names, results, strict=True)
    }


def list_differences(results: Sequence[Result]) -> list[list[str]]:
    """Lists the settings that differ: the path, then each run's value; ``-`` where a run has no such setting."""
    plans = _read_plans(results)
    rows = []
    for path in sorted(set().union(*plans) - _NO_DIFFERENCE):
        values = [write_value(plan[path]) if path in plan else "-" for plan in plans]
        if len(set(values)) > 1:
            rows.append([path, *values])
    return rows


def list_figures(results: Sequence[Result]) -> list[list[str]]:
    """Lists the figures that at least one run has: the name, then each run's value as text."""
    rows = [[name, *(_write_figure(name, one.figures[name]) for one in results)] for name in results[0].figures]
    return [row for row in rows if any(row[1:])]


def _read_plans(results: Sequence[Result]) -> list[dict[str, object]]:
    """Reads all plans from the same kind of file: a report also holds values that had no effect, ``plan.yaml`` not."""
    if any(one.state != "finished" for one in results):
        with contextlib.suppress(ForgeError, OSError):
            histories = [one.run.plan.history for one in results]
            return [{path: told[-1].value for path, told in history.items() if told} for history in histories]
    return [{path: one["value"] for path, one in (result.report.get("plan") or {}).items()} for result in results]


def _read_figures(report: Mapping, records: Sequence[Mapping]) -> dict[str, float | None]:
    """Reads figures from the report or, for a run that has not ended, from what its records say so far."""
    held_out, averaged = read_series(records, "eval_loss"), read_series(records, "eval_ema_loss")
    losses, training = report.get("losses") or {}, read_series(records, "loss")
    margin, wins = read_series(records, "eval_rewards/margins"), read_series(records, "eval_rewards/accuracies")
    seconds = sum(as_number(one.get("seconds")) or 0 for one in records)
    return {
        "held-out loss before": losses.get("eval_before", held_out.values[0] if held_out else None),
        "held-out loss after": losses.get("eval_raw", held_out.values[-1] if held_out else None),
        "held-out loss after, EMA": losses.get("eval_ema", averaged.values[-1] if averaged else None),
        "training loss, last step": losses.get("train_last", training.values[-1] if training else None),
        "exact answers before, %": _percent((report.get("exact_match_ratio") or {}).get("before")),
        "exact answers after, %": _percent((report.get("exact_match_ratio") or {}).get("after")),
        "held-out reward margin": margin.values[-1] if margin else None,
        "held-out pairs won, %": _percent(wins.values[-1] if wins else None),
        "steps": report.get("steps"),
        "tokens": report.get("tokens") or sum(int(as_number(one.get("tokens")) or 0) for one in records),
        "training time": report.get("training_seconds") or seconds,
        "tokens per second": report.get("tokens_per_second"),
        "peak memory": report.get("peak_memory_bytes"),
        "trained parameters": (report.get("trainable") or {}).get("num_trainable_parameters"),
        "alarms": len(report.get("alarms") or []),
    }


def _percent(ratio: float | None) -> float | None:
    return None if ratio is None else 100 * ratio


def _write_figure(name: str, value: float | None) -> str:
    if value is None:
        return ""
    if "%" in name or name == "tokens per second":
        return f"{value:.1f}"
    write = {"training time": format_duration, "peak memory": format_bytes, "trained parameters": format_count}
    return write[name](value) if name in write else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _write(path: Path, page: str) -> Path:
    try:
        write_atomic(path, page)
    except OSError as error:
        raise MachineError(
            f"the page cannot be written: {error.strerror}",
            where=str(error.filename or path),
            fix="see that the folder is there, may be written and has room",
        ) from error
    return path
