"""How values are shown in messages: short, printable, and never with a secret in them."""

from __future__ import annotations

from forge_cli.redaction import printable

__all__ = ["printable", "shorten", "show", "show_float"]

_LONGEST = 60


def shorten(text: str) -> str:
    """Makes a text printable and cuts its middle out when it is long."""
    shown = printable(text)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 12]}...{shown[-8:]}"


def show(value: object) -> str:
    """Writes a value the way a run file would, in at most one short line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{shorten(value)}"'
    if isinstance(value, float):
        return show_float(value)
    if isinstance(value, (list, tuple)):
        return shorten("[" + ", ".join(show(item) for item in list(value)[:20]) + "]")
    if isinstance(value, dict):
        return shorten("{" + ", ".join(f"{key}: {show(item)}" for key, item in list(value.items())[:20]) + "}")
    return shorten(str(value))


def show_float(value: float) -> str:
    """Writes a float as people do: ``3``, ``0.03``, ``2e-4``; YAML 1.2 reads back the same number."""
    if value != value:
        return ".nan"
    if value in (float("inf"), float("-inf")):
        return ".inf" if value > 0 else "-.inf"
    if value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if 1e-3 <= abs(value) < 1e15:
        return repr(value)
    shortest = next(text for digits in range(17) if float(text := f"{value:.{digits}e}") == value)
    mantissa, _, exponent = shortest.partition("e")
    return f"{mantissa}e{int(exponent)}"
