"""Chat formats written down in plain Python: what a model's template has to produce, and what of it is trained.

Every ``write_*`` function takes a conversation and its tools and yields the segments of the text in order. They are
the golden truth of ``test_golden_masks.py``: no Jinja, and nothing of Forge.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import NamedTuple

Messages = list[dict]
Tools = list[dict] | None


class Segment(NamedTuple):
    """A stretch of text.

    Attributes:
        text: The characters.
        trained: An answer or the token that ends it.
        quoted: Written by a person; a control token's name in it is plain text.
    """

    text: str
    trained: bool = False
    quoted: bool = False


def frame(text: str) -> Segment:
    return Segment(text)


def quote(text: str) -> Segment:
    return Segment(text, quoted=True)


def answer(text: str, end: str) -> Iterator[Segment]:
    yield Segment(text, trained=True, quoted=True)
    yield Segment(end, trained=True)


def speak(role: str, text: str, end: str) -> Iterator[Segment]:
    """A text and the token that ends every turn alike; an assistant's is trained."""
    yield from answer(text, end) if role == "assistant" else (quote(text), frame(end))


def dump(value: object, **options: object) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def split_system(messages: Messages) -> tuple[str, Messages]:
    return (messages[0]["content"], messages[1:]) if messages[0]["role"] == "system" else ("", messages)


def _write_turns(messages: Messages, head: str, end: str) -> Iterator[Segment]:
    for turn in messages:
        yield frame(head.format(turn["role"]))
        yield from speak(turn["role"], turn["content"], end)
        yield frame("\n")


def write_chatml(messages: Messages, tools: Tools = None) -> Iterator[Segment]:
    yield from _write_turns(messages, "<|im_start|>{}\n", "<|im_end|>")


def write_phi3(messages: Messages, tools: Tools = None) -> Iterator[Segment]:
    yield from _write_turns(messages, "<|{}|>\n", "<|end|>")
    yield frame("<|endoftext|>")


def write_zephyr(messages: Messages, tools: Tools = None) -> Iterator[Segment]:
    yield from _write_turns(messages, "<|{}|>\n", "</s>")


def write_llama2(messages: Messages, tools: Tools = None) -> Iterator[Segment]:
    system, turns = split_system(messages)
    for number, turn in enumerate(turns):
        if turn["role"] == "user":
            yield frame("<s>[INST] ")
            if system and number == 0:
                yield frame("<<SYS>>\n")
                yield quote(system)
                yield frame("\n<</SYS>>\n\n")
            yield quote(turn["content"].strip())
            yield frame(" [/INST]")
        else:
            yield from answer(f" {turn['content'].strip()} ", "</s>")


def write_llama31(messages: Messages, tools: Tools = None) -> Iterator[Segment]:
    head, end = "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"
    system, turns = split_system(messages)
    yield frame("<|begin_of_text|>")
    yield frame(head.format("system"))
    yield frame("Environment: ipython\n" if tools else "")
    yield frame("Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n")
    yield quote(system.strip())
    yield frame(end)
    for number, turn in enumerate(turns):
        role, content = turn["role"], turn.get("content") or ""
        if turn.get("tool_calls"):
            call = turn["tool_calls"][0]["function"]
            yield frame(head.format("assistant"))
            yield from answer(f'{{"name": "{call["name"]}", "parameters": {dump(call["arguments"])}}}', end)
        elif role == "assistant":
            yield frame(head.format("assistant"))
            yield from answer(content.strip(), end)
        else:
            yield frame(head.format("ipython" if role == "tool" else role))
            if tools and number == 0:
                yield frame("Given the following functions, please respond with a JSON for a function call with its ")
                yield frame("proper arguments that best answers the given prompt.\n\n")
                yield frame('Respond in the format {"name": function name, "parameters": dictionary of argument name ')
                yield frame("and its value}.Do not use variables.\n\n")
                for tool in tools:
                    yield quote(dump(tool, indent=4) + "\n\n")
            yield quote(dump(content) if role == "tool" else content.strip())
            yield frame(end)


