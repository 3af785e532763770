"""``forge estimate``: the memory, time and cost of a run before it costs anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunFile = Annotated[Path | None, typer.Argument(metavar="[RUN_FILE]", help="Run file (YAML).", show_default=False)]
Model = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Alias, hub name or folder: a table of methods.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Set one value, as if in the run file.")
]
GpuName = Annotated[str | None, typer.Option("--gpu", metavar="NAME", help="A GPU that --fits lists.")]
Memory = Annotated[str | None, typer.Option("--memory", metavar="SIZE", help="A GPU with this much: 16GiB.")]
Sharding = Annotated[
    str | None, typer.Option("--sharding", metavar="HOW:RANKS", help="One rank of ddp:8, fsdp2:8, zero3:8:offload.")
]
Largest = Annotated[str | None, typer.Option("--max", metavar="WHAT", help="Largest batch, length or rank that fits.")]
Fits = Annotated[bool, typer.Option("--fits", help="Which GPUs of the table hold the run.")]
Sweep = Annotated[
    list[str] | None, typer.Option("--sweep", metavar="PATH=A,B", help="A table over values; may be given again.")
]
Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw the sweep, or memory over length (.png, .svg).")
]
Price = Annotated[str | None, typer.Option("--price", metavar="PER_HOUR", help="Price of the GPU, such as 2.50/h.")]
Tokens = Annotated[
    int | None, typer.Option("--tokens", metavar="N", min=1, help="Tokens of one epoch, for the duration.")
]
Data = Annotated[bool, typer.Option("--data", help="Read and tokenise the rows first, for the duration.")]
Trace = Annotated[bool, typer.Option("--trace", help="Trace the real model on the CPU beside the estimate.")]
Calibrate = Annotated[
    bool, typer.Option("--calibrate", help="Fit context and reserve of this GPU to the runs' reports.")
]
Explain = Annotated[bool, typer.Option("--explain", help="Each part's formula, with numbers and source.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def estimate(
    run_file: RunFile = None,
    model: Model = None,
    overrides: Overrides = None,
    gpu: GpuName = None,
    memory: Memory = None,
    sharding: Sharding = None,
    largest: Largest = None,
    fits: Fits = False,
    sweep: Sweep = None,
    plot: Plot = None,
    price: Price = None,
    tokens: Tokens = None,
    data: Data = False,
    trace: Trace = False,
    calibrate: Calibrate = False,
    explain: Explain = False,
    json: Json = False,
) -> None:
    """Predict the GPU memory, time and cost of a run, or of a model's methods."""
    from forge_cli.cli.estimate_options import check_options

    if run_file is None and model is None and not calibrate and Path("run.yaml").is_file():
        run_file = Path("run.yaml")
    check_options(
        {"RUN_FILE": run_file, "--model": model, "--set": overrides, "--gpu": gpu, "--memory": memory}
        | {"--sharding": sharding, "--max": largest, "--fits": fits, "--sweep": sweep, "--plot": plot, "--price": price}
        | {"--tokens": tokens, "--data": data, "--trace": trace, "--calibrate": calibrate, "--explain": explain}
        | {"--json": json}
    )
    from forge_cli.cli.plugin_search import skip_plugin_search

    skip_plugin_search()
    from forge_cli.cli import estimate_tasks as tasks

    if calibrate:
        tasks.calibrate(run_file or Path("runs"), json)
        return
    if (run_file is None) == (model is None):
        raise typer.BadParameter("give a run file or --model NAME (one of them)")
    question = tasks.Question(run_file, model, tuple(overrides or ()), gpu, memory, sharding, json, needs_rows=data)
    if largest is not None:
        tasks.answer_largest(question, largest)
    elif sweep or plot:
        tasks.answer_sweep(question, sweep or [], plot)
    elif fits:
        tasks.answer_fits(question)
    elif trace:
        tasks.answer_trace(question)
    elif model is not None and not explain and price is None and tokens is None:
        tasks.answer_methods(question)
    else:
        tasks.answer_run(question, price=price, tokens=tokens, data=data, explain=explain)


FUNCTIONS = {"estimate": estimate}
