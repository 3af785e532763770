"""``forge merge``: one model out of base and adapter, proven equal to both."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from forge_cli.cli.chat import RunFolder
from forge_cli.cli.render import note, print_json


def merge(
    run: RunFolder = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Folder to write.", show_default="RUN/merged")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The last step's weights, not the averaged ones.")] = False,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option("--dtype", help="Number format; auto: the one the run computes in here."),
    ] = "auto",
    max_difference: Annotated[
        float | None,
        typer.Option("--max-difference", metavar="X", min=0, help="Largest difference of a logit; else by format."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was measured as JSON.")] = False,
) -> None:
    """Merge a run's adapter into its base, and compare the written model with both."""
    from forge_cli.results.find import choose_run
    from forge_cli.results.session import working_on

    chosen = choose_run(run, with_weights=True)
    with working_on(chosen):
        from forge_cli.results.merge import merge_run

        proof = merge_run(
            chosen, output, which="raw" if raw else "ema", dtype=dtype, most_difference=max_difference, say=note
        )
    print_json(proof) if as_json else print("\n".join(describe_merge(proof)))


def describe_merge(proof: dict) -> list[str]:
    """Writes what a merge measured, for people."""
    from forge_cli.redaction import printable
    from forge_cli.units import format_bytes

    where = proof["where"]
    place = f"text {where['text']}, position {where['position']}, token {printable(repr(where['token']))}"
    lines = [
        f"{proof['folder']}  {format_bytes(proof['bytes'])}, {proof['dtype']}",
        f"  compared    with base and adapter on {proof['tokens']} tokens of {proof['texts_from']}",
        f"  difference  {proof['largest_difference']:.2e} at most, bound {proof['bound']:.1e} ({place})",
        f"  effect      {proof['largest_effect']:.2e} at most against the base alone, "
        f"{100 * proof['effect_share']:.0f} % of the adapter's",
    ]
    if proof["is_coarse"]:
        lines.append(f"  note: rounding to {proof['dtype']} is as large as what was trained: try --dtype float32")
    if quantized := proof["quantized"]:
        lines += _describe_quantized(quantized)
    return lines


def _describe_quantized(quantized: dict) -> list[str]:
    from forge_cli.redaction import printable

    first = f"  note: it was trained on a {quantized['bits']}-bit base and merged into the full one;"
    if "not_measured" in quantized:
        return [first, f"        what that shifts was not measured: {printable(quantized['not_measured'])}"]
    return [
        first,
        f"        logits shift by {quantized['mean_difference']:.2g} in the mean, KL {quantized['kl_nats']:.2g} nats,",
        f"        the likeliest token is the same for {100 * quantized['top1_agreement_ratio']:.1f} % of positions",
    ]


FUNCTIONS = {"merge": merge}
