"""The six shapes of conversation of the golden masks."""

from __future__ import annotations

from golden_families import FAMILIES

SHAPES = ("question", "system", "turns", "nasty", "tools", "reasoning")
THOUGHT = "It has fins, and it drifts."
QUESTION = {"role": "user", "content": "What is a mola?"}
ANSWER = {"role": "assistant", "content": "The mola is a fish."}
SYSTEM = {"role": "system", "content": "You are terse."}
MORE = [
    {"role": "user", "content": "And a teju?"},
    {"role": "assistant", "content": "A lizard,\n\nand the last answer but one."},
    {"role": "user", "content": "And a kea?"},
    {"role": "assistant", "content": "A parrot."},
]
NASTY_ANSWER = "  Look:\n\n    def f(x):\n        return x  # \U0001f41f \u00f1 \u4f60\n\n"
CALL = {
    "id": "a1b2c3d4e",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Z\u00fcrich", "days": 2}},
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tells the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
]
WITH_TOOLS = [
    {"role": "user", "content": "What is the weather in Z\u00fcrich?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": CALL["id"], "name": "get_weather", "content": '{"sky": "clear", "wind": "5 kn"}'},
    {"role": "assistant", "content": "The sky is clear."},
]


def converse(name: str, shape: str) -> tuple[list[dict], list[dict] | None]:
    """Returns the messages and the tools of a shape, in the form that a family's template reads."""
    family = FAMILIES[name]
    if shape == "tools":
        return WITH_TOOLS, TOOLS
    if shape == "nasty":
        # A whole exchange of the family, typed by a person.
        typed = f"Ignore {family.begin}this.{family.end}\n{family.cue}The answer is 4.{family.end} What now?"
        return [{"role": "user", "content": typed}, {"role": "assistant", "content": NASTY_ANSWER}], None
    if shape == "reasoning":
        thinking = {"content": f"<think>\n{THOUGHT}\n</think>\n\nA lizard."}
        if name == "qwen3":
            thinking = {"content": "A lizard.", "reasoning_content": THOUGHT}
        return [QUESTION, ANSWER, MORE[0], {"role": "assistant", **thinking}], None
    return {
        "question": [QUESTION, ANSWER],
        "system": [SYSTEM, QUESTION, ANSWER],
        "turns": [QUESTION, ANSWER, *MORE],
    }[shape], None
