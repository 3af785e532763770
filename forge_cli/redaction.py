"""What must not be shown: access tokens and passwords are masked, control characters escaped."""

from __future__ import annotations

import os
import re

MASK = "***"
# Prefixes that services print on their keys, and a password inside a URL. Long tails only: `hf_transfer` and
# `sk-learn` are names, and so are `cls_token` and `num_memory_tokens`.
_SECRET = re.compile(
    r"(?<![A-Za-z0-9])(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]*[A-Za-z0-9]{16,}|AKIA[0-9A-Z]{12,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|github_pat_[A-Za-z0-9_]{16,}|xox[abprs]-[A-Za-z0-9-]{8,})|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
)
_SECRET_NAMES = ("TOKEN", "KEY", "SECRET", "PASSWORD", "PASSWD")
_SHORTEST = 8
_PATH_STARTS = ("/", "./", "../", "~")


def holds_secret(text: str) -> bool:
    """Tells whether a text holds something that looks like an access token or a password."""
    if len(text) < _SHORTEST:
        return False
    return _SECRET.search(text) is not None or any(one in text for one in _list_known())


def mask(text: str) -> str:
    """Replaces access tokens and passwords by ``***``, those in the environment's variables too."""
    if len(text) < _SHORTEST:
        return text
    for one in _list_known():
        text = text.replace(one, MASK)
    return _SECRET.sub(MASK, text)


def printable(text: str) -> str:
    """Masks secrets and escapes control characters, so that a text can be shown in a terminal."""
    masked = mask(text)
    return masked if masked.isprintable() else "".join(one if one.isprintable() else ascii(one)[1:-1] for one in masked)


def printable_lines(text: str) -> str:
    """Does the same for each line of a text that has several, such as a traceback."""
    return "\n".join(printable(line.replace("\t", "    ")) for line in text.split("\n"))


def _list_known() -> list[str]:
    """Lists the values of variables such as ``HF_TOKEN`` and ``WANDB_API_KEY``, longest first; paths are none."""
    found = {
        value.strip()
        for name, value in os.environ.items()
        if name.upper().endswith(_SECRET_NAMES) and not value.startswith(_PATH_STARTS)
    }
    return sorted((one for one in found if len(one) >= _SHORTEST), key=len, reverse=True)
