"""What to type after a run."""

from __future__ import annotations

import shlex
from pathlib import Path

from forge_cli.paths import data_root
from forge_cli.resolve.sources import EMBEDDED_MODEL
from forge_cli.schema.runspec import RunSpec
from forge_cli.units import GIB

_BIG_GPU_BYTES = 70 * GIB
# Where no recipe is called like the preset or the method.
_NEAREST = {"cpo": "simpo", "sft": "qlora"}


def suggest_next(spec: RunSpec, folder: Path, gpu_bytes: int) -> str:
    """Suggests the same on a real model after a run of the embedded one, else where to read on.

    Args:
        spec: What was run.
        folder: The run folder.
        gpu_bytes: Memory of the GPU; 0 without one.
    """
    is_lesson = spec.model.name.casefold() == EMBEDDED_MODEL and "forge:" in str(spec.data.train)
    if not is_lesson:
        if spec.method == "reward":
            return f"less {shlex.quote(str(folder / 'report.md'))}   (it shows how to load the result)"
        return f"forge chat {shlex.quote(str(folder))}"
    recipes = {path.stem: path for path in (data_root() / "recipes").glob("*-7b*.yaml")}
    size = "80gb" if gpu_bytes > _BIG_GPU_BYTES else "24gb"
    kinds = (spec.preset, spec.method, _NEAREST.get(spec.method))
    names = [name for kind in kinds for name in (f"{kind}-7b-{size}", f"{kind}-7b") if name in recipes]
    with recipes[names[0]].open(encoding="utf-8") as file:
        title = file.readline().strip("# \n")
    return f"forge recipes copy {names[0]} my-run.yaml   ({title})"
