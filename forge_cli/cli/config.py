"""``forge config``: show, explain and check run files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from forge_cli.cli.render import print_json


RunFile = Annotated[Path, typer.Argument(help="Run file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Set one value, as if in the run file.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def validate(run_file: RunFile, overrides: Overrides = None, json: Json = False) -> None:
    """Check a run file and name every problem in it."""
    from forge_cli.errors import ForgeError
    from forge_cli.resolve.plan import resolve_plan

    try:
        plan = resolve_plan(run_file, overrides or [])
    except ForgeError as error:
        if not json:
            raise
        print_json({"valid": False, "problems": [vars(problem) for problem in error.problems]})
        raise typer.Exit(error.exit_code) from None
    warnings = [str(warning) for warning in plan.derived.warnings]
    if json:
        print_json({"valid": True, "digest": plan.digest, "warnings": warnings})
        return
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    print(f"{run_file} is valid, plan {plan.digest[:12]}")


def show(run_file: RunFile, overrides: Overrides = None, json: Json = False) -> None:
    """Print the whole plan: every setting, after preset, recipe, run file and --set."""
    from forge_cli.resolve.plan import dump_plan, resolve_plan

    plan = resolve_plan(run_file, overrides or [])
    if json:
        print_json({"digest": plan.digest, "spec": plan.spec.model_dump(mode="json")})
    else:
        print(dump_plan(plan), end="")


def explain_setting(
    run_file: RunFile,
    setting: Annotated[str, typer.Argument(help="Dotted path or section; all settings without it.")] = "",
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Say who set a value, and whom that hid."""
    from forge_cli.resolve.plan import explain, resolve_plan

    explanations = explain(resolve_plan(run_file, overrides or []), setting)
    if json:
        from dataclasses import asdict

        print_json([asdict(explanation) for explanation in explanations])
    else:
        print("\n".join(str(explanation) for explanation in explanations))


def schema() -> None:
    """Print the JSON Schema of a run file, for editors."""
    from forge_cli.cli.json_schema import build_json_schema

    print_json(build_json_schema())


FUNCTIONS = {"show": show, "explain": explain_setting, "validate": validate, "schema": schema}
