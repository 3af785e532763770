"""``forge report``: the page of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from forge_cli.cli.render import print_json

RunFolder = Annotated[
    Path | None, typer.Argument(metavar="[RUN]", help="Run folder or its name; the newest run if left out.")
]


def report(
    run: RunFolder = None,
    is_open: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write RUN/report.html, also of a run that has not ended, and print its path."""
    from forge_cli.redaction import printable
    from forge_cli.results.compare import read_result, write_run_page
    from forge_cli.results.find import choose_run

    result = read_result(choose_run(run))
    page = write_run_page(result)
    if json:
        steps = result.report.get("steps")
        print_json({"page": str(page), "state": result.state, "steps": steps, "verdict": result.lines})
    else:
        print(printable(str(page)))
        for line in result.lines if result.state != "finished" else ():
            print(f"note: {printable(line)}", file=sys.stderr)
    if is_open:
        import webbrowser

        if not webbrowser.open(page.resolve().as_uri()):
            print("note: there is no browser here; copy the file to where there is one", file=sys.stderr)


FUNCTIONS = {"report": report}
