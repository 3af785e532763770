"""``forge models``: models whose shape is known without loading them."""

from __future__ import annotations

from typing import Annotated

import typer

from forge_cli.cli.render import print_json, print_table


def list_models(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the models by alias; any other causal language model of the hub or a folder works as well."""
    from forge_cli.facts.model_facts import list_models as list_facts
    from forge_cli.units import format_count

    models = list_facts()
    if json:
        print_json([facts._asdict() for facts in models])
        return
    rows = [
        (
            facts.name,
            format_count(facts.num_parameters) if facts.num_parameters else "?",
            str(facts.num_hidden_layers),
            facts.hub_id or "(embedded)",
        )
        for facts in models
    ]
    print_table(rows, header=("alias", "parameters", "layers", "hub name"), right=(1, 2))


FUNCTIONS = {"list": list_models}
