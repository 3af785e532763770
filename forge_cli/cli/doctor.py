"""``forge doctor``: whether a run can train on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder that runs are written to.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def doctor(runs: Runs = Path("runs"), json: Json = False) -> None:
    """Check Python, torch, GPU, disk and versions; exit 5 if a run cannot train here."""
    from forge_cli.start.doctor import PROBLEM, examine

    checks = []
    for check in examine(runs):
        checks.append(check)
        if not json:
            _print_check(check)
    num_problems = sum(check.status == PROBLEM for check in checks)
    if json:
        from forge_cli.cli.render import print_json

        print_json({"can_train": not num_problems, "checks": [check._asdict() for check in checks]})
    else:
        from forge_cli.units import count_of

        many = count_of(num_problems, "problem", "problems")
        print(f"\n{f'{many} to mend before a run can train here' if num_problems else 'a run can train here'}")
    if num_problems:
        raise typer.Exit(5)


def _print_check(check) -> None:
    """Prints one line as soon as it is known, with the command that mends a problem below it."""
    import shutil
    import textwrap

    column = 26
    width = max(60, min(shutil.get_terminal_size().columns, 110)) - column
    lines = textwrap.wrap(check.text, width) or [""]
    lines += textwrap.wrap(f"fix: {check.fix}", width, subsequent_indent="     ") if check.fix else []
    print(f"{check.name:<16}{check.status:<10}{lines[0]}", flush=True)
    for line in lines[1:]:
        print(f"{'':<{column}}{line}", flush=True)


FUNCTIONS = {"doctor": doctor}
