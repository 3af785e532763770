"""``forge estimate``: the memory, time and cost of a run before it costs anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunFile = Annotated[Path | None, typer.Argument(metavar="[RUN_FILE]", help="Run file (YAML).", show_default=False)]


def estimate(
    run_file: RunFile = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="Alias, hub name or folder: a table of methods.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Set one value, as if in the run file.")
    ] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", metavar="NAME", help="A GPU that --fits lists.")] = None,
    memory: Annotated[str | None, typer.Option("--memory", metavar="SIZE", help="A GPU with this much: 16GiB.")] = None,
    sharding: Annotated[
        str | None, typer.Option("--sharding", metavar="HOW:RANKS", help="One rank of ddp:8, fsdp2:8, zero3:8:offload.")
    ] = None,
    largest: Annotated[
        str | None, typer.Option("--max", metavar="WHAT", help="Largest batch, length or rank that fits.")
    ] = None,
    fits: Annotated[bool, typer.Option("--fits", help="Which GPUs of the table hold the run.")] = False,
    sweep: Annotated[
        list[str] | None, typer.Option("--sweep", metavar="PATH=A,B", help="A table over values; may be given again.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the sweep, or memory over length (.png, .svg).")
    ] = None,
    price: Annotated[
        str | None, typer.Option("--price", metavar="PER_HOUR", help="Price of the GPU, such as 2.50/h.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", metavar="N", min=1, help="Tokens of one epoch, for the duration.")
    ] = None,
    data: Annotated[bool, typer.Option("--data", help="Read and tokenise the rows first, for the duration.")] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="Trace the real model on the CPU beside the estimate.")
    ] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Fit context and reserve of this GPU to the runs' reports.")
    ] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Each part's formula, with numbers and source.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict the GPU memory, time and cost of a run, or of a model's methods."""
    from forge_cli.cli import estimate_tasks as tasks

    if calibrate:
        tasks.calibrate(run_file or Path("runs"), json)
        return
    if (run_file is None) == (model is None):
        raise typer.BadParameter("give a run file or --model NAME (one of them)")
    question = tasks.Question(run_file, model, tuple(overrides or ()), gpu, memory, sharding, json)
    if largest is not None:
        tasks.answer_largest(question, largest)
    elif sweep or plot:
        tasks.answer_sweep(question, sweep or [], plot)
    elif fits:
        tasks.answer_fits(question)
    elif trace:
        tasks.answer_trace(question)
    elif model is not None and not explain:
        tasks.answer_methods(question)
    else:
        tasks.answer_run(question, price=price, tokens=tokens, data=data, explain=explain)


FUNCTIONS = {"estimate": estimate}
