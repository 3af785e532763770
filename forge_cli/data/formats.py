"""The shapes that rows come in, and what a row of each says."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from forge_cli.data.conversation import Turns, check_order, read_turns, split_pair, split_texts
from forge_cli.parts.turns import RowError, describe_value

Text = str | Turns

# Columns that a row of each format has; the first match decides.
COLUMNS: dict[str, tuple[str, ...]] = {
    "tokens": ("input_ids",),
    "preference": ("chosen", "rejected"),
    "unpaired_preference": ("prompt", "completion", "label"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
# Columns that a format may have besides.
_MORE: dict[str, tuple[str, ...]] = {
    "tokens": ("labels", "attention_mask"),
    "preference": ("prompt", "tools", "chat_template_kwargs"),
    "unpaired_preference": ("tools", "chat_template_kwargs"),
    "messages": ("tools", "chat_template_kwargs"),
    "conversations": ("system", "tools", "chat_template_kwargs"),
    "prompt_completion": ("tools", "chat_template_kwargs"),
    "instruction": ("input", "system"),
}
SFT_FORMATS = ("tokens", "messages", "conversations", "prompt_completion", "instruction", "text")
WANTED: dict[str, tuple[str, ...]] = {"sft": SFT_FORMATS, "kto": ("unpaired_preference",)}


class Example(NamedTuple):
    """What one row says, whatever its format.

    Attributes:
        prompt: What is asked, as text or turns; empty where the answers hold the whole conversation.
        answers: One answer; chosen and rejected of a preference; the ids and labels of a tokenised row.
        tools: JSON schemas of functions.
        options: Variables for the chat template.
        label: Whether an unpaired answer is wanted.
        is_prompt_found: The row names no prompt; it is the text that both answers begin with.
    """

    prompt: Text
    answers: tuple
    tools: list | None = None
    options: Mapping[str, object] = {}
    label: bool | None = None
    is_prompt_found: bool = False


def find_kind(columns: Sequence[str]) -> str | None:
    """Tells the format from the columns of one row; ``None`` if it has those of none."""
    return next((kind for kind, wanted in COLUMNS.items() if all(one in columns for one in wanted)), None)


def list_wanted(method: str) -> tuple[str, ...]:
    """Lists the formats that a training method takes."""
    return WANTED.get(method, ("preference",))


def list_unused(kind: str, columns: Sequence[str]) -> list[str]:
    """Lists the columns of a row that its format does not read."""
    return [one for one in columns if one not in (*COLUMNS[kind], *_MORE.get(kind, ()))]


def rename_columns(row: Mapping[str, object], columns: Mapping[str, str]) -> dict[str, object]:
    """Gives columns Forge's names.

    Raises:
        RowError: The row lacks one of them.
    """
    renamed = dict(row)
    for ours, theirs in columns.items():
        if theirs not in row:
            near = difflib.get_close_matches(theirs, row, n=1)
            raise RowError(
                f"has no column {theirs} for {ours}; its columns are {', '.join(row)}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
        renamed.pop(theirs, None)
    return renamed | {ours: row[theirs] for ours, theirs in columns.items()}


def drop_nulls(value: object) -> object:
    """Takes out the nulls of mappings inside a column.

    Columns have one shape for all rows: what a turn, a tool or a call of another row has comes as null, and a template
    would write it down.
    """
    if isinstance(value, dict):
        kept = "content" if "role" in value else None  # a turn has one, be it null
        return {key: drop_nulls(one) for key, one in value.items() if one is not None or key == kept}
    if isinstance(value, list) and value and isinstance(value[0], (dict, list)):
        return [drop_nulls(one) for one in value]
    return value


def suggest_columns(columns: Sequence[str], kinds: Sequence[str]) -> str:
    """Says what to write for columns that are of no format."""
    for kind in kinds:
        found = {want: difflib.get_close_matches(want, columns, n=1, cutoff=0.7) for want in COLUMNS[kind]}
        if all(found.values()):
            renamed = ", ".join(f"{want}: {near[0]}" for want, near in found.items() if near[0] != want)
            return f"did you mean {kind}? name the columns in the source, columns: {{{renamed}}}"
    shapes = " | ".join("+".join(COLUMNS[kind]) for kind in kinds)
    return f"rows need {shapes}, or columns: {{prompt: ..., completion: ...}} in the source"


def read_example(row: Mapping[str, object], kind: str, has_template: bool = True) -> Example:
    """Reads one row of a format and checks what can be checked without a tokenizer.

    Args:
        row: The row.
        kind: Its format.
        has_template: The tokenizer has a chat template; without one, an instruction becomes plain text.

    Raises:
        RowError: A column is of the wrong kind, the order of turns is wrong, or a pair is none.
    """
    example = _READERS[kind](row, has_template)
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        import json

        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise RowError("tools is not JSON") from None
    options = row.get("chat_template_kwargs") or {}
    if tools and not (isinstance(tools, list) and all(isinstance(one, Mapping) for one in tools)):
        raise RowError("tools is not a list of function schemas")
    if not isinstance(options, Mapping):
        raise RowError("chat_template_kwargs is not a mapping")
    return example._replace(tools=tools or None, options=options) if tools or options else example


def find_system(example: Example) -> str:
    """Returns the system prompt of a conversation; empty if there is none."""
    turns = example.prompt or example.answers[0]
    is_chat = isinstance(turns, list) and turns and isinstance(turns[0], Mapping)
    return str(turns[0]["content"]) if is_chat and turns[0].get("role") == "system" else ""


def _check_text(name: str, value: object, *, or_turns: bool = False) -> None:
    """Refuses what is not text, by the column's name, and says what to write."""
    if isinstance(value, str) or (or_turns and isinstance(value, list)):
        return
    found, wanted = describe_value(value), "text or a list of turns" if or_turns else "text"
    fix = "; fill it in" if value is None else ""
    if isinstance(value, (int, float)):
        fix = f'; write "{found.removeprefix("the number ")}"'
    raise RowError(f"{name} is {found}, not {wanted}{fix}")


