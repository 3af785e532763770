"""What training really takes on a CUDA GPU, beside what ``forge estimate`` says: bar 6 of the estimate.

    python tests/benchmarks/estimate_gpu.py --out docs/estimate-accuracy.md

Needs no network: models get their configuration from Forge's shelf and random weights. Every case is a run of ``forge
train`` for three optimizer steps in a process of its own (``estimate_gpu_worker.py``). Compared are the peaks of
allocated bytes by phase, as torch counts them, and the time of the third step. After every case the table is written:
into its place in the page of ``--out``, and with ``--json`` as data. All cases together are made to take about eight
minutes on an H100, most of it for set-up; ``--only``, or ``--json FILE --keep``, splits them over several calls.

``--keep`` runs no case again that the file of ``--json`` holds, but predicts it anew: after a change of the estimate,
that compares without a GPU. ``--cpu`` runs a few cases on the CPU, an eighth as long, narrow and in float32, and
follows live tensors instead: it proves the script, and takes about four minutes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from estimate_gpu_cases import Case, list_cases, write_settings
from estimate_gpu_table import render_section, write_page

from forge_cli.estimate.plan_memory import estimate_from_plan, setting_from_plan
from forge_cli.estimate.plan_time import estimate_plan_step
from forge_cli.facts.gpus import match_device
from forge_cli.resolve.plan import resolve_mapping
from forge_cli.run.preflight import compare_phases

MOST_SECONDS = 300
PHASES = ("load", "forward and backward", "optimizer step")
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "triton", "flash_attn")
_LOOK = """
import json, torch
found = {"cuda": torch.version.cuda} if torch.cuda.is_available() else {}
if found:
    free, total = torch.cuda.mem_get_info()
    found |= {"gpu": torch.cuda.get_device_name(0), "total_bytes": total, "free_bytes": free}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Prediction:
    """What Forge says about a case.

    Attributes:
        phases: Allocated bytes at the highest point of each phase.
        num_tokens: Tokens of an optimizer step.
        tokens_per_second: ``None`` where the GPU is not known.
    """

    phases: dict[str, int]
    num_tokens: int
    tokens_per_second: float | None

    @property
    def peak_bytes(self) -> int:
        """The highest of all phases."""
        return max(self.phases.values())


def predict(settings: dict, head: dict) -> Prediction:
    """Predicts a run file for the GPU of a head, or for the CPU."""
    plan, on_gpu = resolve_mapping(settings), not head["on_cpu"]
    setting = setting_from_plan(plan, cuda=on_gpu)
    compared = compare_phases(estimate_from_plan(plan, cuda=on_gpu), dict.fromkeys(PHASES, 0))
    gpu = match_device(head["gpu"], head["total_bytes"]) if head.get("gpu") else None
    step = estimate_plan_step(plan, setting, gpu) if gpu else None
    return Prediction(
        {phase: values["predicted_bytes"] or 0 for phase, values in compared.items()},
        setting.num_sequences * setting.sequence_length * setting.accumulation_steps,
        step.tokens_per_second if step else None,
    )


def describe_machine(args: argparse.Namespace, environment: dict) -> dict:
    """Describes GPU, driver and versions; the GPU is asked by another process, so that this one holds none of it."""
    versions = {}
    for name in PACKAGES:
        if importlib.util.find_spec(name):
            versions[name] = importlib.metadata.version(name)
    found: dict = {}
    if "torch" in versions:
        looked = subprocess.run([sys.executable, "-c", _LOOK], capture_output=True, text=True, env=environment)
        found = json.loads(looked.stdout or "{}")
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    options = "".join([" --cpu" if args.cpu else "", f" --only '{args.only}'" if args.only else ""])
    return {
        **found,
        "on_cpu": args.cpu,
        "driver": driver,
        "versions": versions,
        "date": date.today().isoformat(),
        "command": f"python tests/benchmarks/estimate_gpu.py --out docs/estimate-accuracy.md{options}",
    }


class Workers:
    """Processes that measure one case each; while one measures, the next ones load their libraries.

    Args:
        folder: For answers and what libraries say.
        environment: Of the processes.
        count: How many there will be.
    """

    def __init__(self, folder: Path, environment: dict, count: int) -> None:
        self.folder, self.environment, self.count = folder, environment, count
        self.started = self.asked = 0
        self.waiting: list[subprocess.Popen] = []

    def _start(self) -> None:
        self.started += 1
        with open(self.folder / f"said-{self.started}", "w") as said:
            worker = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("estimate_gpu_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=said,
                env=self.environment,
                text=True,
            )
        self.waiting.append(worker)

    def ask(self, request: dict) -> dict:
        """Has one request answered; a process that dies, or takes too long, is an answer too."""
        self.asked += 1
        # Loading takes longer than most cases; where there are few cores, one more process would only disturb.
        ahead = 2 if (os.cpu_count() or 1) >= 8 else 1
        while self.started < min(self.asked + ahead, self.count):
            self._start()
        worker, file = self.waiting.pop(0), self.folder / f"answer-{self.asked}"
        try:
            worker.communicate(json.dumps({**request, "answer": str(file)}) + "\n", timeout=MOST_SECONDS)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
            return {"status": "failed", "reason": f"no answer within {MOST_SECONDS} s"}
        if file.exists():
            return json.loads(file.read_text())
        said = (self.folder / f"said-{self.asked}").read_text(errors="replace").strip().splitlines()
        last = said[-1][:200] if said else "it said nothing"
        return {"status": "failed", "reason": f"the process ended with {worker.returncode}: {last}"}

    def stop(self) -> None:
        """Ends the processes that are not needed any more."""
        for worker in self.waiting:
            worker.kill()
            worker.wait()


