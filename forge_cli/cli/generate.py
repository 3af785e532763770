"""``forge generate``: answer the prompts of a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from forge_cli.cli.chat import Base, MaxNewTokens, Raw, RunFolder, write
from forge_cli.cli.render import note
from forge_cli.errors import DataError, MachineError
from forge_cli.units import count_of


def generate(
    prompts: Annotated[
        Path,
        typer.Option("--prompts", metavar="FILE", help="Rows with prompt or messages; or .txt, a prompt per line."),
    ],
    run: RunFolder = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write here, whole or not at all, not to stdout.")
    ] = None,
    max_new_tokens: MaxNewTokens = 256,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", min=1, max=32, help="Prompts that are answered at once.")
    ] = 8,
    base: Base = False,
    raw: Raw = False,
) -> None:
    """Answer every prompt of a file with the model of a run, as its evaluation does.

    Writes JSON lines: each row with its answer, in the order of the file.
    """
    if output is not None:
        if output.exists() and prompts.exists() and output.samefile(prompts):
            raise typer.BadParameter("--output would replace the prompts: name another file")
        if output.is_dir() or not output.absolute().parent.is_dir():
            reason = "it is a folder" if output.is_dir() else "there is no such folder"
            raise MachineError(f"cannot be written: {reason}", where=str(output), fix="name a file in a folder")
    if not prompts.is_file():
        raise DataError("no such file", where=str(prompts), fix="name a file of prompts, as JSON lines or text")
    from forge_cli.results.find import choose_run
    from forge_cli.results.session import asking
    from forge_cli.run.folder import write_atomic

    chosen = choose_run(run, with_weights=True)
    note(f"loading {chosen.path} ...")
    with asking(chosen, note):
        from forge_cli.results.ask import Asker
        from forge_cli.results.prompts import answer_prompts, read_prompts

        asker = Asker(chosen, "raw" if raw else "ema")
        note(asker.describe(base))
        asked = read_prompts(prompts, asker, max_new_tokens)
        if answered := sum(one.has_answer for one in asked):
            note(f"note: {count_of(answered, 'row ends', 'rows end')} with an answer; the question before it is asked")
        if replaced := sum("answer" in one.row for one in asked):
            note(f"note: {count_of(replaced, 'row has', 'rows have')} a column answer, which is replaced")
        rows = answer_prompts(asker, asked, max_new_tokens=max_new_tokens, batch_rows=batch_size, base=base, say=note)
        lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        if output is None:
            for line in lines:
                write(line)
        else:
            write_atomic(output, "".join(lines))
            note(f"{output}: {count_of(len(asked), 'answer', 'answers')}")


FUNCTIONS = {"generate": generate}
