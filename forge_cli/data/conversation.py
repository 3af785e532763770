"""Turns of a conversation: how rows write them, in which order they come, and where two answers part."""

from __future__ import annotations

from collections.abc import Mapping

from forge_cli.parts.turns import RowError

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
        raise RowError(f"{column} is not a list of turns")
    return [_read_turn(turn, number) for number, turn in enumerate(value, 1)]


def _read_turn(turn: object, number: int) -> dict[str, object]:
    if not isinstance(turn, Mapping):
        raise RowError(f"turn {number} is not a mapping with role and content")
    if "role" not in turn and "from" in turn:
        speaker = turn["from"]
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            raise RowError(f"turn {number} is from {speaker!r}; known are {', '.join(_SPEAKERS)}")
        rest = {key: one for key, one in turn.items() if key not in ("from", "value")}
        turn = {"role": _SPEAKERS[speaker], "content": turn.get("value"), **rest}
    calls = turn.get("tool_calls")
    if calls and not isinstance(calls, list):
        raise RowError(f"turn {number} has tool_calls that are not a list")
    if calls and "content" not in turn:
        turn = {**turn, "content": ""}
    if turn.get("role") is None or "content" not in turn:
        raise RowError(f"turn {number} is not a mapping with role and content")
    content = turn["content"]
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise RowError(f"turn {number} has content that is not text")
        turn = {**turn, "content": "".join(parts)}
    elif content is not None and not isinstance(content, str):
        raise RowError(f"turn {number} has content that is not text")
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
