"""Commands that are built when they are called: reading a function's signature costs a millisecond or two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

Function = Callable[..., None]


def build_command(name: str, function: Function) -> Any:
    """Builds the command of one function, with its docstring as help."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name)(function)
    return typer.main.get_command(app)


class LazyGroup(TyperGroup):
    """A group of functions; a command is built when it is called.

    Args:
        functions: Command name to function. The first line of its docstring is its summary.
        attributes: What Typer's own group takes.
    """

    def __init__(self, functions: dict[str, Function] | None = None, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.functions = functions or {}
        self.commands = dict.fromkeys(self.functions)  # the names serve "did you mean"

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Builds one command; None if there is none of that name."""
        function = self.functions.get(cmd_name)
        return build_command(cmd_name, function) if function else None

    def list_summaries(self) -> list[tuple[str, str]]:
        """Lists names and summaries."""
        return [(name, (function.__doc__ or "").partition("\n")[0]) for name, function in self.functions.items()]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes the summaries without building the commands."""
        with formatter.section("Commands"):
            formatter.write_dl(self.list_summaries())


def build_group(name: str, summary: str, functions: dict[str, Function]) -> LazyGroup:
    """Builds a group of commands."""
    return LazyGroup(functions, name=name, help=summary, no_args_is_help=True, rich_markup_mode=None)
