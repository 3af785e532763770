"""Finds the turns of a conversation in the text that a chat template made of it.

The conversation is rendered twice: as it is, and with every text in it replaced by a mark. What stands between the
marks is the template's own writing, and where the marks stand is where the texts went. So no template has to be known:
one that leaves a text out, moves it or rewrites it is found out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

Message = Mapping[str, object]
Span = tuple[int, int]
Render = Callable[..., str]

# From the last private plane: no text has a use for them, and no tokenizer a merge.
BREAK = "\U0010ff00"
_FIRST, _LAST, _ZERO = "\U0010ff01", "\U0010ff02", 0x10FF10
MARKS = re.compile("[\U0010ff00-\U0010ff1f]")
_MARK = re.compile(f"{_FIRST}([\U0010ff10-\U0010ff19]+){_LAST}")
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
THINKING = ("<think>", "</think>")


class RowError(ValueError):
    """A row that cannot be trained on; the message says why. The caller knows its number."""


def describe_value(value: object) -> str:
    """Names what stands where something else is wanted: ``null``, ``the number 4``, ``a list``, ``text``."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, Mapping):
        return "a mapping"
    return {list: "a list", str: "text"}.get(type(value), f"a {type(value).__name__}")


@dataclass(frozen=True)
class Piece:
    """A text of a turn, without outer white space, and where it stands in the rendered conversation.

    Attributes:
        turn: Number of the turn, from 0.
        start: Its first character.
        end: Behind its last.
    """

    turn: int
    start: int
    end: int