def _check_texts(row: Mapping[str, object], first: str, second: str) -> None:
    """Refuses two columns that are not both text, where lists of turns would do as well."""
    for name in (first, second):
        _check_text(name, row[name], or_turns=True)
    if not isinstance(row[first], str) or not isinstance(row[second], str):
        found = f"{first} is {describe_value(row[first])} and {second} is {describe_value(row[second])}"
        raise RowError(f"{found}; write both as text or both as lists of turns")


def _read_messages(row: Mapping[str, object], has_template: bool) -> Example:
    turns = read_turns(row["messages"], "messages")
    check_order(turns)
    return Example([], (turns,))


def _read_conversations(row: Mapping[str, object], has_template: bool) -> Example:
    turns = read_turns(row["conversations"], "conversations")
    if row.get("system"):
        turns = [{"role": "system", "content": row["system"]}, *turns]
    check_order(turns)
    return Example([], (turns,))


def _read_prompt_completion(row: Mapping[str, object], has_template: bool) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        prompt, completion = read_turns(prompt, "prompt"), read_turns(completion, "completion")
        check_order([*prompt, *completion])
    else:
        _check_texts(row, "prompt", "completion")
    return Example(prompt, (completion,))


def _read_instruction(row: Mapping[str, object], has_template: bool) -> Example:
    instruction, extra, output = row["instruction"], row.get("input") or "", row["output"]
    system = row.get("system") or ""
    for name, text in (("instruction", instruction), ("input", extra), ("output", output), ("system", system)):
        _check_text(name, text)
    question = f"{instruction}\n\n{extra}" if extra else instruction
    if not has_template:
        return Example((f"{system}\n\n" if system else "") + question + "\n\n", (output,))
    before = [{"role": "system", "content": system}] if system else []
    return Example([*before, {"role": "user", "content": question}], ([{"role": "assistant", "content": output}],))


def _read_text(row: Mapping[str, object], has_template: bool) -> Example:
    _check_text("text", row["text"])
    return Example("", (row["text"],))


def _read_tokens(row: Mapping[str, object], has_template: bool) -> Example:
    ids, labels = row["input_ids"], row.get("labels")
    labels = ids if labels is None else labels
    for name, column in (("input_ids", ids), ("labels", labels)):
        if not isinstance(column, list) or not all(type(one) is int for one in column):
            raise RowError(f"{name} is not a list of whole numbers")
    if not ids or len(ids) != len(labels):
        raise RowError(f"{len(ids)} input_ids and {len(labels)} labels")
    wrong = next((i for i, (one, label) in enumerate(zip(ids, labels, strict=True)) if label not in (one, -100)), None)
    if wrong is not None:
        raise RowError(f"label {labels[wrong]} at token {wrong} is neither its id {ids[wrong]} nor -100")
    mask = row.get("attention_mask")
    if mask is not None and (not isinstance(mask, list) or any(one != 1 for one in mask)):
        raise RowError("attention_mask hides tokens: padding has no place in a row")
    return Example("", (ids, labels))


def _read_preference(row: Mapping[str, object], has_template: bool) -> Example:
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    is_prompt_found = False
    if chosen == rejected and isinstance(chosen, (str, list)):
        raise RowError("chosen and rejected are the same, so there is nothing to prefer")
    if isinstance(chosen, list) and isinstance(rejected, list):
        if prompt is not None:
            _check_text("prompt", prompt, or_turns=True)
        chosen, rejected = read_turns(chosen, "chosen"), read_turns(rejected, "rejected")
        if isinstance(prompt, list):
            prompt = read_turns(prompt, "prompt")
        else:
            prompt, chosen, rejected = split_pair(chosen, rejected, prompt)
        for answer in (chosen, rejected):
            check_order([*prompt, *answer])
            if not answer or answer[0]["role"] != "assistant":
                raise RowError("an answer of the pair does not begin with an assistant turn")
    else:
        _check_texts(row, "chosen", "rejected")
        for name in ("chosen", "rejected"):
            if not row[name].strip():
                raise RowError(f"{name} is empty")
        if is_prompt_found := prompt is None or prompt == "":
            prompt, chosen, rejected = split_texts(chosen, rejected)
        _check_text("prompt", prompt)
    return Example(prompt, (chosen, rejected), is_prompt_found=is_prompt_found)


def _read_unpaired(row: Mapping[str, object], has_template: bool) -> Example:
    example = _read_prompt_completion(row, has_template)
    if row["label"] not in (True, False):
        shown = repr(row["label"]) if isinstance(row["label"], str) else describe_value(row["label"])
        raise RowError(f"label is {shown}; an answer is wanted (true) or not (false)")
    if isinstance(example.answers[0], str) and not example.answers[0].strip():
        raise RowError("the completion is empty")
    return example._replace(label=bool(row["label"]))


_READERS: dict[str, Callable[[Mapping[str, object], bool], Example]] = {
    "tokens": _read_tokens,
    "preference": _read_preference,
    "unpaired_preference": _read_unpaired,
    "messages": _read_messages,
    "conversations": _read_conversations,
    "prompt_completion": _read_prompt_completion,
    "instruction": _read_instruction,
    "text": _read_text,
}
