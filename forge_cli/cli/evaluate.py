"""``forge eval``: measure what a run trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forge_cli.cli.chat import Raw, RunFolder
from forge_cli.cli.render import note, print_json, print_table
from forge_cli.errors import DataError, MachineError

_NAMES = {"ema": "averaged (EMA)", "raw": "raw"}


def evaluate(
    run: RunFolder = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="FILE", help="Rows to measure on; default: the run's own evaluation rows."),
    ] = None,
    raw: Raw = False,
    base: Annotated[bool, typer.Option("--base", help="Measure the model before training as well.")] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="Take the first N rows only.")
    ] = None,
    exact_match: Annotated[
        bool, typer.Option("--exact-match", help="Answer all questions, and count answers equal to the letter.")
    ] = False,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="T,...", help="Run tasks of lm-eval, such as hellaswag, instead.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure loss per token and perplexity of a run's model on rows it was not trained on.

    With EMA the averaged weights are compared with the raw ones.
    """
    if tasks is not None and (data or exact_match):
        raise typer.BadParameter("--tasks brings its own rows: leave --data and --exact-match out")
    if data is not None and not data.is_file():
        raise DataError("no such file", where=str(data))
    wanted = _read_tasks(tasks)
    from forge_cli.results.find import check_eval_rows, choose_run
    from forge_cli.results.session import asking

    chosen = choose_run(run, with_weights=True)
    if data is None and not wanted:
        check_eval_rows(chosen)
    note(f"loading {chosen.path} ...")
    measured, rows = [], None
    with asking(chosen, note, needs_hub=bool(wanted)):
        from forge_cli.results.ask import Asker
        from forge_cli.results.evaluate import list_weights, load_rows, measure, run_tasks

        weights = list_weights(chosen, raw=raw)
        asker = Asker(chosen, weights[0])
        note(f"{chosen.path}: {chosen.plan.spec.model.name}; {asker.loaded.compute.device_name}")
        if not wanted:
            rows = load_rows(asker, data, limit, exact_match, note)
        for which in [*weights, *["base"] * base]:
            if which not in ("base", asker.which):
                asker.load(which)
            is_base = which == "base"
            figures = run_tasks(asker, wanted, limit, base=is_base) if wanted else measure(asker, rows, base=is_base)
            measured.append({"weights": which if is_base or asker.has_ema else "trained", **figures})
    head = {"run": str(chosen.path)}
    if rows is not None:
        head |= {"data": rows.name, "rows": len(rows.rows), "tokens": rows.num_tokens}
    if as_json:
        print_json({**head, "results": measured})
    elif wanted:
        _print_tasks(measured)
    else:
        _print_losses(measured, rows)


def _read_tasks(tasks: str | None) -> list[str]:
    """Reads the names; refuses them before anything is loaded if nobody can run them."""
    if tasks is None:
        return []
    wanted = [one.strip() for one in tasks.split(",") if one.strip()]
    if not wanted:
        raise typer.BadParameter("--tasks names no task")
    import importlib.util

    if importlib.util.find_spec("lm_eval") is None:
        fix = 'pip install "forge-finetune[eval]"'
        raise MachineError("tasks need lm-eval, which is not installed", where="--tasks", fix=fix)
    return wanted


def _print_losses(measured: list[dict], rows) -> None:
    from forge_cli.redaction import printable

    header = ("weights", "loss", "perplexity", "exact match")[: 3 + bool(rows.questions)]
    lines = []
    for one in measured:
        cells = [_NAMES.get(one["weights"], one["weights"]), f"{one['loss']:.4f}", f"{one['perplexity']:.4g}"]
        if rows.questions:
            right = round(one["exact_match_ratio"] * len(rows.questions))
            cells.append(f"{right} of {len(rows.questions)} ({100 * one['exact_match_ratio']:.1f} %)")
        lines.append(tuple(cells))
    print_table(lines, header, right=(1, 2, 3))
    print(f"\nloss in nats per token; {rows.num_tokens} tokens in {len(rows.rows)} rows of {printable(rows.name)}")


def _print_tasks(measured: list[dict]) -> None:
    lines = [
        (_NAMES.get(one["weights"], one["weights"]), task, metric.partition(",")[0], f"{value:.4f}")
        for one in measured
        for task, figures in one["tasks"].items()
        for metric, value in figures.items()
        if isinstance(value, float)
    ]
    print_table(lines, ("weights", "task", "metric", "value"), right=(3,))


FUNCTIONS = {"eval": evaluate}
