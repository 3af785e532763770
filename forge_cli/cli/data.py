"""``forge data``: look at the rows of a run before anything is trained."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from forge_cli.cli.render import print_json
from forge_cli.errors import DataError, MachineError
from forge_cli.units import count_of

MaybeRunFile = Annotated[
    Path, typer.Argument(metavar="[RUN_FILE]", help="Run file (YAML); default: run.yaml.", show_default=False)
]
DEFAULT_FILE = Path("run.yaml")
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Set one value, as if in the run file.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def check(
    run_file: MaybeRunFile = DEFAULT_FILE,
    overrides: Overrides = None,
    strict: Annotated[bool, typer.Option("--strict", help="Duplicates and notes are errors (exit 3).")] = False,
    json: Json = False,
) -> None:
    """Read, judge and tokenise all rows, and count what becomes of them."""
    from forge_cli.data.report_text import list_notes, render_report

    with _prepared(run_file, overrides) as (tokens, _, _):
        report, notes = tokens.report, list_notes(tokens.report)
    if json:
        print_json({**report.as_dict(), "notes": notes})
    else:
        print(render_report(report, with_histogram=True))
    if strict and notes:
        raise DataError(
            f"--strict: {count_of(len(notes), 'note', 'notes')}",
            where=str(run_file),
            fix=notes[0].removeprefix("note: "),
        )


def preview(
    run_file: MaybeRunFile = DEFAULT_FILE,
    overrides: Overrides = None,
    row: Annotated[
        list[int] | None,
        typer.Option("--row", metavar="N", min=1, help="A source row, counted from 1; may be given again."),
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page instead.")] = None,
    json: Json = False,
) -> None:
    """Show rows as they are trained: which text counts, and every special token."""
    if html and json:
        raise typer.BadParameter("--html writes a page and --json prints: give one of them")
    from forge_cli.data import preview as previews

    with _prepared(run_file, overrides) as (tokens, tokenizer, spec):
        rows = list(previews.read_trained_rows(tokens, spec.data, tokenizer, rows=row))
    if lacking := [str(one) for one in row or () if one not in {shown.row for shown in rows}]:
        what = f"row {', '.join(lacking)} is not trained: it is bad, or was dropped or left out"
        if not rows:
            raise DataError(what, where=str(run_file), fix="`forge data check` counts what becomes of rows")
        print(f"note: {what}", file=sys.stderr)
    if json:
        print_json([previews.describe_row(one) for one in rows])
    elif html:
        try:
            html.write_text(previews.render_html(rows, f"Rows of {run_file.name}"), encoding="utf-8")
        except OSError as error:
            raise MachineError(f"the page cannot be written: {error.strerror}", where=str(html)) from None
        print(html)
    else:
        colour = sys.stdout.isatty()
        print("\n\n".join(previews.render_terminal(one, colour=colour) for one in rows))
        if not colour:
            print("\ntrained text stands between [[ and ]]; ⏎ is a line break")


def parity(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.", show_default=False)],
    json: Json = False,
) -> None:
    """Compare the training text of a run with what its saved chat template writes, byte by byte."""
    plan = run / "plan.yaml"
    if not os.path.isfile(plan):  # false as well for a name that no file can have
        raise MachineError("this folder is not a run: it has no plan.yaml", where=str(run))
    with _prepared(plan) as (tokens, _, spec):
        from forge_cli.run.data_stage import compare_with_template

        result = compare_with_template(run, tokens, spec)
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


@contextlib.contextmanager
def _prepared(run_file: Path, overrides: list[str] | None = None) -> Iterator[tuple]:
    """Gives tokens, tokenizer and settings; while they are used, a hub that does not answer is not asked again."""
    from forge_cli.resolve.plan import resolve_plan

    spec = resolve_plan(run_file, overrides or []).spec
    from forge_cli.data.hub import hub_or_copies
    from forge_cli.run.data_stage import check_data, torch_hidden

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with torch_hidden(), hub_or_copies(spec, say):
        yield *check_data(spec, say), spec


FUNCTIONS = {"check": check, "preview": preview, "parity": parity}
