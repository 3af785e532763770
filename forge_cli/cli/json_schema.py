"""The JSON Schema of a run file, for completion and checks in editors."""

from __future__ import annotations

from typing import Any

from forge_cli.schema.runspec import RunSpec


def build_json_schema() -> dict[str, Any]:
    """Builds the JSON Schema of one run file.

    Nothing is required in it: whatever a file leaves out may come from its preset or its recipe.
    """
    schema = RunSpec.model_json_schema()
    for part in (schema, *schema.get("$defs", {}).values()):
        part.pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Forge run file"}
