"""Two processes that train one model: resumed, stopped, killed, hung and set up wrongly.

    python tests/campaign/ranks.py --count 50

Both processes are forked from one that has the libraries; they meet over gloo as they would on two machines. What a
stopped run goes on to is compared, byte by byte, with a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import forkserver
from small_runs import compare_runs, list_state, print_table, write_run_file

HANG_SECONDS = 90.0
KINDS = {
    "LoRA, dropout, EMA": ("lora", {}),
    "full": ("full", {}),
    "packed, accumulation 2": ("lora", {"data": {"packing": True}, "training": {"gradient_accumulation_steps": 2}}),
    "DPO": ("dpo", {}),
}


def start(
    arguments: Sequence[str] | dict, log: Path, per_rank: Mapping[int, Mapping[str, str]] | None = None, **shared: str
):
    """Starts ``forge ARGUMENTS`` (the same for both, or by rank) as two processes; returns both."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    children = []
    for rank in (0, 1):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = (
            {name: str(value) for name, value in place.items()} | shared | dict((per_rank or {}).get(rank, {}))
        )
        own = arguments[rank] if isinstance(arguments, dict) else arguments
        children.append(forkserver.start(own, log.with_suffix(f".{rank}.log"), environment))
    return children


def wait(children) -> list[int | None]:
    """Waits for both; one that hangs is killed, and its code is ``None``."""
    codes = [child.wait(HANG_SECONDS) for child in children]
    for child in children:
        child.kill()
    return codes


def read_logs(children) -> str:
    """Returns what both printed."""
    return "\n".join(child.read_log()[-1500:] for child in children)


class Scene:
    """A run file, and the run that nobody disturbed.

    Args:
        root: Where everything goes.
        kind: Of the run file.
        changes: To its settings.
    """

    def __init__(self, root: Path, kind: str, changes: Mapping[str, object]) -> None:
        self.root = root
        changes = dict(changes)
        changes["training"] = {"max_steps": 8, **changes.get("training", {})}
        self.run_file = write_run_file(root, kind, checkpoint={"save_steps": 2, "save_total_limit": 5}, **changes)
        self.straight = root / "runs" / kind
        self.number = 0
        self.shared = {"FORGE_CACHE": str(root / "cache")}
        children = start(["train", str(self.run_file)], root / "straight", **self.shared)
        codes = wait(children)
        self.seconds = children[0].seconds
        if codes != [0, 0]:
            raise SystemExit(f"the undisturbed run ends with {codes}\n{read_logs(children)}")

    def hit(self, per_rank: Mapping[int, Mapping[str, str]] | None = None, strike=None):
        """Carries out a run and hits it; returns its folder, the exit codes, the seconds to the end and the logs."""
        self.number += 1
        name = f"hit-{self.number:03d}"
        arguments = ["train", str(self.run_file), "--set", f"name={name}"]
        children = start(arguments, self.root / name, per_rank, **self.shared)
        if strike:
            strike(children)
        began = time.monotonic()
        codes = wait(children)
        return self.root / "runs" / name, codes, time.monotonic() - began, read_logs(children)

    def go_on(self, run: Path) -> str:
        """Goes on with a run, or starts one again that had no checkpoint; says what is wrong with the result."""
        has_begun = (run / "run.json").exists() and list_state(run)[0] > 0
        # The last moments of a process come after everything is written.
        is_finished = has_begun and '"finished": true' in (run / "run.json").read_text()
        again = ["train", str(self.run_file), "--set", f"name={run.name}", "--overwrite"]
        if not is_finished:
            arguments = ["resume", str(run)] if has_begun else again
            children = start(arguments, self.root / f"{run.name}-again", **self.shared)
            codes = wait(children)
            if codes != [0, 0]:
                return f"going on ends with {codes}\n{read_logs(children)}"
        different = compare_runs(self.straight, run)
        last = max((self.straight / "checkpoints").glob("step-*")).name
        numbers = [(one / "checkpoints" / last / "rng-1.json").read_bytes() for one in (self.straight, run)]
        different += ["random numbers of process 1"] if numbers[0] != numbers[1] else []
        shutil.rmtree(run)
        return ", ".join(different)


def resume_all(root: Path, names: Sequence[str]) -> tuple[list[list], list[str]]:
    """Kills both processes at a step and goes on."""
    rows, faults = [], []
    for name in names:
        kind, changes = KINDS[name]
        scene = Scene(root / kind / str(len(rows)), kind, changes)
        good = 0
        for step in (3, 5, 6):
            run, codes, _, logs = scene.hit({0: {"FORGE_FAULT": f"kill@step:{step}"}})
            wrong = scene.go_on(run) if codes == [137, 14] else f"ends with {codes}\n{logs}"
            good += not wrong
            faults += [f"{name}, step {step}: {wrong}"] if wrong else []
        rows.append([name, 3, good])
    return rows, faults