def write_mistral_v01(messages: Messages, tools: Tools = None) -> Iterator[Segment]:
    yield frame("<s>")
    for turn in messages:
        if turn["role"] == "user":
            yield frame("[INST] ")
            yield quote(turn["content"])
            yield frame(" [/INST]")
        else:
            yield from answer(turn["content"], "</s>")
            yield frame(" ")


def write_mistral_v03(messages: Messages, tools: Tools = None) -> Iterator[Segment]:
    last_question = max(i for i, turn in enumerate(messages) if turn["role"] == "user")
    yield frame("<s>")
    for number, turn in enumerate(messages):
        if turn["role"] == "user":
            if tools and number == last_question:
                yield frame("[AVAILABLE_TOOLS] ")
                yield quote(dump(tools))
                yield frame("[/AVAILABLE_TOOLS]")
            yield frame("[INST] ")
            yield quote(turn["content"])
            yield frame("[/INST]")
        elif turn["role"] == "tool":
            yield frame("[TOOL_RESULTS] ")
            yield quote(f'{{"content": {turn["content"]}, "call_id": "{turn["tool_call_id"]}"}}')
            yield frame("[/TOOL_RESULTS]")
        elif turn.get("tool_calls"):
            calls = [{**call["function"], "id": call["id"]} for call in turn["tool_calls"]]
            yield Segment("[TOOL_CALLS]", trained=True)
            yield from answer(f" {dump(calls)}", "</s>")
        else:
            yield from answer(f" {turn['content'].strip()}", "</s>")


def write_mistral_tekken(messages: Messages, tools: Tools = None) -> Iterator[Segment]:
    system, turns = split_system(messages)
    yield frame("<s>")
    if system:
        yield frame("[SYSTEM_PROMPT]")
        yield quote(system)
        yield frame("[/SYSTEM_PROMPT]")
    if tools:
        yield frame("[AVAILABLE_TOOLS]")
        yield quote(dump(tools))
        yield frame("[/AVAILABLE_TOOLS]")
    for turn in turns:
        if turn["role"] == "assistant":
            yield Segment(turn["content"], trained=True, quoted=True)
            for call in turn.get("tool_calls", []):
                yield Segment("[TOOL_CALLS]", trained=True)
                yield Segment(call["function"]["name"], trained=True, quoted=True)
                yield Segment("[ARGS]", trained=True)
                yield Segment(dump(call["function"]["arguments"]), trained=True, quoted=True)
            yield Segment("</s>", trained=True)
        else:
            kind = "INST" if turn["role"] == "user" else "TOOL_RESULTS"
            yield frame(f"[{kind}]")
            yield quote(turn["content"])
            yield frame(f"[/{kind}]")


def write_gemma(messages: Messages, tools: Tools = None) -> Iterator[Segment]:
    yield frame("<bos>")
    system, turns = split_system(messages)
    for number, turn in enumerate(turns):
        yield frame(f"<start_of_turn>{'user' if turn['role'] == 'user' else 'model'}\n")
        yield quote(f"{system}\n\n" if system and number == 0 else "")
        yield from speak(turn["role"], turn["content"].strip(), "<end_of_turn>")
        yield frame("\n")


def _write_qwen_head(system: str, tools: Tools) -> Iterator[Segment]:
    yield frame("<|im_start|>system\n")
    yield quote(system)
    if tools:
        yield frame("\n\n" if system else "")
        yield frame("# Tools\n\nYou may call one or more functions to assist with the user query.\n\n")
        yield frame("You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n")
        yield quote("\n".join(map(dump, tools)))
        yield frame("\n</tools>\n\nFor each function call, return a json object with function name and arguments ")
        yield frame("within <tool_call></tool_call> XML tags:\n")
        yield frame('<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>')
    yield frame("<|im_end|>\n")


