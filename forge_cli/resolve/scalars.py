"""What a plain word in a run file means: the core schema of YAML 1.2, without the traps of YAML 1.1."""

from __future__ import annotations

import re

from forge_cli.resolve.wording import shorten

_MOST_DIGITS = 40
_CONSTANTS = {"null": None, "Null": None, "NULL": None, "~": None}
_CONSTANTS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_LEGACY_BOOLEANS = frozenset({"y", "n", "yes", "no", "on", "off"})
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
# These two are rare, so they are compiled when they are needed.
_BASED = r"0o[0-7]+|0x[0-9a-fA-F]+"
_SPECIAL_FLOAT = r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_NUMBER_START = frozenset("0123456789+-.")


class ScalarFault(Exception):
    """A plain word that other YAML readers take for something else.

    Args:
        what: What is wrong.
        fix: What to write instead.
    """

    def __init__(self, what: str, fix: str) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix


def resolve_scalar(text: str) -> object:
    """Gives a plain scalar its type.

    Args:
        text: The scalar as written, without quotes.

    Returns:
        ``None``, a boolean, a number, or the text itself.

    Raises:
        ScalarFault: The word means different things to different YAML readers.
    """
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if text.lower() in _LEGACY_BOOLEANS:
        boolean = "true" if text.lower() in ("y", "yes", "on") else "false"
        raise ScalarFault(
            f"{text} is text to some YAML readers and {boolean} to others",
            f'quote it ("{text}"), or write true or false',
        )
    if text[:1] not in _NUMBER_START:
        return text
    digits = text[1:] if text[0] in "+-" else text
    if digits.isdecimal() and digits.isascii():
        return _read_integer(text, digits)
    if _FLOAT.fullmatch(text):
        return float(text)
    if re.fullmatch(_BASED, text) and len(text) <= _MOST_DIGITS:
        return int(text, 0)
    if match := re.fullmatch(_SPECIAL_FLOAT, text):
        return float("nan") if match.group(3) else float(match.group(1) + "inf")
    return text


def _read_integer(text: str, digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ScalarFault(f"{shorten(text)} has {len(digits)} digits", f"write at most {_MOST_DIGITS}, or quote it")
    if len(digits) > 1 and digits[0] == "0":
        fix = f'write {int(text)} for the number, or quote it ("{text}")'
        raise ScalarFault(f"{text} starts with 0: octal to some YAML readers, decimal to others", fix)
    return int(text)
