"""``forge init``: look at rows and GPU, and write a run file that fits."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help="Alias, hub name or folder of the model.", show_default=False),
]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="FILE", help="Rows: a file, a glob, hf://NAME or forge:NAME.", show_default=False),
]
Preset = Annotated[
    str | None, typer.Option("--preset", metavar="NAME", help="Preset to take; default: what fits.", show_default=False)
]
Output = Annotated[Path, typer.Option("--output", metavar="FILE", help="Run file to write.")]
Gpu = Annotated[
    str | None,
    typer.Option(
        "--gpu", metavar="NAME", help="GPU to fit, or 24GiB, or cpu; default: the one here.", show_default=False
    ),
]
Yes = Annotated[bool, typer.Option("--yes", help="Ask nothing; take what is proposed.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an existing run file.")]


def init(
    model: Model = None,
    data: Data = None,
    preset: Preset = None,
    output: Output = Path("run.yaml"),
    gpu: Gpu = None,
    yes: Yes = False,
    json: Json = False,
    force: Force = False,
) -> None:
    """Write a run file for your rows and your GPU, every value with its reason."""
    from forge_cli.cli.plugin_search import skip_plugin_search

    skip_plugin_search()
    from forge_cli.start.write import check_free

    check_free(output, force=force)
    if preset is not None:
        from forge_cli.cli.shelf import find_on_shelf

        find_on_shelf("configs/presets", preset)
    asks = sys.stdin.isatty() and sys.stderr.isatty() and not (yes or json)
    if not (asks or yes):
        _need(model, data)
    from forge_cli.start.look import QUICKSTART, look_at_rows, look_at_target, measure_rows
    from forge_cli.start.propose import choose_model, propose

    target = look_at_target(gpu)
    _say_target(target)
    rows = look_at_rows(data or QUICKSTART, preset) if data or not asks else _ask_rows(preset)
    _say(f"rows     {rows.count:,} of {rows.path}, format {rows.scan.kind}")
    model = model or (_ask_model(target, rows.path) if asks else choose_model(target, rows.path))
    lengths = measure_rows(rows, model)
    proposal = propose(rows, lengths, model, target, preset)
    if not json:
        _show(proposal, output)
    if asks and not typer.confirm(f"Write {output}?", default=True, err=True):
        _say("nothing was written")
        raise typer.Exit(0)
    _write(proposal, output, target)
    if json:
        _print_json(proposal, output, target)
        return
    print(f"wrote {output} and forge.schema.json beside it, which lets editors complete and check it\n")
    name = "" if output == Path("run.yaml") else f" {shlex.quote(str(output))}"
    print("next:")
    print(f"  {f'forge train{name}':<28}  train it")
    print(f"  {'forge chat':<28}  talk to it")


def _need(model: str | None, data: str | None) -> None:
    """Refuses to guess where nobody can be asked.

    Raises:
        ConfigError: Names each flag that is missing.
    """
    from forge_cli.errors import ConfigError, Problem

    missing = [
        Problem("--model", "", "the model is not named, and there is no terminal to ask in", "", "--model forge-tiny"),
        Problem("--data", "", "the rows are not named, and there is no terminal to ask in", "", "--data rows.jsonl"),
    ]
    if problems := [
        Problem(one.where, "", one.what, "", f"add {one.fix}, or --yes to take what is proposed")
        for one, value in zip(missing, (model, data), strict=True)
        if value is None
    ]:
        raise ConfigError.from_problems(problems)


def _say(line: str) -> None:
    from forge_cli.redaction import printable

    print(printable(line), file=sys.stderr, flush=True)


def _say_target(target) -> None:
    from forge_cli.units import format_bytes

    usable = format_bytes(target.device.usable_bytes)
    _say(
        f"GPU      {target.device.name}, {usable} usable"
        if target.is_gpu
        else f"GPU      none; the CPU has {usable} of memory to use"
    )


def _ask_rows(preset: str | None):
    """Asks for rows until some can be read."""
    from forge_cli.errors import ForgeError
    from forge_cli.start.look import QUICKSTART, look_at_rows

    _say("")
    _say("Which rows? A file of chats, instructions, pairs or text (.jsonl, .csv, ...).")
    found = sorted(one for kind in ("*.jsonl", "*.csv", "*.parquet") for one in Path().glob(kind))
    proposed = str(found[0]) if len(found) == 1 else QUICKSTART
    what = "the one here" if found and proposed != QUICKSTART else "280 rows that ship with Forge"
    _say(f"Enter alone takes {proposed}: {what}.")
    while True:
        try:
            return look_at_rows(_prompt("Rows", proposed), preset)
        except ForgeError as error:
            _say_problems(error)


def _prompt(what: str, proposed: str) -> str:
    try:
        return typer.prompt(what, default=proposed, err=True).strip()
    except typer.Abort:
        _say("")  # the terminal has written ^C, and what follows has a line of its own
        raise


def _say_problems(error) -> None:
    for problem in error.problems[:3]:
        _say(f"  {problem.describe()}")
        if problem.fix:
            _say(f"    fix: {problem.fix}")


def _ask_model(target, data: str) -> str:
    """Asks for the model: a number of the list, or any name."""
    from forge_cli.errors import ForgeError
    from forge_cli.facts.model_facts import EMBEDDED_MODEL, find_model_facts
    from forge_cli.start.propose import choose_model, list_fitting_models
    from forge_cli.units import format_count

    proposed, fitting = choose_model(target, data), list_fitting_models(target)
    _say("")
    _say(f"Which model? These fit {target.device.name}; any alias, hub name or folder will do.")
    for number, (name, facts, preset) in enumerate(fitting, 1):
        why = "embedded, for a first try" if name == EMBEDDED_MODEL else preset
        _say(f"  {number}  {name:<36}  {format_count(facts.num_parameters or 0):>6}  {why}")
    names = [name for name, _, _ in fitting]
    while True:
        answer = _prompt("Model", proposed)
        name = names[int(answer) - 1] if answer.isdecimal() and 0 < int(answer) <= len(names) else answer
        try:
            find_model_facts(name)
            return name
        except ForgeError as error:
            _say_problems(error)


def _show(proposal, output: Path) -> None:
    """Shows what was chosen and why, before it is written."""
    import shutil
    import textwrap
    from itertools import zip_longest

    from forge_cli.redaction import printable
    from forge_cli.start.propose import describe_duration
    from forge_cli.start.write import write_value

    width = min(shutil.get_terminal_size().columns, 110)
    column = 44
    _say("")
    for path, value, reason in proposal.settings:
        key = f"{path}: {write_value(value)}"
        lines = textwrap.wrap(printable(reason), width - column) if len(key) < column else []
        for left, right in zip_longest([key], lines or [""], fillvalue=""):
            _say(f"{left:<{column}}{right}".rstrip())
        for line in textwrap.wrap(reason, width - 4) if not lines else ():
            _say(f"    {line}")
    _say("")
    if proposal.seconds is not None:
        _say(f"expected duration: {describe_duration(proposal.seconds)}")
    for note in proposal.notes:
        for line in textwrap.wrap(f"note: {note}", width, subsequent_indent="      "):
            _say(line)


def _write(proposal, output: Path, target) -> None:
    from forge_cli.cli.json_schema import build_json_schema
    from forge_cli.start.propose import describe_duration
    from forge_cli.start.write import render_run_file, write_run_file

    time = f", {describe_duration(proposal.seconds)} of training" if proposal.seconds is not None else ""
    head = [
        f"Written by forge init for {target.device.name}{time}. Change what you like:",
        "`forge config schema` lists all settings, `forge presets show NAME` what a preset holds and why.",
        *(f"Note: {note}." for note in proposal.notes),
    ]
    write_run_file(output, render_run_file(proposal.settings, head), build_json_schema())


def _print_json(proposal, output: Path, target) -> None:
    from forge_cli.cli.render import print_json

    budget = proposal.budget
    print_json(
        {
            "file": str(output),
            "fits": None if budget is None else proposal.fits,
            "device": target.device.name,
            "usable_bytes": target.device.usable_bytes,
            "needed_bytes": budget and budget.needed_bytes,
            "expected_seconds": proposal.seconds,
            "settings": [one._asdict() for one in proposal.settings],
            "notes": list(proposal.notes),
        }
    )


FUNCTIONS = {"init": init}
