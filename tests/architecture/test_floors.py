"""Rooms are floors: a room imports only rooms below it, and the lower ones know no torch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import forge_cli.paths

PACKAGE = Path(forge_cli.paths.__file__).parent
# From the ground up; rooms that share a floor do not import each other.
FLOORS = [
    {"errors", "units", "paths", "version", "redaction"},
    {"faults"},
    {"checkpoints"},
    {"schema"},
    {"facts"},
    {"resolve"},
    {"parts", "estimate", "report"},
    {"data"},
    {"backend"},
    {"build"},
    {"run"},
    {"results", "start"},
    {"api"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
TORCH_FREE = {
    "errors",
    "units",
    "paths",
    "version",
    "redaction",
    "faults",
    "checkpoints",
    "schema",
    "facts",
    "resolve",
    "estimate",
    "report",
    "start",
    "cli",
    "__main__",
}
HEAVY = {"torch", "transformers", "datasets", "peft", "trl", "accelerate", "bitsandbytes", "numpy", "safetensors"}
# Imported when a command needs them, not to show a list.
SLOW_TO_START = {"yaml", "pydantic", "rich", "importlib.metadata"}
LOADED_LATE = {
    "json_schema.py",
    "live.py",
    *(f"estimate_{one}.py" for one in ("json", "plot", "question", "tasks", "text")),
}
BACKEND_ONLY = {"trl", "SFTConfig", "SFTTrainer", "DPOConfig", "DPOTrainer", "TrainingArguments"}

FILES = sorted(path for path in PACKAGE.rglob("*.py") if "_data" not in path.parts)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def label(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_of(tree: ast.AST) -> list[tuple[str, int]]:
    """Lists (module, line) of all imports, those inside functions too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            found.append((node.module or "", node.lineno))
            # `from forge_cli import units` names a room, not the package.
            found += [(f"{node.module}.{a.name}", node.lineno) for a in node.names if node.module == "forge_cli"]
    return found


def test_every_room_has_a_floor():
    rooms = {room_of(path) for path in FILES} - {"__init__"}
    assert rooms == set(LEVEL)
    assert len(FILES) > 30


@pytest.mark.parametrize("path", FILES, ids=label)
def test_a_room_imports_only_rooms_below_it(path):
    room = room_of(path)
    if room == "__init__":
        return  # the lazy face of the package stands on everything
    for module, line in imports_of(parse(path)):
        parts = module.split(".")
        if parts[0] != "forge_cli" or len(parts) < 2:
            continue
        target = parts[1]
        assert target == room or LEVEL[target] < LEVEL[room], f"{label(path)}:{line} imports {module}"


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in TORCH_FREE], ids=label)
def test_torch_free_rooms_name_no_heavy_library(path):
    for module, line in imports_of(parse(path)):
        assert module.split(".")[0] not in HEAVY, f"{label(path)}:{line} imports {module}"


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "data"], ids=label)
def test_the_data_room_imports_heavy_libraries_late_and_torch_never(path):
    tree = parse(path)
    for module, line in imports_of(tree):
        assert module.split(".")[0] not in {"torch", "trl", "peft", "accelerate", "bitsandbytes"}, (
            f"{label(path)}:{line}"
        )
    for node in tree.body:
        for module, line in imports_of(node) if isinstance(node, ast.Import | ast.ImportFrom) else ():
            assert module.split(".")[0] not in HEAVY | {"pyarrow", "tokenizers"}, (
                f"{label(path)}:{line} imports {module}"
            )


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "cli"], ids=label)
def test_commands_import_nothing_slow_at_module_level(path):
    if path.name in LOADED_LATE:
        return
    for node in parse(path).body:
        for module, line in imports_of(node) if isinstance(node, ast.Import | ast.ImportFrom) else ():
            assert module not in SLOW_TO_START, f"{label(path)}:{line} imports {module}"
            room = module.split(".")[1] if module.startswith("forge_cli.") else ""
            assert room in {"", "cli", "errors", "version", "units", "paths"}, f"{label(path)}:{line} imports {module}"


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) != "backend"], ids=label)
def test_only_the_backend_names_trl_and_its_arguments(path):
    tree = parse(path)
    names = {module.split(".")[0] for module, _ in imports_of(tree)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names}
    # The Python face promises TrainingArguments as a return type; it gets them from the backend.
    allowed = {"TrainingArguments"} if room_of(path) == "api" else set()
    assert names & BACKEND_ONLY <= allowed


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py" and p.parent != PACKAGE], ids=label)
def test_a_rooms_init_holds_a_docstring_only(path):
    (only,) = parse(path).body
    assert isinstance(only, ast.Expr) and isinstance(only.value, ast.Constant)
