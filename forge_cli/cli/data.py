"""``forge data``: look at the rows of a run before anything is trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from forge_cli.cli.render import print_json
from forge_cli.errors import DataError, MachineError

RunFile = Annotated[Path, typer.Argument(metavar="RUN_FILE", help="Run file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Set one value, as if in the run file.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def check(
    run_file: RunFile,
    overrides: Overrides = None,
    strict: Annotated[bool, typer.Option("--strict", help="Duplicates and notes are errors (exit 3).")] = False,
    json: Json = False,
) -> None:
    """Read, judge and tokenise all rows, and count what becomes of them."""
    from forge_cli.data.report_text import list_notes, render_report

    tokens, _ = _prepare(run_file, overrides)
    if json:
        print_json({**tokens.report.as_dict(), "notes": list_notes(tokens.report)})
    else:
        print(render_report(tokens.report, with_histogram=True))
    if strict and (notes := list_notes(tokens.report)):
        raise DataError(f"--strict: {len(notes)} notes", where=str(run_file), fix=notes[0].removeprefix("note: "))


def preview(
    run_file: RunFile,
    overrides: Overrides = None,
    row: Annotated[
        list[int] | None, typer.Option("--row", metavar="N", help="Number of a source row; may be given again.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page instead.")] = None,
    json: Json = False,
) -> None:
    """Show rows as they are trained: which text counts, and every special token."""
    from forge_cli.data import preview as previews

    tokens, tokenizer = _prepare(run_file, overrides)
    found = previews.read_trained_rows(tokens.folder, tokenizer, rows=row)
    rows = [(one, tokens.name_row(one.split, one.number)) for one in found]
    if not rows:
        raise DataError(
            f"no trained row has the number {', '.join(map(str, row))}",
            where=str(run_file),
            fix="rows are numbered as in their file, and on through the next; a row that was dropped or left out is "
            "not trained",
        )
    if json:
        print_json([previews.describe_row(*one) for one in rows])
    elif html:
        try:
            html.write_text(previews.render_html(rows, f"Rows of {run_file.name}"), encoding="utf-8")
        except OSError as error:
            raise MachineError(f"the page cannot be written: {error.strerror}", where=str(html)) from None
        print(html)
    else:
        colour = sys.stdout.isatty()
        print("\n\n".join(previews.render_terminal(*one, colour=colour) for one in rows))
        if not colour:
            print("\ntrained text stands between [[ and ]]; ⏎ is a line break")


def parity(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)],
    json: Json = False,
) -> None:
    """Compare the training text of a run with what its saved chat template writes, byte by byte."""
    plan = run / "plan.yaml"
    if not plan.is_file():
        raise MachineError("this folder is not a run: it has no plan.yaml", where=str(run))
    from forge_cli.resolve.plan import resolve_plan

    tokens, _ = _prepare(plan, None)
    from forge_cli.run.data_stage import compare_with_template

    result = compare_with_template(run, tokens, resolve_plan(plan).spec)
    if json:
        print_json(result)
    else:
        print(f"{result['equal']} of {result['compared']} conversations are equal byte by byte ({result['weights']})")
        for one in result["different"]:
            print(f"{one['place']}\n  trained  {one['trained']!r}\n  served   {one['served']!r}")
    if result["different"]:
        raise DataError(
            f"{result['compared'] - result['equal']} conversations are served in another form than they are trained",
            where=str(run),
            fix="serve with the chat template in the weights' folder",
        )


def _prepare(run_file: Path, overrides: list[str] | None):
    from forge_cli.resolve.plan import resolve_plan

    plan = resolve_plan(run_file, overrides or [])
    from forge_cli.run.data_stage import check_data, torch_hidden

    with torch_hidden():
        return check_data(plan.spec, lambda text: print(text, file=sys.stderr, flush=True))


FUNCTIONS = {"check": check, "preview": preview, "parity": parity}