def choose_environment(folder: Path, on_cpu: bool) -> dict:
    """Returns the environment of the processes: no network, one GPU or none, and a cache that goes away."""
    chosen = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "FORGE_CACHE": str(folder / "cache")}
    chosen["CUDA_VISIBLE_DEVICES"] = "" if on_cpu else os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if on_cpu:
        # What other threads make is seen late by a dispatch mode.
        chosen["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    return {**os.environ, **chosen}


def read_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="page that gets the table, in its marked place or at its end")
    parser.add_argument("--json", type=Path, help="keep what was measured here")
    parser.add_argument("--keep", action="store_true", help="run no case that the file of --json holds")
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases that this regular expression finds")
    parser.add_argument("--list", action="store_true", help="list the cases and their predictions, and run none")
    parser.add_argument("--cpu", action="store_true", help="a few small cases on the CPU")
    args = parser.parse_args()
    if args.keep and not args.json:
        parser.error("--keep needs --json")
    return args


def write_all(args: argparse.Namespace, head: dict, rows: dict[str, dict]) -> None:
    """Writes page and data as they stand, each in one move."""
    section = render_section(head, rows)
    if args.out:
        write_page(args.out, "cpu" if head["on_cpu"] else "gpu", section)
    if args.json:
        draft = args.json.with_name(args.json.name + ".new")
        draft.write_text(json.dumps({"head": head, "cases": rows}, indent=1) + "\n")
        os.replace(draft, args.json)


def make_row(prediction: Prediction, measured: dict) -> dict:
    """Joins what was measured and what is predicted."""
    row = {"predicted_bytes": prediction.peak_bytes, "predicted_phases": prediction.phases, **measured}
    row |= {"num_tokens": prediction.num_tokens, "predicted_tokens_per_second": prediction.tokens_per_second}
    if measured["status"] == "measured":
        row["measured_bytes"] = max(measured["phases"].values())
        row["error_ratio"] = prediction.peak_bytes / row["measured_bytes"] - 1
        row["measured_tokens_per_second"] = prediction.num_tokens / measured["step_seconds"]
    return row


def show(name: str, row: dict, seconds: float) -> None:
    """Prints a case as it ends."""
    if row["status"] != "measured":
        print(f"{name:64} {row['status']}: {row['reason']}", flush=True)
        return
    mib = 2**20
    sizes = f"{row['measured_bytes'] / mib:10.1f} {row['predicted_bytes'] / mib:10.1f} MiB"
    print(f"{name:64} {sizes} {100 * row['error_ratio']:+6.2f} %  {seconds:5.1f} s", flush=True)


def run_cases(args: argparse.Namespace, folder: Path, cases: list[Case]) -> None:
    """Runs cases and writes the table after each."""
    environment = choose_environment(folder, args.cpu)
    stored = json.loads(args.json.read_text()) if args.keep and args.json.is_file() else {"head": None, "cases": {}}
    rows: dict[str, dict] = {}
    held = {name for name, row in stored["cases"].items() if args.keep and row["status"] == "measured"}
    new = [case for case in cases if str(case) not in held]
    head = describe_machine(args, environment) if new or not stored["head"] else stored["head"]
    if new and not args.cpu and not head.get("gpu"):
        if not held:
            sys.exit("no CUDA GPU here: --cpu proves the script without one, --list shows the cases")
        print("no CUDA GPU here: what was measured is predicted anew, nothing else is run")
        cases, new, head = [case for case in cases if str(case) in held], [], stored["head"]
    packages = sorted({package for case in new for package in case.packages} - set(head["versions"]))
    for package in packages:
        print(f"{package} is not installed: cases that need it are skipped")
    workers = Workers(folder, environment, sum(not set(case.packages) & set(packages) for case in new))
    try:
        for case in cases:
            began, name = time.perf_counter(), str(case)
            settings = write_settings(case, folder, args.cpu)
            prediction = predict(settings, head)
            if missing := ", ".join(sorted(set(case.packages) & set(packages))):
                measured = {"status": "skipped", "reason": f"{missing} is not installed"}
            if name in held:
                measured = stored["cases"][name]
            elif not missing:
                request = {"settings": settings, "uneven": case.uneven, "predicted_bytes": prediction.peak_bytes}
                measured = workers.ask(request)
            rows[name] = make_row(prediction, measured)
            show(name, rows[name], time.perf_counter() - began)
            write_all(args, head, {**stored["cases"], **rows})
    finally:
        workers.stop()
    print(render_section(head, rows).split("\n\n")[-1])


def main() -> None:
    """Lists or runs the cases."""
    args = read_args()
    cases = [one for one in list_cases() if re.search(args.only, str(one)) and (one.is_for_cpu or not args.cpu)]
    if not cases:
        sys.exit(f"no case matches {args.only}")
    with tempfile.TemporaryDirectory() as folder:
        if not args.list:
            run_cases(args, Path(folder), cases)
            return
        for case in cases:
            prediction = predict(write_settings(case, Path(folder), args.cpu), {"on_cpu": args.cpu})
            print(f"{case!s:64} {prediction.peak_bytes / 2**30:7.2f} GiB  {prediction.num_tokens:6d} tokens a step")


if __name__ == "__main__":
    main()