class TurnFinder:
    """Finds what each assistant turn adds to a conversation.

    Args:
        control: Matches the tokens that control the model.
        tags: Texts that templates look for inside an answer (``<think>``, added tokens); they are no part of a piece.
    """

    def __init__(self, control: re.Pattern[str], tags: Sequence[str]) -> None:
        self.control = control
        found = sorted({*tags, *THINKING}, key=len, reverse=True)
        self._tags = re.compile("(" + "|".join(map(re.escape, found)) + ")")

    def find_spans(self, render: Render, messages: Sequence[Message], text: str, trained: Sequence[int]) -> list[Span]:
        """Finds the characters that turns add to the text, from where the model is asked to where it stops.

        Args:
            render: ``render(messages, add_generation_prompt=...)`` to text.
            messages: The conversation.
            text: The whole of it, rendered.
            trained: Numbers of the assistant turns to find, in order.

        Raises:
            RowError: The template leaves a text out, moves or rewrites it, asks in other words than it writes, or
                writes no end token.
        """
        marked, texts = self._mark(messages)
        parts = _MARK.split(render(marked))
        literals, numbers = parts[::2], [_read_number(digits) for digits in parts[1::2]]
        _check_all_there(messages, texts, set(numbers), trained)
        pieces = _align(text, literals, [texts[number] for number in numbers])

        @cache
        def find_tail(turn: int) -> str:
            """Returns what the template writes behind the last text when it asks for an answer."""
            return _MARK.split(render(marked[:turn], add_generation_prompt=True))[-1]

        return [self._find_span(render, messages, text, pieces, turn, find_tail) for turn in trained]

    def find_end(self, render: Render) -> str | None:
        """Returns the token with which the template ends an answer; ``None`` if it writes none."""
        marked, _ = self._mark([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        found = self.control.search(_MARK.split(render(marked))[-1])
        return found.group() if found else None

    def _mark(self, messages: Sequence[Message]) -> tuple[list[Message], list[tuple[int, str]]]:
        """Replaces every text by a mark; returns the conversation and (turn, text) of each mark."""
        texts: list[tuple[int, str]] = []

        def mark(turn: int, text: str) -> str:
            core = text.strip()
            if not core or self._tags.fullmatch(text):
                return text
            texts.append((turn, core))
            number = "".join(chr(_ZERO + int(digit)) for digit in str(len(texts) - 1))
            # White space stays, so that a template trims both renderings alike.
            return text.replace(core, f"{_FIRST}{number}{_LAST}", 1)

        marked: list[Message] = []
        for turn, message in enumerate(messages):
            copy = dict(message)
            for name in (*REASONING_FIELDS, "content"):
                if isinstance(copy.get(name), str):
                    copy[name] = "".join(mark(turn, part) for part in self._tags.split(copy[name]))
            if calls := copy.get("tool_calls"):
                copy["tool_calls"] = [_rename_call(call, lambda name, turn=turn: mark(turn, name)) for call in calls]
            marked.append(copy)
        return marked, texts

    def _find_span(
        self,
        render: Render,
        messages: Sequence[Message],
        text: str,
        pieces: Sequence[Piece],
        turn: int,
        find_tail: Callable[[int], str],
    ) -> Span:
        own = [index for index, piece in enumerate(pieces) if piece.turn == turn]
        if not own:
            raise RowError(f"turn {turn + 1} is an answer without a text of its own, only marks such as <think>")
        first, last = own[0], own[-1]
        if any(p.turn >= turn for p in pieces[:first]) or any(p.turn <= turn for p in pieces[last + 1 :]):
            raise RowError(
                f"the chat template moves text across turn {turn + 1}, so the model would be trained on another "
                "conversation than it is asked in; data.train_on: last_assistant may work"
            )
        before = pieces[first - 1].end if first else 0
        gap = text[before : pieces[first].start]
        # What asks for an answer depends on who spoke last, not on what was said.
        asker = {message["role"]: number for number, message in reversed([*enumerate(messages[:turn], 1)])}
        tail = find_tail(asker[messages[turn - 1]["role"]] if turn else 0)
        if not gap.startswith(tail):
            raise RowError(
                f"the chat template asks for an answer in other words than it writes before turn {turn + 1}: "
                f"{tail!r}, then {gap!r}; the model would be asked in a way it was never trained; "
                "model.chat_template can name another template"
            )
        behind = text[pieces[last].end : pieces[last + 1].start if last + 1 < len(pieces) else len(text)]
        return before + len(tail), pieces[last].end + self._find_end_of(render, behind, messages[turn], turn)

    def _find_end_of(self, render: Render, behind: str, message: Message, turn: int) -> int:
        """Returns how far a turn goes on behind its last text: to its end token, or that of a tool call."""
        found = self.control.search(behind)
        if found and message.get("tool_calls") and (end := self.find_end(render)):
            # Templates write control tokens around a call; the turn ends behind them.
            place = behind.find(end)
            return place + len(end) if place >= 0 else found.end()
        if not found:
            raise RowError(
                f"the chat template writes no end token after turn {turn + 1}, so the model could never learn to stop"
            )
        return found.end()


def _align(text: str, literals: Sequence[str], texts: Sequence[tuple[int, str]]) -> list[Piece]:
    """Lays the text along the template's own writing: a turn's text stands between two literals."""
    pieces: list[Piece] = []
    position = 0
    for index, (turn, wanted) in enumerate(texts):
        start = position + len(literals[index])
        if not text.startswith(literals[index], position):
            raise RowError(f"the chat template rewrites turn {turn + 1} or what stands before it")
        for variant in (wanted, json.dumps(wanted, ensure_ascii=False)[1:-1]):
            position = start + len(variant)
            if text.startswith(variant, start) and text.startswith(literals[index + 1], position):
                break
        else:
            read = text[start : start + 40]
            raise RowError(f"the chat template rewrites the text of turn {turn + 1}: it reads {read!r}")
        pieces.append(Piece(turn, start, position))
    if text[position:] != literals[-1]:
        raise RowError("the chat template writes another end for this conversation than for one of other words")
    return pieces


def _check_all_there(
    messages: Sequence[Message],
    texts: Sequence[tuple[int, str]],
    written: Collection[int],
    trained: Sequence[int],
) -> None:
    """Refuses a template that leaves a text out, unless it is thinking of an answer that is not trained."""
    for number, (turn, wanted) in enumerate(texts):
        role = messages[turn]["role"]
        if number in written or (role == "assistant" and turn not in trained):
            continue
        shown = wanted if len(wanted) <= 40 else f"{wanted[:37]}..."
        fix = "; put it into the first user turn" if role == "system" else ""
        fix = "; data.train_on: last_assistant may work" if role == "assistant" and turn != trained[-1] else fix
        raise RowError(f"the chat template leaves out text of turn {turn + 1} ({role}): {shown!r}{fix}")


def _rename_call(call: Message, mark: Callable[[str], str]) -> Message:
    function = call.get("function", call)
    renamed = {**function, "name": mark(str(function.get("name", "")))}
    return {**call, "function": renamed} if "function" in call else renamed


def _read_number(digits: str) -> int:
    return int("".join(str(ord(digit) - _ZERO) for digit in digits))
