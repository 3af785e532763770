"""Bytes of run files and rows, and arguments, that nobody would write: `python tests/campaign/fuzz.py --minutes 30`.

A case fails if Forge ends in an internal error or a traceback, takes more than 5 s or 300 MB, writes outside its
folder, uses the network, starts a process or imports torch. `--replay FILE` runs a kept case again, with its traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from fuzz_cases import PARTS, generate

BATCH = 100
_FORGE = Path(__file__).parents[2]
_TINY = "model: {name: forge-tiny}\ndata: {train: rows.jsonl, max_length: 64, on_overlong: drop, max_lost_ratio: 1}\n"
_ROWS = '{"text": "a b c"}\n'
_FILES = {"run.yaml": _TINY, "rows.jsonl": _ROWS}
# What loads the modules of a part before it is forked.
WARM = {
    "yaml": [["config", "show", "run.yaml"], ["train", "--dry-run", "run.yaml"], ["estimate", "run.yaml"]],
    "rows": [["data", "preview", "run.yaml"], ["data", "check", "run.yaml"]],
    "arguments": [
        ["estimate", "run.yaml"],
        ["data", "check", "run.yaml"],
        ["data", "preview", "run.yaml"],
        ["config", "validate", "run.yaml"],
    ],
}


@dataclass
class Tally:
    """What came of the cases of one part."""

    cases: int = 0
    slowest: float = 0.0
    memory_mb: float = 0.0
    start_mb: float = 0.0
    codes: Counter = field(default_factory=Counter)
    failures: list[dict] = field(default_factory=list)


class Worker:
    """The process that runs cases, in a folder of its own.

    Args:
        part: Whose modules are loaded.
        folder: An empty folder.
    """

    def __init__(self, part: str, folder: Path) -> None:
        self.folder = folder
        (folder / "run").mkdir(parents=True)
        own = {"HOME": folder, "FORGE_CACHE": folder / "cache", "TMPDIR": folder, "HF_HOME": folder / "hub"}
        settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYDANTIC_DISABLE_PLUGINS": "__all__"}
        command = [sys.executable, Path(__file__).with_name("fuzz_worker.py"), folder / "run"]
        environment = {**os.environ, **settings, **{key: str(value) for key, value in own.items()}}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=_FORGE
        )
        self.start_mb = self.ask([{"args": args, "files": _FILES} for args in WARM[part]])["memory_mb"]

    def ask(self, cases: list[dict]) -> list | dict:
        """Sends cases and waits for their outcomes."""
        self.process.stdin.write(json.dumps(cases) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def run_part(part: str, seconds: float, start: int, folder: Path) -> Tally:
    """Runs cases of one part until its time is over."""
    worker = Worker(part, folder / part)
    tally = Tally(start_mb=worker.start_mb)
    until = time.monotonic() + seconds
    number = start
    while time.monotonic() < until:
        number += 1
        cases = list(generate(part, number, BATCH))
        for first in range(0, len(cases), 20):
            some = cases[first : first + 20]
            for case, outcome in zip(some, worker.ask(some), strict=True):
                tally.cases += 1
                tally.codes[str(outcome["code"])] += 1
                tally.slowest = max(tally.slowest, outcome["seconds"])
                tally.memory_mb = max(tally.memory_mb, outcome["memory_mb"])
                if outcome["wrong"]:
                    tally.failures.append({"part": part, **outcome, "case": case})
            if time.monotonic() >= until:
                break
    worker.process.stdin.close()
    worker.process.wait(timeout=30)
    return tally


def replay(path: Path, folder: Path) -> None:
    """Runs a kept case again and prints what Forge says."""
    kept = json.loads(path.read_text())
    worker = Worker(kept["part"], folder / "replay")
    (outcome,) = worker.ask([{**kept["case"], "args": [*kept["case"]["args"], "--debug"]}])
    print(json.dumps({"args": kept["case"]["args"], **{k: outcome[k] for k in ("code", "seconds", "wrong")}}, indent=1))
    print(outcome["said"])


def show(part: str, one: Tally, kept: Path) -> None:
    """Prints the row of a part, and keeps each input that failed."""
    codes = " ".join(f"{code}:{count}" for code, count in sorted(one.codes.items()))
    sizes = f"{one.slowest:9.2f} {one.memory_mb:8.0f} {one.start_mb:8.0f}"
    print(f"{part:10} {one.cases:7} {len(one.failures):8} {sizes}  {codes}", flush=True)
    for number, failure in enumerate(one.failures):
        kept.mkdir(exist_ok=True)
        path = kept / f"{part}-{number}.json"
        path.write_text(json.dumps(failure))
        print(f"{path}: {failure['case']['args']!a} {failure['wrong']!a}"[:600], flush=True)


def main() -> None:
    """Runs the campaign and prints one table; exit code 1 if a case failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--keep", type=Path, default=Path("fuzz-failures"), help="Folder for inputs that failed.")
    parser.add_argument("--replay", type=Path, metavar="FILE")
    chosen = parser.parse_args()
    start = secrets.randbelow(2**32) if chosen.seed is None else chosen.seed
    with tempfile.TemporaryDirectory() as folder:
        if chosen.replay:
            replay(chosen.replay, Path(folder))
            return
        print(f"seed {start}")
        print(
            f"{'part':10} {'cases':>7} {'failures':>8} {'slowest s':>9} {'peak MB':>8} {'at start':>8}  exit codes",
            flush=True,
        )
        failures = 0
        for part in chosen.parts:
            tally = run_part(part, 60 * chosen.minutes / len(chosen.parts), start, Path(folder))
            show(part, tally, chosen.keep)
            failures += len(tally.failures)
        strange = {one.name for one in Path(folder).iterdir()} - {*PARTS}
        print(*(f"strange file: {one}" for one in strange), sep="\n", end="")
    sys.exit(1 if strange or failures else 0)


if __name__ == "__main__":
    main()
