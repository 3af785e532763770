"""``forge runs``: what runs there are, what each has to show, and how they differ."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forge_cli.cli.render import print_json, print_table
from forge_cli.cli.report import RunFolder
from forge_cli.units import format_bytes, format_duration

if TYPE_CHECKING:
    from forge_cli.results.compare import Result

_NEWEST = 20
_MOST_CHARACTERS = 24
_MOST_CHARACTERS_OF_VALUES = 40

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def list_runs(
    everything: Annotated[bool, typer.Option("--all", help=f"List more than the {_NEWEST} newest.")] = False,
    json: Json = False,
) -> None:
    """List runs, the newest first: held-out loss, time and state."""
    from forge_cli.results.compare import read_result
    from forge_cli.results.find import list_runs as find_runs

    runs = find_runs()
    shown = runs if everything else runs[:_NEWEST]
    entries = [_describe(read_result(run)) for run in shown]
    if json:
        print_json(entries)
    elif entries:
        print_table(
            [_write_row(one) for one in entries],
            ("run", "method", "model", "steps", "held-out loss", "time", "UTC", "state"),
            right=(3, 5),
        )
    else:
        print("no runs here; start one: forge train run.yaml", file=sys.stderr)
    if len(runs) > len(shown):
        print(f"note: {len(runs) - len(shown)} older runs are left out; --all lists them", file=sys.stderr)


def show_run(run: RunFolder = None, json: Json = False) -> None:
    """Show a run: how it went, its files and checkpoints, and what to type next."""
    from forge_cli.redaction import printable
    from forge_cli.results.compare import read_result
    from forge_cli.results.find import choose_run

    result = read_result(choose_run(run))
    files = [(one.name + "/" * one.is_dir(), _size(one)) for one in _list_files(result.run.path)]
    checkpoints = _list_checkpoints(result)
    if json:
        sizes = [{"name": name, "bytes": size} for name, size in files]
        said = {"verdict": result.lines, "figures": result.figures, "next": result.commands}
        print_json({**_describe(result), **said, "files": sizes, "checkpoints": checkpoints})
        return
    entry = _describe(result)
    head = " · ".join(printable(str(one)) for one in (entry["method"], entry["model"], entry["state"]) if one)
    print(f"{printable(str(result.run.path))}  {head}", *map(printable, result.lines), "", sep="\n")
    print_table([(f"  {printable(name)}", format_bytes(size)) for name, size in files], right=(1,))
    if checkpoints:
        print("\ncheckpoints (names and sizes compared; `forge verify` reads them)")
        print_table([(f"  step {one['step']}", printable(one["reason"] or "whole")) for one in checkpoints])
    print("", "next", *(f"  {printable(line)}" for line in result.commands), sep="\n")


def compare_runs(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Run folders or names, two or more.")],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Page to write; default: beside the first run.")
    ] = None,
    json: Json = False,
) -> None:
    """Show which settings and figures of runs differ, and write a page with their curves."""
    if len(runs) < 2:
        raise typer.BadParameter("name two runs or more, as in `forge runs compare A B`")
    from forge_cli.redaction import printable
    from forge_cli.results import compare
    from forge_cli.results.find import choose_run

    results = compare.name_results([compare.read_result(choose_run(run)) for run in runs])
    found = list(results.values())
    default = f"compare-{'-'.join(one.run.path.name for one in found)}"[:100] + ".html"
    page = compare.write_comparison_page(results, output or found[0].run.path.parent / default)
    differences, figures = compare.list_differences(found), compare.list_figures(found)
    if json:
        settings = [{"path": path, "values": dict(zip(results, rest, strict=True))} for path, *rest in differences]
        measured = {name: one.figures for name, one in results.items()}
        print_json({"page": str(page), "settings": settings, "figures": measured})
        return
    names = tuple(_shorten(name, _MOST_CHARACTERS_OF_VALUES) for name in results)
    if differences:
        rows = [tuple(_shorten(cell, _MOST_CHARACTERS_OF_VALUES) for cell in row) for row in differences]
        print_table(rows, ("settings that differ", *names))
    else:
        print("no setting differs")
    print()
    print_table([tuple(row) for row in figures], ("figures", *names), right=tuple(range(1, len(names) + 1)))
    print(f"\npage  {printable(str(page))}")


def _describe(result: Result) -> dict[str, object]:
    """Says what a list says of a run; ``eval_after`` is of the weights that are to be used."""
    method, figures = result.report.get("method") or {}, result.figures
    averaged = figures["held-out loss after, EMA"]
    return {
        "name": result.run.path.name,
        "path": str(result.run.path),
        "method": method.get("name"),
        "model": method.get("model"),
        "steps": result.report.get("steps"),
        "eval_before": figures["held-out loss before"],
        "eval_after": figures["held-out loss after"] if averaged is None else averaged,
        "seconds": figures["training time"],
        "created": result.report["created"],
        "state": result.state,
    }


def _write_row(entry: dict) -> tuple[str, ...]:
    before, after = (None if entry[key] is None else f"{entry[key]:.3f}" for key in ("eval_before", "eval_after"))
    return (
        _shorten(entry["name"]),
        entry["method"] or "",
        _shorten((entry["model"] or "").rstrip("/").rpartition("/")[2]),
        str(entry["steps"]),
        f"{before} -> {after}" if before else "",
        format_duration(entry["seconds"]),
        entry["created"][5:16].replace("T", " "),
        entry["state"].partition(" ")[0],
    )


def _shorten(text: str, most: int = _MOST_CHARACTERS) -> str:
    from forge_cli.redaction import printable

    shown = printable(text)
    return shown if len(shown) <= most else shown[: most - 3] + "..."


def _list_files(folder: Path) -> list[Path]:
    return sorted((one for one in folder.iterdir() if not one.name.startswith(".")), key=lambda one: one.name)


def _size(path: Path) -> int:
    """Adds up a file or folder, in bytes; what goes away meanwhile counts as nothing."""
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    total = 0
    for file in files:
        try:
            total += file.lstat().st_size
        except OSError:
            continue
    return total


def _list_checkpoints(result: Result) -> list[dict[str, object]]:
    """Lists checkpoints, the newest first, with what is wrong with each; nothing is hashed."""
    from forge_cli.checkpoints.store import CheckpointStore, verify

    run_id = str(result.run.facts.get("run_id", ""))
    found = [
        verify(path, run_id, hashes=False)
        for path in CheckpointStore(result.run.path / "checkpoints", run_id).list_paths()
    ]
    return [{"step": one.step, "path": str(one.path), "reason": getattr(one, "reason", None)} for one in found]


FUNCTIONS = {"list": list_runs, "show": show_run, "compare": compare_runs}
