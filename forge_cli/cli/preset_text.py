"""Reads a preset as people do: every value together with the comment above it."""

from __future__ import annotations

from typing import Any

_SOURCE = "Source:"


def parse_preset(text: str) -> dict[str, Any]:
    """Reads summary, notes and commented values of a preset file.

    Args:
        text: The file: a comment that starts with the summary, then nested mappings whose values each have a comment
            above them that ends in a ``Source:`` line.

    Returns:
        ``summary``, ``about`` (the rest of the leading comment) and ``values``, a list of ``path``, ``value`` (as
        YAML reads it), ``reason`` and ``source``.
    """
    import yaml

    lines = text.splitlines()
    about = []
    while lines and lines[0].startswith("#"):
        about.append(lines.pop(0).lstrip("#").strip())
    values, comment, parents = [], [], []
    for line in lines:
        content = line.strip()
        if content.startswith("#"):
            comment.append(content.lstrip("#").strip())
        elif content:
            key, _, value = content.partition(":")
            depth = (len(line) - len(line.lstrip())) // 2
            parents = [*parents[:depth], key]
            if value.strip():
                reason, _, source = " ".join(comment).partition(_SOURCE)
                values.append(
                    {
                        "path": ".".join(parents),
                        "value": yaml.safe_load(value),
                        "reason": reason.strip(),
                        "source": source.strip(),
                    }
                )
            comment = []
    return {"summary": about[0] if about else "", "about": " ".join(about[1:]).strip(), "values": values}


def print_preset(preset: dict[str, Any]) -> None:
    """Prints a parsed preset, one value with its reason and source after the other."""
    import textwrap

    print(preset["summary"])
    if preset["about"]:
        print()
        print(textwrap.fill(preset["about"], width=100))
    for entry in preset["values"]:
        value = str(entry["value"]).lower() if isinstance(entry["value"], bool) else entry["value"]
        print(f"\n{entry['path']}: {value}")
        print(textwrap.fill(entry["reason"], width=100, initial_indent="    ", subsequent_indent="    "))
        if entry["source"]:
            source = f"{_SOURCE} {entry['source']}"
            print(textwrap.fill(source, width=100, initial_indent="    ", subsequent_indent="    "))