def stop_many(scene: Scene, count: int, rng: random.Random) -> tuple[list[list], list[str]]:
    """Sends SIGTERM to both processes, one up to two seconds after the other, at any moment of the run."""
    codes_seen: dict[str, int] = {}
    equal, hangs, slowest, faults = 0, 0, 0.0, []
    done = 0
    while done < count:
        moment, skew, first = rng.uniform(0.2, 0.9 * scene.seconds), rng.uniform(0, 2), rng.randint(0, 1)

        def strike(children, moment: float = moment, skew: float = skew, first: int = first) -> None:
            children[0].wait(moment)
            children[first].send(signal.SIGTERM)
            children[1 - first].wait(skew)
            children[1 - first].send(signal.SIGTERM)

        run, codes, seconds, logs = scene.hit(strike=strike)
        if codes == [0, 0]:  # it was over
            shutil.rmtree(run)
            continue
        done += 1
        slowest = max(slowest, seconds)
        hangs += codes.count(None)
        codes_seen[str(codes)] = codes_seen.get(str(codes), 0) + 1
        wrong = scene.go_on(run) if codes == [143, 143] and "Traceback" not in logs else f"ends with {codes}\n{logs}"
        equal += not wrong
        faults += [f"SIGTERM after {moment:.2f} s, {skew:.2f} s apart, {first} first: {wrong}"] if wrong else []
    shown = ", ".join(f"{codes}: {number}" for codes, number in codes_seen.items())
    return [["SIGTERM, 0 to 2 s apart", done, shown, equal, hangs, f"{slowest:.1f}"]], faults


def break_things(scene: Scene, is_short: bool = False) -> tuple[list[list], list[str]]:
    """Rows of the catalogue: one process dies, hangs, differs, or does not come."""
    cases = {
        "one is killed": ({1: {"FORGE_FAULT": "kill@step:3"}}, [14, 137], "another process of the run has ended"),
        "SIGTERM to the second only": ({1: {"FORGE_FAULT": "term@step:3"}}, [143, 143], "which is saved"),
        "one hangs": (
            {0: {"FORGE_WATCHDOG_SECONDS": "4"}, 1: {"FORGE_FAULT": "hang@step:3", "FORGE_WATCHDOG_SECONDS": "4"}},
            [12, 12],
            "the stacks of all threads",
        ),
        "NaN in one": ({1: {"FORGE_FAULT": "nan@loss:3"}}, [0, 0], "the update is skipped"),
        "memory runs out in one": ({1: {"FORGE_FAULT": "oom@forward:3"}}, [14, 11], "several processes would have to"),
    }
    if is_short:
        cases = {name: cases[name] for name in ("one is killed", "NaN in one")}
    rows, faults = [], []
    for name, (per_rank, wanted, text) in cases.items():
        run, codes, seconds, logs = scene.hit(per_rank)
        # Of two that end for one reason, the order is chance: the second may find the first one gone.
        good = codes == wanted and text in logs and "Traceback" not in logs
        stacks = sorted(one.name for one in run.glob("logs/stacks*"))
        good &= name != "one hangs" or stacks == ["stacks-1.txt", "stacks.txt"]
        rows.append([name, str(wanted), str(codes), "yes" if good else "NO", f"{seconds:.1f}"])
        faults += [] if good else [f"{name}: {codes}, stacks {stacks}\n{logs}"]
    command = ["train", str(scene.run_file), "--set", "name=differ"]
    began = time.monotonic()
    children = start(
        {0: command, 1: [*command, "--set", "training.learning_rate=0.002"]}, scene.root / "differ", **scene.shared
    )
    codes = wait(children)
    good = codes == [5, 5] and "the processes differ in the plan" in read_logs(children)
    rows.append(["plans differ", "[5, 5]", str(codes), "yes" if good else "NO", f"{time.monotonic() - began:.1f}"])
    return rows, faults + ([] if good else [f"plans differ: {codes}\n{read_logs(children)}"])


def main() -> None:
    """Runs the campaign and prints its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=50, help="SIGTERMs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="one SIGTERM and two broken runs")
    options = parser.parse_args()
    forkserver.import_all()
    began = time.monotonic()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="forge-ranks-") as folder:
        root = Path(folder)
        scene = Scene(root / "scene", "lora", {"training": {"gradient_accumulation_steps": 2}})
        resumed, faults = ([], []) if options.short else resume_all(root, list(KINDS))
        stopped, more = stop_many(scene, 1 if options.short else options.count, rng)
        broken, most = break_things(scene, options.short)
    if resumed:
        print_table("Killed at steps 3, 5 and 6, and resumed", resumed, ["Trained", "Runs", "Bit-equal"])
    print_table("Stopped", stopped, ["Signal", "Runs", "Exit codes", "Bit-equal", "Hangs", "Slowest end, s"])
    print_table("One of two goes wrong", broken, ["What", "Wanted", "Exit codes", "As wanted", "Seconds"])
    for fault in (all_faults := [*faults, *more, *most]):
        print(f"\n{fault}")
    print(f"\n{time.monotonic() - began:.0f} s, seed {options.seed}")
    sys.exit(1 if all_faults else 0)


if __name__ == "__main__":
    main()
