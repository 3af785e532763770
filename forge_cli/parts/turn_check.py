"""What one turn of a conversation has to hold."""

from __future__ import annotations

import json
from collections.abc import Mapping

from forge_cli.parts.turns import REASONING_FIELDS, RowError, describe_value

ROLES = ("system", "user", "assistant", "tool")


def check_turn(turn: dict[str, object], number: int) -> None:
    """Refuses a turn that no template can write; reads the arguments of its tool calls, in place."""
    if turn["role"] not in ROLES:
        raise RowError(f"turn {number} has the unknown role {turn['role']!r}; use {', '.join(ROLES)}")
    calls = turn.get("tool_calls")
    if calls:
        turn["tool_calls"] = [_read_arguments(call, number) for call in calls]
    if turn["content"] is None and calls:
        turn["content"] = ""
    if not isinstance(turn["content"], str):
        raise RowError(f"turn {number} has content that is not text, but {describe_value(turn['content'])}")
    has_more = calls or any(turn.get(name) for name in REASONING_FIELDS)
    if turn["role"] == "assistant" and not turn["content"].strip() and not has_more:
        raise RowError(f"turn {number} is an empty answer")


def _read_arguments(call: object, number: int) -> dict[str, object]:
    """Templates write a call's arguments as JSON; given as JSON text already, they would be written twice."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowError(f"turn {number} has a tool call without a function name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function = {**function, "arguments": json.loads(arguments)}
        except (ValueError, RecursionError):
            raise RowError(f"turn {number} has a tool call whose arguments are not JSON") from None
    return {**call, "function": function} if "function" in call else dict(function)
