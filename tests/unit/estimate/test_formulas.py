"""Every formula says its unit and where it comes from."""

from __future__ import annotations

import ast
from pathlib import Path

import forge_cli.estimate

FILES = sorted(Path(forge_cli.estimate.__file__).parent.glob("*.py"))
NUMBERS = {"int", "float", "Peaks", "dict[str, int]", "StepFlops", "StepTime"}
# No formulas: they read what somebody typed.
NOT_FORMULAS = {"read_price"}


def test_formulas_name_units_and_source():
    checked, lacking = 0, []
    for file in FILES:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or node.name in NOT_FORMULAS:
                continue
            if node.returns is None or ast.unparse(node.returns).removesuffix(" | None") not in NUMBERS:
                continue
            checked += 1
            text = ast.get_docstring(node) or ""
            if "Units: " not in text or "Source: " not in text:
                lacking.append(f"{file.name}:{node.lineno} {node.name}")
    assert checked > 15 and not lacking, lacking
