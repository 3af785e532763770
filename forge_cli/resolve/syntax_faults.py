"""Syntax errors of PyYAML in plain words: where, what stands there, and what to write instead."""

from __future__ import annotations

import yaml

from forge_cli.errors import Problem
from forge_cli.resolve.wording import printable, shorten
from forge_cli.resolve.yaml_builder import LOADER

_SPACES_INSTEAD = "use spaces"
# Noticed behind the place that has to be mended: the * or &, the quote, the key.
_SAID_LATE = ("alphabetic or numeric", "unexpected end of stream", "could not find expected ':'")
_PLAIN = {
    "did not find expected ',' or ']'": ("a [ is not closed", "close it with ]; separate items with commas"),
    "did not find expected ',' or '}'": ("a { is not closed", "close it with }; separate settings with commas"),
    "found unexpected end of stream": ("a quote is not closed", "close it"),
    "found unknown escape character": (
        "an unknown escape in double quotes",
        "use single quotes, or double the backslash",
    ),
    "did not find expected key": ("this line does not fit the lines above", "indent it like its neighbours"),
    "did not find expected '-' indicator": ("a list and settings are mixed here", "indent items alike, each with a -"),
    "could not find expected ':'": ("a key without a colon", "write key: value"),
    "did not find expected alphabetic or numeric character": ("* and & start an alias or an anchor", ""),
}


def explain_syntax(error: yaml.YAMLError, text: str, file: str) -> Problem:
    """Turns a syntax error into a located problem.

    Args:
        error: What PyYAML raised.
        text: The text it was reading.
        file: Name of the file.

    Returns:
        The problem; ``where`` holds line and column when PyYAML knows them.
    """
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    said = getattr(error, "problem", None) or str(error).splitlines()[0]
    if mark is None:
        return Problem(file, "", f"not YAML: {printable(said)}")
    context = getattr(error, "context_mark", None)
    lines = text.splitlines() or [""]
    if context is not None:
        left_open = "expected ','" in said and _is_left_open(context.line, mark.line, lines)
        mark = context if left_open or any(words in said for words in _SAID_LATE) else mark
    if (runaway := _find_runaway(text, mark, lines)) is not None:
        return _explain_runaway(runaway, mark.line + 1, file)
    row = min(mark.line, len(lines) - 1)
    line = lines[row]
    column = mark.column if mark.line < len(lines) else len(line)
    what, fix = _explain(said, line, column)
    if context is not None and context.line != mark.line and "not closed" in what:
        what += f" (opened on line {context.line + 1}), or a comma is missing"
    return Problem(f"{file}:{row + 1}:{column + 1}", "", what, fix=fix)


def _is_left_open(opened: int, noticed: int, lines: list[str]) -> bool:
    """Tells whether a bracket was forgotten, rather than a comma inside it: its lines would be indented."""
    if noticed >= len(lines):
        return True
    return opened < noticed and _count_indent(lines[noticed]) <= _count_indent(lines[opened])


def _count_indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _find_runaway(text: str, mark: yaml.Mark, lines: list[str]) -> yaml.ScalarToken | None:
    """Finds the text that swallowed the line of a fault: a quote that ends too late, or a key without its colon."""
    last = None
    try:
        for token in yaml.scan(text, Loader=LOADER):
            if (token.start_mark.line, token.start_mark.column) >= (mark.line, mark.column):
                break
            if isinstance(token, yaml.ScalarToken) and token.start_mark.line < token.end_mark.line == mark.line:
                last = token
    except yaml.YAMLError:
        pass
    if last is None or last.style in ("|", ">"):
        return None
    # A plain value that goes on in the next line is right; the line after it is indented too deep.
    is_key = not lines[last.start_mark.line][: last.start_mark.column].strip()
    return last if is_key or not last.plain else None


def _explain_runaway(token: yaml.ScalarToken, end: int, file: str) -> Problem:
    where = f"{file}:{token.start_mark.line + 1}:{token.start_mark.column + 1}"
    if token.plain:
        return Problem(where, "", "a key without a colon", fix="write key: value")
    return Problem(where, "", f"a quote is not closed, or only on line {end}", fix="close it on its own line")


def _explain(said: str, line: str, column: int) -> tuple[str, str]:
    """Returns what is wrong and how to mend it, from PyYAML's words and the line they are about."""
    rest = line[column:]
    if "\t" in line[: len(line) - len(line.lstrip())] or rest.startswith("\t"):
        return "tabs are not allowed for indentation", _SPACES_INSTEAD
    if "cannot start any token" in said and rest:
        return f"a value cannot start with {rest[0]}", _quote(rest)
    if "mapping values are not allowed" in said:
        if ": " in line[:column].strip() or ":" in line[:column].rstrip().rstrip(":"):
            value = line.split(": ", 1)[-1]
            return "a second colon in one line", f"if it is part of the value, {_quote(value)}"
        return "this line is indented deeper than the value above allows", "indent it like its neighbours"
    for words, (what, fix) in _PLAIN.items():
        if words in said:
            return what, fix or _quote(rest)
    return f"not YAML: {printable(said)}", ""


def _quote(value: str) -> str:
    cleaned = value.split(" #")[0].strip().rstrip(",")
    while cleaned and any(
        cleaned[-1] == end and cleaned.count(start) < cleaned.count(end) for start, end in ("[]", "{}")
    ):
        cleaned = cleaned[:-1].rstrip()
    mark = "'" if "\\" in cleaned or '"' in cleaned else '"'
    return f"quote it: {mark}{shorten(cleaned)}{mark}" if cleaned else "quote it"
