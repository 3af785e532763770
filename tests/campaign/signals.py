"""Signals at every stage of a run: the exit code tells, nothing hangs, and the run goes on to the same bytes.

    python tests/campaign/signals.py --count 100

Every run is a process of its own. A run whose folder holds a checkpoint is resumed, one that had not begun is started
again; what it ends with is compared, byte by byte, with a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import forkserver
from small_runs import compare_runs, list_state, print_table, write_run_file

from forge_cli.run.folder import RUN_FILE

HANG_SECONDS = 60.0
MANY_ROWS = 5000  # more than are tokenised in one process


@dataclass
class Row:
    """What came of the runs that were hit at one stage."""

    name: str
    codes: list[int | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    num_resumed: int = 0
    num_again: int = 0
    num_equal: int = 0
    num_orphans: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass
class Scene:
    """The undisturbed run and where the others go."""

    root: Path
    run_file: Path
    straight: Path
    seconds: float
    cache: Path
    number: int = 0


def prepare(root: Path, name: str, **changes: object) -> Scene:
    """Writes the run file and carries it out undisturbed."""
    changes = {
        "name": name,
        "training": {"max_steps": 8, "gradient_accumulation_steps": 2},
        "checkpoint": {"save_steps": 3, "save_total_limit": 3},
        **changes,
    }
    run_file = write_run_file(root, "lora", **changes)
    cache = root / f"cache-{name}"
    child = forkserver.run(["train", str(run_file)], root / f"{name}.log", {"FORGE_CACHE": str(cache)})
    if child.code:
        raise SystemExit(child.read_log())
    return Scene(root, run_file, root / "runs" / name, child.seconds, cache)


def hit(scene: Scene, row: Row, wanted: int, environment: dict[str, str], strike: Callable | None) -> bool:
    """Carries out one run, hits it, goes on with it and compares; false if it ended before it was hit.

    Args:
        scene: The undisturbed run.
        row: Takes the result.
        wanted: Exit code that is right.
        environment: Variables of the run that is hit.
        strike: Sends the signals and returns when the last was sent; ``None`` where a fault of the run sends them.
    """
    scene.number += 1
    name = f"hit-{scene.number:04d}"
    run, log = scene.root / "runs" / name, scene.root / "logs" / f"{name}.log"
    arguments = ["train", str(scene.run_file), "--set", f"name={name}"]
    child = forkserver.start(arguments, log, {"FORGE_CACHE": str(scene.cache), **environment})
    struck_at = strike(child) if strike else None
    code = child.wait(HANG_SECONDS)
    stopped_at = time.monotonic()
    has_orphans = code is not None and is_group_alive(child.pid)
    child.kill()
    if code == 0 and wanted:
        shutil.rmtree(run, ignore_errors=True)
        return False
    row.codes.append(code)
    row.num_orphans += has_orphans
    if struck_at:
        row.seconds.append(stopped_at - struck_at)
    text = child.read_log()
    if code != wanted or "Traceback" in text:
        row.faults.append(f"{name}: code {code}\n{text[-1500:]}")
    announced = re.search(r"at step (\d+), which is saved", text)
    if announced and list_state(run)[0] != int(announced[1]):
        row.faults.append(f"{name}: {announced[0]}, but the newest checkpoint is of step {list_state(run)[0]}")
    go_on(scene, row, run, name)
    return True


def go_on(scene: Scene, row: Row, run: Path, name: str) -> None:
    """Does what the message of a stopped run says, and compares."""
    has_begun = (run / RUN_FILE).exists() and list_state(run)[0] > 0
    if has_begun and list_state(run)[1]:
        row.faults.append(f"{name}: visible checkpoints that are not sound: {list_state(run)[1]}")
    is_finished = (run / RUN_FILE).exists() and '"finished": true' in (run / RUN_FILE).read_text()
    if not is_finished:
        again = ["train", str(scene.run_file), "--set", f"name={name}", "--overwrite"]
        arguments = ["resume", str(run)] if has_begun else again
        log = scene.root / "logs" / f"{name}-again.log"
        child = forkserver.run(arguments, log, {"FORGE_CACHE": str(scene.cache), "FORGE_FAULT": ""})
        if child.code != 0:
            row.faults.append(f"{name}: {arguments[0]} gives {child.code}\n{child.read_log()[-1500:]}")
            return
    row.num_resumed += has_begun
    row.num_again += not has_begun
    different = compare_runs(scene.straight, run)
    row.num_equal += not different
    if different:
        row.faults.append(f"{name}: {different}")
    shutil.rmtree(run, ignore_errors=True)


def is_group_alive(group: int) -> bool:
    """Tells whether processes of an ended run are left; they get half a second."""
    for _ in range(50):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.01)
    return True


def after(seconds: float, *numbers: int, gap_seconds: float = 0.0) -> Callable[[forkserver.Child], float]:
    """Builds a strike: signals after some seconds, one after the other."""

    def strike(child: forkserver.Child) -> float:
        child.wait(seconds)
        for place, number in enumerate(numbers):
            child.wait(gap_seconds if place else 0.0)
            child.send(number)
        return time.monotonic()

    return strike


def list_places(rng: random.Random) -> dict[str, list[str]]:
    """Lists faults by stage."""
    files = ("weights.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json")
    saves = [f"save:{one}:{step}" for one in (*files, "manifest", "rename", "renamed") for step in (1, 3, 6, 8)]
    places = {
        "train": [f"step:{step}" for step in range(1, 9)],
        "evaluation": [f"evaluation:{step}" for step in (0, 4, 8)],
        "save": saves,
        "export": [f"export:{name}{when}" for name in ("adapter", "adapter-raw") for when in ("", ":rename")],
        "load": ["load"],
    }
    for one in places.values():
        rng.shuffle(one)
    return places


def hit_with_sigterm(scene: Scene, count: int, rng: random.Random) -> list[Row]:
    """Spreads SIGTERMs over the stages."""
    rows = []
    shares = {"train": 0.1, "evaluation": 0.15, "save": 0.2, "export": 0.12, "load": 0.03}
    for stage, places in list_places(rng).items():
        row = Row(f"SIGTERM, {stage}")
        for number in range(max(1, round(shares[stage] * count))):
            place = places[number % len(places)]
            hit(scene, row, 143, {"FORGE_FAULT": f"term@{place}"}, None)
        rows.append(row)
    row = Row("SIGTERM, any moment")
    while len(row.codes) < round(0.4 * count):
        hit(scene, row, 143, {}, after(rng.uniform(0.0, 0.95 * scene.seconds), signal.SIGTERM))
    return [*rows, row]


def hit_tokenising(root: Path, count: int, rng: random.Random) -> Row:
    """Hits runs while worker processes tokenise."""
    file = root / "many.jsonl"
    texts = (
        f'{{"prompt": "number {n}", "completion": "{" ".join(str(n * k) for k in range(9))}"}}\n'
        for n in range(MANY_ROWS)
    )
    file.write_text("".join(texts))
    scene = prepare(root, "many", data={"train": str(file)})
    row = Row("SIGTERM, tokenising in workers")
    whole = scene.cache
    while len(row.codes) < count:
        scene.cache = root / f"cache-many-{scene.number}"
        started = lambda one=scene.cache: any(one.glob("tokens/.*.partial-*"))  # noqa: E731

        def strike(child: forkserver.Child, started: Callable[[], bool] = started) -> float:
            child.wait_for(started, 30)
            return after(rng.uniform(0.0, 0.5), signal.SIGTERM)(child)

        hit(scene, row, 143, {}, strike)
        if any(scene.cache.glob("tokens/.*.partial-*")):
            row.faults.append("half-written tokens stay")
    scene.cache = whole
    return row


def hit_with_others(scene: Scene, count: int, rng: random.Random) -> list[Row]:
    """Ctrl-C twice, SIGTERM twice, and SIGUSR1, which only saves."""
    twice, terms, usr1 = Row("Ctrl-C twice"), Row("SIGTERM twice"), Row("SIGUSR1")
    while len(twice.codes) < count:
        gap = rng.uniform(0.0, 0.1)
        moment = rng.uniform(0.15 * scene.seconds, 0.9 * scene.seconds)
        hit(scene, twice, 130, {}, after(moment, signal.SIGINT, signal.SIGINT, gap_seconds=gap))
    while len(terms.codes) < count // 2:
        moment = rng.uniform(0.15 * scene.seconds, 0.9 * scene.seconds)
        hit(scene, terms, 143, {}, after(moment, signal.SIGTERM, signal.SIGTERM, gap_seconds=0.02))
    while len(usr1.codes) < count // 2:
        hit(scene, usr1, 0, {"FORGE_FAULT": f"usr1@step:{rng.randint(1, 8)}"}, None)
    return [twice, terms, usr1]


def hit_with_hang(scene: Scene, count: int) -> Row:
    """Lets runs hang in a step, an evaluation or a save: the watchdog ends them and leaves the stacks."""
    row = Row("hang")
    for number in range(count):
        place = ("step:3", "evaluation:4", "save:weights.safetensors:3")[number % 3]
        stacks: list[str] = []

        def strike(child: forkserver.Child, stacks: list[str] = stacks) -> None:
            child.wait(HANG_SECONDS)
            path = scene.root / "runs" / f"hit-{scene.number:04d}" / "logs" / "stacks.txt"
            stacks.append(path.read_text() if path.exists() else "")

        environment = {"FORGE_FAULT": f"hang@{place}", "FORGE_WATCHDOG_SECONDS": "3"}
        hit(scene, row, 12, environment, strike)
        if "forge_cli/faults.py" not in stacks[0]:
            row.faults.append(f"{place}: the stacks do not show where it hung")
    return row


def try_few(scene: Scene) -> list[Row]:
    """Hits a run in a step, in an evaluation and by Ctrl-C twice, and lets one hang: what CI has time for."""
    train, evaluation, twice = Row("SIGTERM, train"), Row("SIGTERM, evaluation"), Row("Ctrl-C twice")
    hit(scene, train, 143, {"FORGE_FAULT": "term@step:2"}, None)
    hit(scene, evaluation, 143, {"FORGE_FAULT": "term@evaluation:3"}, None)
    if "step 3/4  eval loss" in (scene.root / "logs" / f"hit-{scene.number:04d}.log").read_text():
        evaluation.faults.append("the evaluation was not abandoned")

    def strike(child: forkserver.Child) -> float:
        child.wait_for(lambda: "step 2/" in child.read_log(), 30)
        return after(0.0, signal.SIGINT, signal.SIGINT, gap_seconds=0.005)(child)

    hit(scene, twice, 130, {}, strike)
    return [train, evaluation, twice, hit_with_hang(scene, 1)]


def try_all(scene: Scene, options: argparse.Namespace, rng: random.Random) -> list[Row]:
    """Carries out the whole campaign."""
    num_tokenising = max(1, options.count // 10)
    num_others = options.count - num_tokenising
    rows = hit_with_sigterm(scene, num_others, rng)
    while sum(len(row.codes) for row in rows) < num_others:
        hit(scene, rows[-1], 143, {}, after(rng.uniform(0.0, 0.95 * scene.seconds), signal.SIGTERM))
    rows.append(hit_tokenising(scene.root, num_tokenising, rng))
    return [*rows, *hit_with_others(scene, options.others, rng), hit_with_hang(scene, max(3, options.count // 30))]


def show(rows: list[Row]) -> bool:
    """Prints the table; tells whether all of it is as it should be."""
    cells = []
    for row in rows:
        codes = ", ".join(f"{code}: {row.codes.count(code)}" for code in sorted(set(row.codes), key=str))
        slowest = f"{max(row.seconds):.2f}" if row.seconds else ""
        hangs = row.codes.count(None)
        again = f"{row.num_resumed} + {row.num_again}"
        cells.append([row.name, len(row.codes), codes, again, row.num_equal, hangs, row.num_orphans, slowest])
    header = [
        "Signal",
        "Runs",
        "Exit codes",
        "Resumed + started again",
        "Bit-equal",
        "Hangs",
        "Orphans",
        "Slowest stop, s",
    ]
    print_table("Signals", cells, header)
    for row in rows:
        for fault in row.faults:
            print(f"\n{row.name}: {fault}")
    return not any(row.faults or row.codes.count(None) or row.num_orphans for row in rows)


def main() -> None:
    """Runs the campaign and prints its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="SIGTERMs on one process")
    parser.add_argument("--others", type=int, default=20, help="runs that get Ctrl-C twice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="one run of each kind only")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    forkserver.import_all()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="forge-signals-") as folder:
        evaluation = {"per_device_eval_batch_size": 6, "eval_steps": 4}
        data = {"eval": "forge:quickstart/heldout"}
        steps = {}
        if options.short:
            evaluation = {"per_device_eval_batch_size": 30, "eval_steps": 3}
            steps = {"training": {"max_steps": 4}, "checkpoint": {"save_steps": 4}}
        scene = prepare(Path(folder), "straight", data=data, evaluation=evaluation, **steps)
        rows = try_few(scene) if options.short else try_all(scene, options, rng)
        is_sound = show(rows)
    print(f"\n{time.monotonic() - began:.0f} s, seed {options.seed}")
    sys.exit(0 if is_sound else 1)


if __name__ == "__main__":
    main()
