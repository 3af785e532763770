"""A conversation with a run's model: turns, commands, and rows that Forge can train on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from forge_cli.parts.turns import RowError
from forge_cli.results.ask import Asker, Fitted, Style, Turn
from forge_cli.run.folder import write_atomic
from forge_cli.units import count_of

COMMANDS = {
    "/help": "this list",
    "/exit": "end; Ctrl-D does the same",
    "/reset": "begin a new conversation",
    "/system TEXT": "set the system prompt; without a text, show it",
    "/compare": "base and trained model answer, one after the other; again: off",
    "/base": "ask the model before training",
    "/trained": "ask the trained model",
    "/ema ema|raw": "ask the averaged weights or those of the last step",
    "/save FILE": "write the conversation as a row to train on (.jsonl)",
}


class Chat:
    """One conversation.

    Args:
        asker: The model.
        style: How it answers.
        write: Receives answers, piece by piece.
        note: Receives everything else, a line at a time.
        base: Ask the base first.
        is_stoppable: Ctrl-C stops an answer; otherwise it ends the chat.
    """

    def __init__(
        self,
        asker: Asker,
        style: Style,
        write: Callable[[str], None],
        note: Callable[[str], None],
        *,
        base: bool = False,
        is_stoppable: bool = False,
    ) -> None:
        self.asker, self.style, self.write, self.note = asker, style, write, note
        self.is_base, self.is_stoppable, self.compares = base, is_stoppable, False
        self.turns: list[Turn] = []
        self.whole: list[bool] = []  # of each answer
        self.num_unanswered = 0
        self._has_dropped = False
        self._saved: set[Path] = set()

    def take(self, line: str) -> bool:
        """Takes a line of the user: a command, or what to answer; tells whether the chat goes on.

        A text that begins with a slash is written with a space before it.
        """
        if line.startswith("/"):
            name, _, rest = line.strip().partition(" ")
            if name in ("/exit", "/quit"):
                return False
            self._command(name, rest.strip())
        elif text := line.strip():
            self._ask(text)
        return True

    def _ask(self, text: str) -> None:
        question: Turn = {"role": "user", "content": text}
        try:
            fitted = self.asker.fit(text if self.asker.is_plain else [*self.turns, question], self.style.max_new_tokens)
        except RowError as error:
            self.num_unanswered += 1
            self.note(f"no answer: {error}")
            return
        if fitted.num_dropped and not self._has_dropped:
            turns = count_of(fitted.num_dropped, "turn", "turns")
            self.note(
                f"the model has {self.asker.positions} positions: from now on old turns are left out, {turns} now"
            )
        self._has_dropped = fitted.num_dropped > 0
        for base in [True, False] if self.compares else [self.is_base]:
            if self.compares:
                self.write("base:\n" if base else "\ntrained:\n")
            answer, is_whole, is_stopped = self._answer(fitted, base)
            # An answer of the side that is chosen goes on the record.
            if answer and base == self.is_base:
                self.turns += [question, {"role": "assistant", "content": answer}]
                self.whole.append(is_whole)
            if is_stopped:
                break

    def _answer(self, fitted: Fitted, base: bool) -> tuple[str, bool, bool]:
        """Writes one answer; returns it, whether it is whole, and whether the user stopped it."""
        parts: list[str] = []

        def write(text: str) -> None:
            parts.append(text)
            self.write(text)

        is_whole = is_stopped = False
        try:
            is_whole = self.asker.answer(fitted, self.style, write, base=base)
        except KeyboardInterrupt:
            if not self.is_stoppable:
                raise
            is_stopped = True
        self.write("\n")
        if is_stopped:
            self.note("stopped" + (", and kept as far as it came" if parts else ""))
        elif not is_whole:
            limit, free = self.style.max_new_tokens, fitted.num_free or self.style.max_new_tokens
            more = f"the model has {self.asker.positions} positions" if free < limit else "--max-new-tokens takes more"
            self.note(f"cut after {count_of(min(limit, free), 'token', 'tokens')}: {more}")
        return "".join(parts), is_whole, is_stopped

    def _command(self, name: str, rest: str) -> None:
        if name == "/help":
            width = max(map(len, COMMANDS))
            for command, meaning in COMMANDS.items():
                self.note(f"  {command:{width}}  {meaning}")
        elif name == "/reset":
            self.turns, self.whole, self._has_dropped = [], [], False
            self.note("a new conversation")
        elif name == "/system":
            self._set_system(rest)
        elif name == "/compare":
            self.compares = not self.compares
            self.note("both answer, the base first" if self.compares else f"only the {self.side} model answers")
        elif name in ("/base", "/trained"):
            self.is_base, self.compares = name == "/base", False
            self.note(f"the {self.side} model answers; the conversation goes on")
        elif name == "/ema":
            self._switch_weights(rest)
        elif name == "/save":
            self._save(rest)
        else:
            self.note(f"there is no {name}; /help lists commands; a space before it makes it text")

    @property
    def side(self) -> str:
        """``base`` or ``trained``."""
        return "base" if self.is_base else "trained"

    def _set_system(self, text: str) -> None:
        if text:
            try:
                self.asker.set_system(text)
            except RowError as error:
                self.note(f"not set: {error}")
                return
        system = self.asker.system
        self.note(f"system prompt: {system}" if system else "no system prompt but the chat template's own, if any")

    def _switch_weights(self, which: str) -> None:
        asker = self.asker
        if not asker.has_ema:
            self.note("this run had no EMA: there is one set of weights")
            return
        if which in ("ema", "raw") and which != asker.which:
            asker.load(which)
        elif which not in ("", "ema", "raw"):
            self.note("write /ema ema or /ema raw")
            return
        self.note("averaged weights (EMA)" if asker.which == "ema" else "raw weights, those of the last step")

    def _save(self, name: str) -> None:
        """Writes the conversation as a row; answers that were cut or stopped are not to be trained."""
        path = Path(name).expanduser()
        if not name.endswith(".jsonl"):
            self.note("write /save FILE.jsonl")
        elif not any(self.whole):
            self.note("not saved: there is no whole answer yet")
        elif path.exists() and path not in self._saved:
            self.note(f"not saved: {path} exists; name another file")
        else:
            try:
                write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.list_rows()))
            except OSError as error:
                self.note(f"not saved: {error.strerror}: {path}")
                return
            self._saved.add(path)
            self.note(f"saved: {path}, {count_of(len(self.whole), 'answer', 'answers')}")

    def list_rows(self) -> list[dict]:
        """Lists the rows that the conversation makes: one of ``messages``; of a model of plain text, one per answer."""
        if self.asker.is_plain:
            pairs = zip(self.turns[::2], self.turns[1::2], self.whole, strict=True)
            return [{"prompt": q["content"], "completion": a["content"]} for q, a, is_whole in pairs if is_whole]
        system = [{"role": "system", "content": self.asker.system}] if self.asker.system else []
        whole = iter(self.whole)
        turns = [turn if turn["role"] == "user" or next(whole) else {**turn, "weight": 0} for turn in self.turns]
        return [{"messages": [*system, *turns]}]
