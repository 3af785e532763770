"""``forge export``: a GGUF file for llama.cpp and Ollama that answers like the trained model."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from forge_cli.cli.chat import RunFolder
from forge_cli.cli.render import note, print_json


def export(
    run: RunFolder = None,
    gguf: Annotated[Literal["q8_0", "f16", "bf16", "f32"], typer.Option("--gguf", help="Number format.")] = "q8_0",
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="File.", show_default="RUN/gguf/NAME-FORMAT.gguf")
    ] = None,
    converter: Annotated[
        Path | None,
        typer.Option(
            "--converter", metavar="PATH", envvar="LLAMA_CPP_DIR", help="llama.cpp or its convert_hf_to_gguf.py."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was measured as JSON.")] = False,
) -> None:
    """Write a GGUF file of a run, read it back, and compare prompts and answers."""
    from forge_cli.results.find import choose_run
    from forge_cli.results.session import working_on

    chosen = choose_run(run, with_weights=True)
    with working_on(chosen):
        from forge_cli.results.export import export_run

        result = export_run(chosen, gguf, output, converter=converter, say=note)
    print_json(result) if as_json else print("\n".join(describe_export(result)))


def describe_export(result: dict) -> list[str]:
    """Writes what an export measured, for people."""
    from forge_cli.units import format_bytes

    lines = [f"{result['file']}: {format_bytes(result['bytes'])}, {result['format']}"]
    if result["checked"]:
        lines.append(f"  prompts   {result['prompts']} rendered to the same tokens by the file's own template")
        ties = f"; ties: {result['ties']}" if result["ties"] else ""
        lines.append(f"  answers   {result['equal']} of {result['compared']} greedy tokens are the model's{ties}")
    else:
        lines.append(f"  note: not compared with the model: {result['not_checked']}")
    if result["modelfile"]:
        lines.append(f"  ollama    ollama create NAME -f {shlex.quote(str(result['modelfile']))}")
    else:
        lines.append("  note: the Modelfile there is not Forge's and was left alone")
    return lines


FUNCTIONS = {"export": export}
