"""Renders docs/reference from the schema, the presets and the command line; tests/e2e/test_docs.py compares."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import typer
from pydantic_core import PydanticUndefined

from forge_cli.cli.app import app
from forge_cli.cli.preset_text import parse_preset
from forge_cli.cli.shelf import list_shelf
from forge_cli.errors import ForgeError, Stopped
from forge_cli.paths import data_root
from forge_cli.resolve.schema_tree import find_sections, is_on_by_default, is_optional, iterate_leaves
from forge_cli.resolve.value_words import describe_range, describe_type
from forge_cli.resolve.wording import show
from forge_cli.schema.data import Source
from forge_cli.schema.runspec import RunSpec

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

WIDTH = 120
GENERATED = "<!-- Generated; FORGE_UPDATE_GOLDEN=1 python -m pytest tests/e2e/test_docs.py writes it anew. -->"


def render_pages() -> dict[str, str]:
    """Renders every reference page: file name to Markdown."""
    return {"settings.md": render_settings(), "presets.md": render_presets(), "cli.md": render_commands()}


@cache
def list_all_commands() -> Mapping[str, Any]:
    """Returns every group and command by the words that call it, ``forge`` first."""

    def walk(words: str, command: Any) -> Iterator[tuple[str, Any]]:
        yield words, command
        if hasattr(command, "list_summaries"):
            for name, _ in command.list_summaries():
                yield from walk(f"{words} {name}", command.get_command(None, name))

    return MappingProxyType(dict(walk("forge", typer.main.get_command(app))))


def render_settings() -> str:
    """Renders every setting: what it allows, its default and what it does."""
    parts = [
        "# Settings of a run file",
        GENERATED,
        "Every key that a run file may hold. A setting's full name is `section.key`; so it is called in messages and "
        "by `--set section.key=value`. A preset or a recipe replaces the defaults given here: "
        "`forge config explain run.yaml SETTING` says who gave a value. `forge config schema` prints all this as JSON "
        "Schema for an editor.",
    ]
    sections = find_sections()
    parts.append("\n".join(_list_item(*_section_line(name)) for name in sections if name))
    for name, section in sections.items():
        parts.append(f"## {name}" if name else "## Top of the file")
        if name:
            parts.append(f"{_escape(_flatten(section.__doc__))} {_switch(name)}".rstrip())
        parts.append("\n".join(_setting_item(path, field) for path, field in iterate_leaves(name)))
        if name == "data":
            parts.append("### A source of rows")
            parts.append("What stands in `data.train` and `data.eval` where a path alone does not say enough.")
            parts.append("\n".join(_setting_item(key, field) for key, field in Source.model_fields.items()))
    return _join(part for part in parts if part)


def _section_line(name: str) -> tuple[str, str]:
    described = RunSpec.model_fields[name].description or _flatten(find_sections()[name].__doc__)
    return f"[`{name}`](#{name})", described


def _switch(section: str) -> str:
    if RunSpec.model_fields[section].is_required():
        return "Required."
    if not is_optional(section):
        return ""
    if is_on_by_default(section):
        return f"On by default; `{section}: null` switches it off."
    return f"Off by default; naming it, also as `{section}: {{}}`, switches it on, and `{section}: null` off again."


def _setting_item(path: str, field: FieldInfo) -> str:
    allowed = [describe_type(field.annotation), describe_range(field)]
    allowed += [f"matching `{item.pattern}`" for item in field.metadata if getattr(item, "pattern", None)]
    default = "required" if field.default is PydanticUndefined else f"default `{show(field.default)}`"
    return _list_item(f"`{path}` ({', '.join(part for part in allowed if part)}; {default})", field.description)


def render_presets() -> str:
    """Renders every value of every preset with its reason and its source."""
    shelf = list_shelf("configs/presets")
    parts = [
        "# Presets",
        GENERATED,
        "Starting values, named by `preset: NAME` at the top of a run file; the file and `--set` have the last word. "
        "What a preset does not name keeps the default of [the schema](settings.md). `forge presets show NAME` prints "
        "one of them.",
        "\n".join(_list_item(f"[`{name}`](#{name})", summary) for name, summary, _ in shelf),
    ]
    for name, summary, _ in shelf:
        preset = parse_preset((data_root() / "configs" / "presets" / f"{name}.yaml").read_text(encoding="utf-8"))
        parts += [f"## {name}", _escape(f"{summary}. {preset['about']}".strip())]
        parts.append("\n".join(_value_item(entry) for entry in preset["values"]))
    return _join(parts)


def _value_item(entry: dict[str, Any]) -> str:
    value = entry["value"] if isinstance(entry["value"], str) else show(entry["value"])
    source = f" Source: {entry['source']}" if entry["source"] else ""
    return _list_item(f"`{entry['path']}: {value}`", f"{entry['reason']}{source}")


def render_commands() -> str:
    """Renders every command with its arguments and options, and the exit codes."""
    commands = list_all_commands()
    parts = [
        "# Commands",
        GENERATED,
        "What `forge COMMAND --help` prints. Results go to stdout and everything else to stderr; with `--json`, stdout "
        "holds JSON only. `--debug`, in any place, adds the traceback of a failure. [Exit codes](#exit-codes) are the "
        "same for every command.",
    ]
    root = commands["forge"]
    parts.append(
        "\n".join(_list_item(f"[`forge {one}`](#forge-{one})", summary) for one, summary in root.list_summaries())
    )
    parts += [_render_command(words, command) for words, command in commands.items()]
    codes = [("0", "Done."), ("1", "An error that Forge did not foresee; please report it.")]
    codes += [
        (f"{one.exit_code}", _flatten(one.__doc__.partition("\n\n")[0]))
        for one in ForgeError.__subclasses__()
        if one is not Stopped
    ]
    codes.append(("128 + n", "Stopped by signal n: 130 by Ctrl-C, 143 by SIGTERM."))
    parts += ["## Exit codes", "\n".join(_list_item(f"`{code}`", meaning) for code, meaning in codes)]
    return _join(parts)


def _render_command(words: str, command: Any) -> str:
    context = typer.Context(command, info_name=words)
    parts = [f"## {words}", f"`{' '.join([words, *command.collect_usage_pieces(context)])}`"]
    parts += [_escape(_flatten(part)) for part in (command.help or "").split("\n\n")]
    records = [one.get_help_record(context) for one in command.get_params(context)]
    shown = [_list_item(f"`{names}`", text) for names, text in filter(None, records) if names != "--help"]
    if hasattr(command, "list_summaries") and words != "forge":
        anchor = words.replace(" ", "-")
        shown += [_list_item(f"[`{words} {one}`](#{anchor}-{one})", text) for one, text in command.list_summaries()]
    return _join([*parts, "\n".join(shown)]).rstrip("\n")


def _list_item(name: str, text: str | None) -> str:
    return _wrap(f"- {_escape(name)}: {_escape(_flatten(text))}", subsequent_indent="  ")


def _wrap(text: str, subsequent_indent: str = "") -> str:
    """Breaks a paragraph into lines, but never inside of code."""
    whole = re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", "\0"), text)
    lines = textwrap.wrap(
        whole, WIDTH, subsequent_indent=subsequent_indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines).replace("\0", " ")


def _flatten(text: str | None) -> str:
    return " ".join((text or "").replace("``", "`").split())


def _escape(text: str) -> str:
    """Keeps Markdown from reading stars and angle brackets outside of code as its own."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"[*]|<(?=[a-zA-Z/])", r"\\\g<0>", part) for part in parts[::2]]
    return "`".join(parts)


def _join(parts: Iterable[str]) -> str:
    """Joins the parts of a page; paragraphs are wrapped, what has lines of its own or is a heading is not."""
    kept = [part if part.startswith(("#", "- ", "<", "`")) or "\n" in part else _wrap(part) for part in parts if part]
    return "\n\n".join(kept) + "\n"
