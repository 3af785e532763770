"""kill -9 at random moments, most of them inside a save, and at every boundary of a save: nothing is lost but steps.

    python tests/campaign/kills.py --kills 200        bar 1
    python tests/campaign/kills.py --states           bar 2

Every run is a process of its own, and so is every run that goes on. What it ends with is compared, byte by byte, with
a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import forkserver
from small_runs import compare_runs, last_step, list_state, print_table, write_run_file

SAVE_STEPS = 2
FILES = (
    "weights.safetensors",
    "optimizer.safetensors",
    "ema.safetensors",
    "state.json",
    "trainer_state.json",
    "rng-0.json",
)
PLACES = (
    *(f"save:{name}{when}" for name in FILES for when in (":begin", "", ":end")),
    *("save:manifest", "save:rename", "save:renamed", "save:rotate", "save:trash"),
)
KINDS = ("full", "lora")


@dataclass
class Tally:
    """What became of the killed runs."""

    counts: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    most_lost: int = 0
    most_lost_in_a_save: int = 0


def main() -> int:
    """Runs the campaign; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--states", action="store_true")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    print(f"seed {options.seed}; imports took {forkserver.import_all():.1f} s")
    root = Path(tempfile.mkdtemp(prefix="forge-kills-"))  # no finalizer: a child that exits would run it
    environment = {"FORGE_CACHE": str(root / "cache")}
    straight, seconds = {}, {}
    for kind in KINDS:
        path = write_run_file(root / "straight", kind)
        child = forkserver.run(["train", str(path)], root / f"{kind}.log", environment)
        assert child.code == 0, child.read_log()
        straight[kind], seconds[kind] = root / "straight" / "runs" / kind, child.seconds
    failures = 0
    if options.kills:
        failures += _random_kills(options, root, environment, straight, seconds)
    if options.states:
        failures += _every_state(root, environment, straight)
    shutil.rmtree(root)
    return 1 if failures else 0


def _random_kills(options, root: Path, environment: dict, straight: dict, seconds: dict) -> int:
    draw = random.Random(options.seed)
    tallies = {kind: Tally() for kind in KINDS}
    for number in range(options.kills):
        kind = KINDS[number % len(KINDS)]
        inside = draw.random() < 0.65
        fault = f"kill@{draw.choice(PLACES[:-2])}:{draw.choice((1, 2, 4, 6, 8))}" if inside else ""
        after = draw.uniform(0.1, 1.0) * seconds[kind]
        _kill_once(root / f"run-{number}", kind, fault, after, environment, straight[kind], tallies[kind])
    rows = []
    for kind, tally in tallies.items():
        c = tally.counts
        rows.append(
            [
                kind,
                c["runs"],
                c["in a save"],
                c["finished before"],
                c["before the first save"],
                c["resumed"],
                c["equal"],
                c["visible but corrupt"],
                tally.most_lost,
                tally.most_lost_in_a_save,
                len(tally.failures),
            ]
        )
        print("\n".join(tally.failures[:5]))
    header = [
        "trained",
        "kills",
        "inside a save",
        "came too late",
        "before the first save",
        "resumed",
        "bit-equal",
        "visible but corrupt",
        "most steps lost",
        "killed while writing",
        "failures",
    ]
    print_table(f"kill -9 at random moments (a checkpoint every {SAVE_STEPS} steps)", rows, header)
    return sum(len(tally.failures) for tally in tallies.values())


def _kill_once(folder: Path, kind: str, fault: str, after: float, environment: dict, straight: Path, tally) -> None:
    """Kills one run, looks at what it left, lets it go on, and compares."""
    tally.counts["runs"] += 1
    run = folder / "runs" / kind
    path = write_run_file(folder, kind)
    child = forkserver.start(["train", str(path)], folder / "train.log", {**environment, "FORGE_FAULT": fault})
    if fault:
        child.wait(60)
    else:
        child.wait(after)
        child.send(signal.SIGKILL)
        child.wait(10)
    if child.code == 0:
        tally.counts["finished before"] += 1
        shutil.rmtree(folder)
        return
    label = f"{kind} {fault or f'after {after:.2f} s'}"
    if child.code != 137:
        tally.failures.append(f"{label}: exit {child.code}: {child.read_log()[-300:]}")
        return
    if (run / "run.json").exists() and "finished" in json.loads((run / "run.json").read_text()):
        tally.counts["finished before"] += 1  # nothing was left to do but to end the process
        if wrong := compare_runs(straight, run):
            tally.failures.append(f"{label}: {wrong}")
        shutil.rmtree(folder)
        return
    saving = bool(list((run / "checkpoints").glob(".tmp-*")))
    tally.counts["in a save"] += bool(fault) or saving
    step, corrupt = list_state(run) if (run / "run.json").exists() else (0, [])
    tally.counts["visible but corrupt"] += len(corrupt)
    if step:
        lost = last_step(run) - step
        if saving:
            tally.most_lost_in_a_save = max(tally.most_lost_in_a_save, lost)
        else:
            tally.most_lost = max(tally.most_lost, lost)
        again = forkserver.run(["resume", str(run)], folder / "resume.log", environment)
        tally.counts["resumed"] += again.code == 0
    else:
        tally.counts["before the first save"] += 1
        lost = 0
        again = forkserver.run(["train", str(path), "--overwrite"], folder / "resume.log", environment)
    wrong = compare_runs(straight, run) if again.code == 0 else [f"exit {again.code}: {again.read_log()[-300:]}"]
    tally.counts["equal"] += not wrong
    # Training goes on while a save is written, and the next one waits for it: two intervals bound what is lost then.
    if wrong or corrupt or lost > (2 if saving else 1) * SAVE_STEPS:
        tally.failures.append(f"{label}: {wrong} {corrupt} lost {lost}")
    else:
        shutil.rmtree(folder)


def _every_state(root: Path, environment: dict, straight: dict) -> int:
    tally_of = {}
    for kind in KINDS:
        tally = tally_of[kind] = Tally()
        export = ("adapter", "adapter-raw") if kind == "lora" else ("model", "model-raw")
        places = [f"{place}:{step}" for place in PLACES[:-1] for step in (1, 6)]
        places += ["save:trash", *(f"export:{name}{when}" for name in export for when in ("", ":rename"))]
        for number, place in enumerate(places):
            folder = root / f"state-{kind}-{number}"
            _kill_once(folder, kind, f"kill@{place}", 0, environment, straight[kind], tally)
    rows = []
    for kind, tally in tally_of.items():
        c = tally.counts
        rows.append(
            [
                kind,
                c["runs"],
                c["finished before"],
                c["before the first save"],
                c["resumed"],
                c["equal"],
                c["visible but corrupt"],
                tally.most_lost,
                tally.most_lost_in_a_save,
                len(tally.failures),
            ]
        )
        print("\n".join(tally.failures[:5]))
    header = [
        "trained",
        "states",
        "not reached",
        "before the first save",
        "resumed",
        "bit-equal",
        "visible but corrupt",
        "most steps lost",
        "killed while writing",
        "failures",
    ]
    print_table("kill -9 at every boundary of a save and an export", rows, header)
    return sum(len(tally.failures) for tally in tally_of.values())


if __name__ == "__main__":
    sys.exit(main())
