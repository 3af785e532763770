"""``forge presets``: starting values, each with its reason and source."""

from __future__ import annotations

from typing import Annotated

import typer

from forge_cli.cli.render import print_json, print_table
from forge_cli.cli.shelf import find_on_shelf, list_shelf

FOLDER = "configs/presets"


Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def list_presets(json: Json = False) -> None:
    """List the presets."""
    rows = [(name, summary) for name, summary, _ in list_shelf(FOLDER)]
    if json:
        print_json([{"name": name, "summary": summary} for name, summary in rows])
    else:
        print_table(rows)


def show_preset(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the preset.")], json: Json = False
) -> None:
    """Show each value of a preset with its reason and its source."""
    from forge_cli.cli.preset_text import parse_preset, print_preset

    with open(find_on_shelf(FOLDER, name), encoding="utf-8") as stream:
        preset = parse_preset(stream.read())
    if json:
        print_json(preset)
    else:
        print_preset(preset)


FUNCTIONS = {"list": list_presets, "show": show_preset}
