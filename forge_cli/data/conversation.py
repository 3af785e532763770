"""Turns of a conversation: how rows write them, in which order they come, and where two answers part."""

from __future__ import annotations

import re
from collections.abc import Mapping

from forge_cli.parts.turns import RowError, describe_value

Turns = list[dict[str, object]]
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


def read_turns(value: object, column: str) -> Turns:
    """Reads turns, also as ``from`` and ``value``, and as lists of text parts."""
    if not isinstance(value, list):
        raise RowError(f"{column} is not a list of turns, but {describe_value(value)}")
    # Turns of two columns have the same numbers.
    of = "" if column in ("messages", "conversations") else f" of {column}"
    return [_read_turn(turn, f"turn {number}{of}") for number, turn in enumerate(value, 1)]


def _read_turn(turn: object, place: str) -> dict[str, object]:
    if not isinstance(turn, Mapping):
        raise RowError(f"{place} is not a mapping with role and content")
    if "role" not in turn and "from" in turn:
        speaker = turn["from"]
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            raise RowError(f"{place} is from {speaker!r}; known are {', '.join(_SPEAKERS)}")
        rest = {key: one for key, one in turn.items() if key not in ("from", "value")}
        turn = {"role": _SPEAKERS[speaker], "content": turn.get("value"), **rest}
    calls = turn.get("tool_calls")
    if calls and not isinstance(calls, list):
        raise RowError(f"{place} has tool_calls that are not a list")
    if calls and "content" not in turn:
        turn = {**turn, "content": ""}
    if turn.get("role") is None or "content" not in turn:
        raise RowError(f"{place} is not a mapping with role and content")
    content = turn["content"]
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise RowError(f"{place} has content that is not text, but a list of other things")
        turn = {**turn, "content": "".join(parts)}
    elif content is not None and not isinstance(content, str):
        raise RowError(f"{place} has content that is not text, but {describe_value(content)}")
    return turn if isinstance(turn, dict) else dict(turn)


def split_pair(chosen: Turns, rejected: Turns, prompt: object) -> tuple[Turns, Turns, Turns]:
    """Finds the prompt as the turns that both begin with; half a turn is never shared."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and (shared == min(len(chosen), len(rejected)) or chosen[shared]["role"] != "assistant"):
        shared -= 1
    before = chosen[:shared]
    if not before:
        raise RowError("chosen and rejected do not answer the same prompt")
    asked = [turn for turn in before if turn["role"] == "user"][:1] + before[-1:]
    if isinstance(prompt, str) and prompt.strip() not in [str(turn["content"] or "").strip() for turn in asked]:
        raise RowError("the prompt is not what chosen and rejected begin with")
    return before, chosen[shared:], rejected[shared:]


def split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Finds the prompt as the text that both begin with, cut back to the end of a word.

    Line breaks behind that word belong to the prompt, a space to the answers: so do tokens.
    """
    first, second = chosen.rstrip(), rejected.rstrip()  # an answer is more than white space
    same = [one == other for one, other in zip(first, second, strict=False)]
    shared = end = same.index(False) if False in same else len(same)
    while end and (first[end - 1].isspace() or not all(one[end : end + 1].isspace() for one in (first, second))):
        end -= 1
    if breaks := re.compile(r"\s*\n").match(first, end, shared):
        end = breaks.end()
    return chosen[:end], chosen[end:], rejected[end:]


def check_order(turns: Turns) -> None:
    """Refuses orders of turns that models are never asked in."""
    before = ""
    for number, turn in enumerate(turns, 1):
        role = turn.get("role")
        if role == "system" and number > 1:
            raise RowError(
                f"turn {number} is {'a second' if turns[0].get('role') == 'system' else 'a late'} system turn"
            )
        if role == "assistant" and before in ("", "system"):
            raise RowError(f"turn {number} answers before anybody asked: the first turn is the assistant's")
        if role == "user" and before == "user":
            raise RowError(f"turns {number - 1} and {number} are both from the user; join them")
        before = str(role)
