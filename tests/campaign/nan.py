"""Losses and gradients that are not finite: found before the update, never committed, rows named (bar 6).

python tests/campaign/nan.py
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import forkserver
from small_runs import print_table, write_run_file

STEPS = (2, 3, 5, 7)
THREE = (4, 5, 6)
CASES = [
    (kind, fault, code)
    for kind in ("full", "lora")
    for place, action in (("loss", "nan"), ("loss", "inf"), ("gradient", "nan"))
    for fault, code in (
        *((f"{action}@{place}:{step}", 0) for step in STEPS),
        (",".join(f"{action}@{place}:{step}" for step in THREE), 0),
        (f"{action}*99@{place}", 10),
    )
]


def main() -> int:
    """Runs the cases; returns the exit code."""
    forkserver.import_all()
    root = Path(tempfile.mkdtemp(prefix="forge-nan-"))
    failures, rows = [], {}
    for number, (kind, fault, code) in enumerate(CASES):
        folder = root / str(number)
        training = {"max_steps": 16 if code else 8}
        checkpoint = {"save_steps": 1, "save_total_limit": 20}
        path = write_run_file(folder, kind, checkpoint=checkpoint, training=training)
        environment = {"FORGE_CACHE": str(root / "cache"), "FORGE_FAULT": fault}
        child = forkserver.run(["train", str(path)], folder / "log", environment)
        run = folder / "runs" / kind
        untouched = _is_same(run, 2 if code else int(fault.rsplit(":", 1)[1]))
        bad = _count_non_finite(run)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        named = any((one.get("skipped") or one.get("diverged")) and one.get("rows") for one in lines)
        times, rollbacks = ("endless", 2) if code else ("3 steps", 1) if "," in fault else ("1 step", 0)
        went_back = (folder / "log").read_text().count(": back to step-")
        row = rows.setdefault((kind, *fault.split(":")[0].replace("*99", "").split("@")[::-1], times), [0] * 6)
        verdicts = (child.code == code, untouched, not bad, named, went_back == rollbacks)
        for place, holds in enumerate((True, *verdicts)):
            row[place] += holds
        if not all(verdicts):
            failures.append(f"{kind} {fault}: exit {child.code}, {untouched=}, {bad=}, {named=}, {went_back=}")
        shutil.rmtree(folder)
    print("\n".join(failures[:10]))
    header = ["trained", "place", "injected", "in", "cases", "exit code right", "weights as before", "none committed"]
    header += ["rows named", "went back as often as it should"]
    print_table("Not finite", [[*key, *row] for key, row in rows.items()], header)
    print(f"\n{len(CASES) - len(failures)} of {len(CASES)}")
    shutil.rmtree(root)
    return 1 if failures else 0


def _is_same(run: Path, step: int) -> bool:
    """Tells whether a step left weights, EMA and optimizer's moments as the step before had them."""
    from safetensors.numpy import load_file

    before, after = (run / "checkpoints" / f"step-{one:08d}" for one in (step - 1, step))
    for name in ("weights", "ema", "optimizer"):
        # Before the first update an optimizer has no tensors, and no file.
        files = [folder / f"{name}.safetensors" for folder in (before, after)]
        states = [load_file(file) if file.exists() else {} for file in files]
        if states[0].keys() != states[1].keys() or any(
            states[0][key].tobytes() != states[1][key].tobytes() for key in states[0]
        ):
            return False
    return True


def _count_non_finite(run: Path) -> int:
    import numpy as np
    from safetensors.numpy import load_file

    tensors = (tensor for path in run.rglob("*.safetensors") for tensor in load_file(path).values())
    return sum(not np.isfinite(tensor).all() for tensor in tensors)


if __name__ == "__main__":
    sys.exit(main())
