"""``forge push``: a run's weights on the hub, private unless asked otherwise."""

from __future__ import annotations

from typing import Annotated

import typer

from forge_cli.cli.chat import RunFolder
from forge_cli.cli.render import note, print_json


def push(
    run: RunFolder = None,
    repo: Annotated[
        str, typer.Option("--repo", metavar="USER/NAME", help="Repository; made if need be.", show_default=False)
    ] = ...,
    public: Annotated[bool, typer.Option("--public", help="Everybody may see it.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="The merged model, not the adapter.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List files and sizes; upload nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Upload a run's weights, tokenizer and model card to the hub."""
    from forge_cli.results.find import choose_run
    from forge_cli.results.session import working_on

    chosen = choose_run(run, with_weights=True)
    with working_on(chosen):
        from forge_cli.results.push import push_run

        result = push_run(chosen, repo, public=public, merged=merged, dry_run=dry_run, say=note)
    print_json(result) if as_json else _print_result(result)


def _print_result(result: dict) -> None:
    from forge_cli.cli.render import print_table
    from forge_cli.redaction import printable
    from forge_cli.units import count_of, format_bytes

    kind = "private" if result["private"] else "public"
    files = result["files"]
    what = f"{count_of(len(files), 'file', 'files')}, {format_bytes(sum(files.values()))}"
    print(
        f"{printable(result['url'])}: {what}" if result["url"] else f"would upload {what} to {result['repo']} ({kind})"
    )
    print_table([("  " + printable(name), format_bytes(size)) for name, size in files.items()], right=(1,))
    if result["left_out"]:
        print(f"left out: {', '.join(printable(one) for one in result['left_out'])}")


FUNCTIONS = {"push": push}
