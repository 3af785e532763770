"""``forge migrate``: a training file of another tool becomes a run file, with an account of every key."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from forge_cli.start.migrate import Migration


class Tool(StrEnum):
    """Tools whose files can be carried over."""

    AXOLOTL = "axolotl"
    LLAMA_FACTORY = "llama-factory"
    TRL = "trl"
    TORCHTUNE = "torchtune"


class Method(StrEnum):
    """Commands of TRL."""

    SFT = "sft"
    DPO = "dpo"
    KTO = "kto"
    ORPO = "orpo"
    CPO = "cpo"
    SIMPO = "simpo"
    REWARD = "reward"


def migrate(
    file: Annotated[Path, typer.Argument(metavar="OTHER.yaml", help="File of the other tool.", show_default=False)],
    tool: Annotated[Tool | None, typer.Option("--from", help="The tool it is for; told by its keys.")] = None,
    method: Annotated[Method | None, typer.Option("--method", help="TRL only: the command it is for.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Run file to write.")] = Path("run.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace the run file if it is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the account as JSON.")] = False,
) -> None:
    """Turn a file of Axolotl, LLaMA-Factory, TRL or torchtune into a run file; say what became of each key."""
    from forge_cli.cli.plugin_search import skip_plugin_search

    skip_plugin_search()
    from forge_cli.errors import ConfigError
    from forge_cli.run.folder import write_atomic
    from forge_cli.start.migrate import migrate as migrate_file

    _refuse_output(file, output, force)
    found = migrate_file(file, tool and tool.value, method and method.value)
    if not found.problems:
        try:
            write_atomic(output, found.text)
        except OSError as error:
            raise ConfigError(f"cannot be written: {error.strerror}", where=str(output), fix="write --output") from None
    _print_json(found, output) if as_json else _print_text(found, file, output)
    if found.problems:
        if as_json:
            raise typer.Exit(2)
        raise ConfigError.from_problems(found.problems)


def _refuse_output(file: Path, output: Path, force: bool) -> None:
    """Refuses to write over a file, and over the source in any case."""
    from forge_cli.errors import ConfigError

    try:
        if output.exists() and file.exists() and output.samefile(file):
            raise ConfigError("this is the file that is read", where=str(output), fix="write another --output")
        if output.is_dir() or (output.exists() and not force):
            what = "this is a folder" if output.is_dir() else "the file is there already"
            fix = "write --force to replace it, or another --output" if output.is_file() else "write another --output"
            raise ConfigError(what, where=str(output), fix=fix)
    except (OSError, ValueError):
        raise ConfigError("this is no file name", where="--output", fix="write another --output") from None


def _print_text(found: Migration, file: Path, output: Path) -> None:
    """Prints the account; what a terminal should not get from a file is escaped."""
    from forge_cli.redaction import printable
    from forge_cli.start.migrate_draft import CARRIED, KINDS

    counts = {kind: [one for one in found.lines if one.kind == kind] for kind in KINDS}
    print(printable(f"{file.name} is a file of {found.tool} (told by {found.told_by})"))
    if not found.problems:
        print(printable(f"wrote {output}: {_count(len(counts[CARRIED]))} of {len(found.lines)} carried"))
    for kind in KINDS[1:]:
        if counts[kind]:
            print(f"\n{kind}: {_count(len(counts[kind]))}")
            for one in counts[kind]:
                _print_line(one.key, one.text)
    if found.notes:
        print("\nmeans something else here, or was not said there:")
        for one in found.notes:
            _print_line(one.key, one.text)
    for warning in found.warnings:
        print(printable(f"warning: {warning}"), file=sys.stderr)
    if not found.problems:
        print()
        print(printable(f"next: forge data check {output}"))


def _count(number: int) -> str:
    return f"{number} {'key' if number == 1 else 'keys'}"


def _print_line(key: str, text: str) -> None:
    """Prints one key and its reason, wrapped to the terminal's width behind the key."""
    import shutil
    import textwrap

    from forge_cli.redaction import printable

    width = max(60, min(shutil.get_terminal_size((100, 20)).columns, 120))
    print(
        textwrap.fill(
            printable(f"{key}: {text}"), width, initial_indent="  ", subsequent_indent="      ", break_on_hyphens=False
        )
    )


def _print_json(found: Migration, output: Path) -> None:
    from forge_cli.cli.render import print_json

    entries = [[one._asdict() for one in lines] for lines in (found.lines, found.notes)]
    problems = [{"where": one.where, "path": one.path, "what": one.what, "fix": one.fix} for one in found.problems]
    print_json(
        {
            "tool": found.tool,
            "told_by": found.told_by,
            "output": None if problems else str(output),
            "keys": entries[0],
            "differences": entries[1],
            "warnings": list(found.warnings),
            "problems": problems,
            "run_file": found.text,
        }
    )


FUNCTIONS = {"migrate": migrate}
