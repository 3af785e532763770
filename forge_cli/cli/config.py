"""``forge config``: show, explain and check run files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from forge_cli.cli.plugin_search import skip_plugin_search
from forge_cli.cli.render import print_json
from forge_cli.errors import ForgeError

if TYPE_CHECKING:
    from forge_cli.resolve.plan import Plan


RunFile = Annotated[Path, typer.Argument(metavar="RUN_FILE", help="Run file (YAML).", show_default=False)]
MaybeRunFile = Annotated[
    Path, typer.Argument(metavar="[RUN_FILE]", help="Run file (YAML); default: run.yaml.", show_default=False)
]
DEFAULT_FILE = Path("run.yaml")
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Set one value, as if in the run file.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def validate(run_file: MaybeRunFile = DEFAULT_FILE, overrides: Overrides = None, json: Json = False) -> None:
    """Check a run file and name every problem in it."""
    try:
        plan = _resolve(run_file, overrides)
    except ForgeError as error:
        if not json:
            raise
        problems = [
            {"where": p.where, "path": p.path, "what": p.what, "why": p.why, "fix": p.fix} for p in error.problems
        ]
        print_json({"valid": False, "problems": problems})
        raise typer.Exit(error.exit_code) from None
    warnings = [str(warning) for warning in plan.derived.warnings]
    if json:
        print_json({"valid": True, "digest": plan.digest, "warnings": warnings})
        return
    for warning in warnings:
        typer.echo(f"warning: {warning}", err=True)
    print(f"{run_file} is valid, plan {plan.digest[:12]}")


def show(run_file: MaybeRunFile = DEFAULT_FILE, overrides: Overrides = None, json: Json = False) -> None:
    """Print the whole plan: every setting, after preset, recipe, run file and --set."""
    plan = _resolve(run_file, overrides)
    if json:
        print_json({"digest": plan.digest, "spec": plan.spec.model_dump(mode="json")})
    else:
        from forge_cli.resolve.plan import dump_plan

        print(dump_plan(plan), end="")


def explain_setting(
    run_file: RunFile,
    setting: Annotated[
        str, typer.Argument(metavar="SETTING", help="Dotted path or section; default: all settings.")
    ] = "",
    overrides: Overrides = None,
    json: Json = False,
) -> None:
    """Say who set a value, and whom that hid."""
    plan = _resolve(run_file, overrides)
    from forge_cli.resolve.plan import explain

    explanations = explain(plan, setting)
    if json:
        print_json(
            [
                {
                    "path": one.path,
                    "value": one.value,
                    "origin": one.origin._asdict(),
                    "hides": [origin._asdict() for origin in one.hidden],
                    "description": one.description,
                    "has_no_effect": one.idle,
                }
                for one in explanations
            ]
        )
    else:
        print("\n".join(str(explanation) for explanation in explanations))


def schema() -> None:
    """Print the JSON Schema of a run file, for editors."""
    skip_plugin_search()
    from forge_cli.cli.json_schema import build_json_schema

    print_json(build_json_schema())


def _resolve(run_file: Path, overrides: list[str] | None) -> Plan:
    skip_plugin_search()
    from forge_cli.resolve.plan import resolve_plan

    return resolve_plan(run_file, overrides or [])


FUNCTIONS = {"show": show, "explain": explain_setting, "validate": validate, "schema": schema}
