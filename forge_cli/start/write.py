"""The run file that ``forge init`` writes: a comment with the reason above every key."""

from __future__ import annotations

import json
import os
import re
import tempfile
import textwrap
from collections.abc import Iterable
from pathlib import Path

from forge_cli.errors import ConfigError, MachineError
from forge_cli.redaction import printable
from forge_cli.resolve.plan import Plan, resolve_plan
from forge_cli.run.folder import write_atomic
from forge_cli.start.propose import Setting

SCHEMA_FILE = "forge.schema.json"
SCHEMA_LINE = f"# yaml-language-server: $schema=./{SCHEMA_FILE}"
_COLUMNS = 88
_PLAIN = re.compile(r"[A-Za-z_][\w./:-]*[\w/]")
# Words that YAML takes for something else.
_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "none", "y", "n"}


def render_run_file(settings: Iterable[Setting], head: Iterable[str]) -> str:
    """Writes settings as a run file.

    Args:
        settings: Those of one section stand together.
        head: Comment lines for the top, below the line for editors.
    """
    lines = [SCHEMA_LINE, *(one for text in head for one in _comment(text, ""))]
    section = ""
    for path, value, reason in settings:
        owner, _, name = path.rpartition(".")
        if owner != section:
            lines += [f"{owner}:"] if owner else []
            section = owner
        indent = "  " if owner else ""
        lines += [*_comment(reason, indent), f"{indent}{name}: {write_value(value)}"]
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str) -> list[str]:
    mark = f"{indent}# "
    return textwrap.wrap(printable(text), _COLUMNS, initial_indent=mark, subsequent_indent=mark)


def write_value(value: object) -> str:
    """Writes a text or number so that YAML reads the same back."""
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.casefold() not in _WORDS and ": " not in value:
        return value
    return json.dumps(value, ensure_ascii=False)


def check_free(output: Path, *, force: bool) -> None:
    """Refuses to write over a file, or into a folder that is not there.

    Raises:
        ConfigError: It exists and ``force`` is not given; or the schema's name is taken by something else.
        MachineError: The folder does not exist.
    """
    if not output.parent.is_dir():
        raise MachineError("the folder does not exist", where=str(output.parent), fix="make it first, with mkdir -p")
    if output.is_dir():
        raise ConfigError("--output is a folder", where=str(output), fix=f"write --output {output / 'run.yaml'}")
    schema = output.with_name(SCHEMA_FILE)
    for path in (output, schema) if not force else ():
        if os.path.lexists(path) and not (path is schema and _is_schema(path)):
            raise ConfigError(
                "the file exists and would be overwritten",
                where=str(path),
                fix="write another one with --output NAME.yaml, or add --force",
            )


def _is_schema(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("title") == "Forge run file"
    except (OSError, ValueError, AttributeError):
        return False


def write_run_file(output: Path, text: str, schema: dict) -> Plan:
    """Resolves the run file, then writes it and the schema beside it.

    Args:
        output: The run file.
        text: Its content.
        schema: JSON Schema of run files.

    Returns:
        The plan that the text resolves to.

    Raises:
        ConfigError: The text is no run file that holds.
        MachineError: It cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="forge-init-") as folder:
        draft = Path(folder) / output.name
        draft.write_text(text, encoding="utf-8")
        plan = resolve_plan(draft)
    try:
        write_atomic(output.with_name(SCHEMA_FILE), json.dumps(schema, indent=2, ensure_ascii=False) + "\n")
        write_atomic(output, text)
    except OSError as error:
        raise MachineError(f"the file cannot be written: {error.strerror}", where=str(output)) from None
    return plan
