"""``forge average``: one set of weights out of the newest checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forge_cli.cli.chat import RunFolder
from forge_cli.cli.render import note, print_json


def average(
    run: RunFolder = None,
    last: Annotated[int, typer.Option("--last", metavar="N", min=2, help="How many of the newest checkpoints.")] = 3,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Folder to write.", show_default="RUN/KIND-average")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Average the newest checkpoints of a run, and compare the average with the last of them."""
    from forge_cli.results.find import choose_run
    from forge_cli.results.session import working_on

    chosen = choose_run(run, with_weights=True)
    with working_on(chosen):
        from forge_cli.results.average import average_run

        result = average_run(chosen, last, output, note)
    print_json(result) if as_json else print("\n".join(describe_average(result)))


def describe_average(result: dict) -> list[str]:
    """Writes what was averaged and what that did, for people."""
    lines = [f"{result['folder']}: the mean of steps {', '.join(str(one) for one in reversed(result['steps']))}"]
    if losses := result["losses"]:
        last, mean = losses["last"], losses["average"]
        better = "the average is better" if mean < last else "the last checkpoint is better"
        if abs(mean - last) < 5e-5:
            better = "no difference"
        lines.append(f"  held-out loss  {last:.4f} of the last checkpoint, {mean:.4f} of the average: {better}")
    return lines


FUNCTIONS = {"average": average}