def _write_qwen_turn(turn: dict, before: str) -> Iterator[Segment]:
    """One turn; ``before`` is what the model writes ahead of its answer."""
    if turn["role"] == "assistant":
        yield frame("<|im_start|>assistant\n")
        yield Segment(before, trained=True)
        yield Segment(turn["content"], trained=True, quoted=True)
        for call in turn.get("tool_calls", []):
            yield Segment("\n<tool_call>\n" if turn["content"] else "<tool_call>\n", trained=True)
            function = call["function"]
            text = f'{{"name": "{function["name"]}", "arguments": {dump(function["arguments"])}}}\n'
            yield Segment(text, trained=True, quoted=True)
            yield Segment("</tool_call>", trained=True)
        yield Segment("<|im_end|>", trained=True)
    elif turn["role"] == "tool":
        yield frame("<|im_start|>user\n<tool_response>\n")
        yield quote(turn["content"])
        yield frame("\n</tool_response><|im_end|>")
    else:
        yield frame(f"<|im_start|>{turn['role']}\n")
        yield quote(turn["content"])
        yield frame("<|im_end|>")
    yield frame("\n")


def write_qwen25(messages: Messages, tools: Tools = None) -> Iterator[Segment]:
    system, turns = split_system(messages)
    yield from _write_qwen_head(system or "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", tools)
    for turn in turns:
        yield from _write_qwen_turn(turn, "")


def write_qwen3(messages: Messages, tools: Tools = None) -> Iterator[Segment]:
    system, turns = split_system(messages)
    if system or tools:
        yield from _write_qwen_head(system, tools)
    last_question = max(i for i, turn in enumerate(turns) if turn["role"] == "user")
    for number, turn in enumerate(turns):
        thought = turn.get("reasoning_content", "")
        thinks = number > last_question and (bool(thought) or number + 1 == len(turns))
        yield from _write_qwen_turn(turn, f"<think>\n{thought}\n</think>\n\n" if thinks else "")


def write_tulu(messages: Messages, tools: Tools = None) -> Iterator[Segment]:
    for number, turn in enumerate(messages, 1):
        yield frame(f"<|{turn['role']}|>\n")
        if turn["role"] == "assistant":
            yield from answer(turn["content"], "<|endoftext|>")
            yield frame("" if number == len(messages) else "\n")
        else:
            yield quote(turn["content"])
            yield frame("\n")


def write_deepseek(messages: Messages, tools: Tools = None) -> Iterator[Segment]:
    end = "<｜end▁of▁sentence｜>"
    system, turns = split_system(messages)
    yield frame("<｜begin▁of▁sentence｜>")
    yield quote(system)
    for before, turn in zip([{}, *turns], turns, strict=False):
        if turn["role"] == "user":
            yield frame("<｜User｜>")
            yield quote(turn["content"])
        elif turn["role"] == "tool":
            yield frame("<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>")
            yield quote(turn["content"])
            yield frame("<｜tool▁output▁end｜><｜tool▁outputs▁end｜>")
        elif turn.get("tool_calls"):
            call = turn["tool_calls"][0]["function"]
            yield frame("<｜Assistant｜>")
            yield Segment("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>", trained=True)
            yield Segment(f"{call['name']}\n```json\n{dump(call['arguments'])}\n```", trained=True, quoted=True)
            yield Segment(f"<｜tool▁call▁end｜><｜tool▁calls▁end｜>{end}", trained=True)
        else:
            yield frame("" if before["role"] == "tool" else "<｜Assistant｜>")
            yield from answer(turn["content"], end)


def write_command_r(messages: Messages, tools: Tools = None) -> Iterator[Segment]:
    start, end = "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
    system, turns = split_system(messages)
    yield frame("<BOS_TOKEN>")
    if system:
        yield frame(f"{start}<|SYSTEM_TOKEN|>")
        yield quote(system)
        yield frame(end)
    for turn in turns:
        yield frame(f"{start}<|{'USER' if turn['role'] == 'user' else 'CHATBOT'}_TOKEN|>")
        yield from speak(turn["role"], turn["content"].strip(), end)
