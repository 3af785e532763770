"""CPU time of the quick commands, as a share of what Python needs to import their four libraries.

    python tests/benchmarks/start_up.py

The least of several interleaved runs each; budgets are 0.8, 0.8, 1.6 and, for
estimates, 2.0. What the commands may import at all is
a test (tests/architecture/test_start_up.py); this is how long it takes.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROUNDS = 15
RUN_FILE = """
preset: lora
model: {name: mistral-7b}
data: {train: "forge:quickstart/train"}
"""


def measure_cpu_seconds(arguments: list[str], environment: dict[str, str]) -> float:
    """Returns user and system time of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(arguments, check=True, capture_output=True, env=environment, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measures and prints."""
    forge = [str(Path(sys.executable).parent / "forge")]
    # Compiled files must be there, as they are after a first run.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}
    with tempfile.TemporaryDirectory() as folder:
        run_file = Path(folder) / "run.yaml"
        run_file.write_text(RUN_FILE, encoding="utf-8")
        commands = {
            "import typer, rich, pydantic, yaml": [sys.executable, "-c", "import typer, rich, pydantic, yaml"],
            "forge --help": [*forge, "--help"],
            "forge presets list": [*forge, "presets", "list"],
            "forge config validate": [*forge, "config", "validate", str(run_file)],
            "forge estimate run.yaml --gpu": [*forge, "estimate", str(run_file), "--gpu", "rtx-4090"],
            "forge estimate --model mistral-7b": [*forge, "estimate", "--model", "mistral-7b"],
            "forge estimate ... --max length": [*forge, "estimate", str(run_file), "--max", "length", "--gpu", "l4"],
        }
        best = dict.fromkeys(commands, float("inf"))
        for _ in range(ROUNDS):
            for command, arguments in commands.items():
                best[command] = min(best[command], measure_cpu_seconds(arguments, environment))
    base = best["import typer, rich, pydantic, yaml"]
    for command, seconds in best.items():
        print(f"{command:36} {seconds:.4f} s  {seconds / base:.2f}")


if __name__ == "__main__":
    main()
