"""Plain text and JSON for the terminal."""

from __future__ import annotations

import sys
from typing import Any


def print_table(
    rows: list[tuple[str, ...]], header: tuple[str, ...] | None = None, right: tuple[int, ...] = ()
) -> None:
    """Prints rows in aligned columns, two spaces apart.

    Args:
        rows: Cells, as text.
        header: Column titles; none are printed without it.
        right: Columns set flush right (numbers).
    """
    lines = [*([header] if header else []), *rows]
    if not lines:
        return
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def print_json(value: Any) -> None:
    """Prints a value as indented JSON."""
    import json

    print(json.dumps(value, indent=2, ensure_ascii=False))


def note(text: str) -> None:
    """Writes a line that is no result."""
    from forge_cli.redaction import printable_lines

    print(printable_lines(text), file=sys.stderr, flush=True)
