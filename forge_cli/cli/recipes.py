"""``forge recipes``: complete run files to start from."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from forge_cli.cli.render import print_json, print_table
from forge_cli.cli.shelf import find_on_shelf, list_shelf
from forge_cli.errors import MachineError

FOLDER = "recipes"
SUFFIXES = (".yaml", ".py")


Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the recipe.")]


def list_recipes(json: Json = False) -> None:
    """List the recipes."""
    rows = [(name, summary, os.path.basename(path)) for name, summary, path in list_shelf(FOLDER, SUFFIXES)]
    if json:
        print_json([{"name": name, "summary": summary, "file": file} for name, summary, file in rows])
    else:
        print_table([(name, summary) for name, summary, _ in rows])


def show_recipe(name: Name, json: Json = False) -> None:
    """Print a recipe as it is."""
    path = find_on_shelf(FOLDER, name, SUFFIXES)
    with open(path, encoding="utf-8") as stream:
        text = stream.read()
    if json:
        print_json({"name": name, "file": os.path.basename(path), "text": text})
    else:
        print(text, end="")


def copy_recipe(
    name: Name,
    destination: Annotated[str, typer.Argument(metavar="DEST", help="File or folder to copy to.")] = ".",
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Copy a recipe, to make it your own."""
    import shutil

    path = find_on_shelf(FOLDER, name, SUFFIXES)
    target = os.path.join(destination, os.path.basename(path)) if os.path.isdir(destination) else destination
    if os.path.lexists(target) and not force:
        raise MachineError(
            "the file exists", where=target, why="it would be overwritten", fix="name another one, or add --force"
        )
    try:
        shutil.copyfile(path, target)
    except OSError as error:
        raise MachineError(f"the recipe cannot be written ({error.strerror})", where=target) from None
    print(target)


FUNCTIONS = {"list": list_recipes, "show": show_recipe, "copy": copy_recipe}
