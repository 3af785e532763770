"""``forge chat``: talk to what a run trained."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from forge_cli.cli.render import note

RunFolder = Annotated[
    Path | None,
    typer.Argument(metavar="[RUN]", help="Run folder; the newest one with weights if left out.", show_default=False),
]
Base = Annotated[bool, typer.Option("--base", help="Ask the model before training.")]
Raw = Annotated[bool, typer.Option("--raw", help="Take the last step's weights instead of the averaged ones (EMA).")]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", metavar="N", min=1, max=1_000_000, help="Longest answer, in tokens.")
]


def chat(
    run: RunFolder = None,
    base: Base = False,
    raw: Raw = False,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", metavar="T", min=0.0, max=100.0, help="Draw tokens; default: the likeliest one."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", metavar="P", min=0.0, max=1.0, help="Draw from the likeliest tokens of this share."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="S", min=0, help="Seed of the drawing.")] = 0,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System prompt; default: the run's own, if any.")
    ] = None,
) -> None:
    """Talk to what a run trained; /help in the chat lists its commands.

    Without a terminal every line of stdin is a question, and only answers go to stdout.
    """
    if top_p is not None and not temperature:
        raise typer.BadParameter("--top-p narrows what is drawn from: give --temperature as well")
    from forge_cli.errors import DataError, ModelError
    from forge_cli.results.find import choose_run
    from forge_cli.results.session import asking

    chosen = choose_run(run, with_weights=True)
    note(f"loading {chosen.path} ...")
    is_live = sys.stdin.isatty()
    with asking(chosen, note):
        from forge_cli.parts.turns import RowError
        from forge_cli.results.ask import Asker, Style, seed_drawing
        from forge_cli.results.chat import Chat

        asker = Asker(chosen, "raw" if raw else "ema")
        if system is not None:
            try:
                asker.set_system(system)
            except RowError as error:
                raise ModelError(str(error), where="--system") from error
        seed_drawing(seed)
        style = Style(max_new_tokens, temperature or None, top_p)
        talk = Chat(asker, style, write, note, base=base, is_stoppable=is_live)
        _introduce(talk, raw, is_live)
        for line in _ask_for_lines(talk) if is_live else _read_lines():
            if not talk.take(line):
                break
    if talk.num_unanswered and not is_live:
        raise DataError(f"{talk.num_unanswered} of the lines got no answer", where="stdin", fix="see the notes above")


def _introduce(talk, raw: bool, is_live: bool) -> None:
    note(talk.asker.describe(talk.is_base))
    if raw and not talk.asker.has_ema:
        note("this run had no EMA: there is one set of weights")
    if talk.asker.is_plain:
        note("this model was trained on plain text: it continues each line by itself")
    if is_live:
        note("/help lists commands, Ctrl-C stops an answer, Ctrl-D ends the chat")


def _ask_for_lines(talk) -> Iterator[str]:
    """Yields what a person types, until Ctrl-D or Ctrl-C."""
    is_whole = sys.stdout.isatty()
    if is_whole:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() a history of this chat; nothing is written)
    while True:
        prompt = "\nbase> " if talk.is_base and not talk.compares else "\n> "
        if not is_whole:  # input() would write its prompt to stdout, which is for answers
            print(prompt, end="", file=sys.stderr, flush=True)
        try:
            line = input(prompt if is_whole else "")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        yield line


def _read_lines() -> Iterator[str]:
    sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    yield from sys.stdin


def write(text: str) -> None:
    """Writes a piece of a result; in a terminal without control characters and secrets."""
    from forge_cli.redaction import printable_lines

    print(printable_lines(text) if sys.stdout.isatty() else text, end="", flush=True)


FUNCTIONS = {"chat": chat}
