"""Memory that runs out at 20 places: the run goes on, to the weights of the run that was not disturbed (bar 7).

Another order of float32 additions is all that parts change. Adam turns that into a share of the learning rate where a
gradient is next to nothing, above all in the first step. So the rate is named, and a run whose first step is cut is
compared with one that was configured that way: these have to have the same bytes.

python tests/campaign/oom.py
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import forkserver
from small_runs import print_table, read_order, write_run_file

from forge_cli.run.resume import read_records

MOST_DIFFERENCE = 1e-6
NUM_STEPS = 10
RATE = 1e-4
# How a run is disturbed is written as users write it: ACTION*TIMES@PLACE.MICRO_STEP:STEP.
CASES = {
    "lora": (
        "oom@forward:1",
        "oom@backward.2:3",
        "oom*2@backward:5",
        "oom@forward:2,oom@backward.2:7",
        "oom@optimizer:10",
        "oom@evaluation:5",
        "oom@save:5",
    ),
    "full": ("oom@backward:1", "oom@forward.2:3", "oom*2@forward:6", "oom@backward.2:10", "oom@optimizer:5"),
    "packed": ("oom@forward:2", "oom@backward.2:4", "oom*2@backward:5", "oom*2@evaluation:10"),
    "dpo": ("oom@forward.2:1", "oom*2@backward:3", "oom@backward.2:10", "oom@evaluation:5"),
}
# Cut in two from the first step on.
CONTROLS = (("lora", "oom@forward:1"), ("full", "oom@backward:1"), ("dpo", "oom@forward.2:1"))
# These end with exit code 11 and these words.
ENDINGS = {
    ("lora", "oom*9@backward:3"): "with one row at a time",
    ("lora", "oom@optimizer:1"): "no checkpoint to go back to",
    ("kto", "oom@forward:3"): "the KL term of kto",
}


def main() -> int:
    """Runs the cases; returns the exit code."""
    forkserver.import_all()
    root = Path(tempfile.mkdtemp(prefix="forge-oom-"))
    rows, failures = [], []
    for kind, faults in CASES.items():
        straight, _, _ = _run(root, kind, "")
        for fault in faults:
            run, code, said = _run(root, kind, fault)
            happened = said.count("memory ran out")
            wanted = sum(int(one[4]) if one[3] == "*" else 1 for one in fault.split(","))
            difference = _compare(straight, run) if code == 0 else float("inf")
            same_rows = code == 0 and _read_steps(straight) == _read_steps(run)
            rows.append([kind, f"`{fault}`", code, f"{difference:.1e}", "yes" if same_rows else "NO"])
            if code or difference > MOST_DIFFERENCE or not same_rows or happened < wanted:
                failures.append(f"{kind} {fault}: exit {code}, {difference:.2e}, {happened} of {wanted}")
    for (kind, fault), words in ENDINGS.items():
        _, code, said = _run(root, kind, fault)
        is_right = code == 11 and words in said and "Traceback" not in said and "--set " in said
        rows.append([kind, f"`{fault}`", code, "", ""])
        if not is_right:
            failures.append(f"{kind} {fault}: exit {code}: {said[-500:]}")
    for kind, fault in CONTROLS:
        (run, _, _), (control, code, _) = _run(root, kind, fault), _run(root, kind, "", batch=2)
        difference = _compare(control, run)
        rows.append([kind, f"`{fault}`, against batches of 2", code, f"{difference:.1e}", ""])
        if code or difference:
            failures.append(f"{kind} {fault}: not the bytes of a run with batches of 2, but {difference:.2e}")
    difference = f"largest difference of a weight or held-out loss (rate {RATE:g})"
    header = ["trained", "memory runs out", "exit", difference, "same rows and tokens"]
    print("\n".join(failures))
    print_table("Out of memory", rows, header)
    print(f"\n{len(rows) - len(failures)} of {len(rows)}")
    shutil.rmtree(root)
    return 1 if failures else 0


def _run(root: Path, kind: str, fault: str, batch: int = 4) -> tuple[Path, int, str]:
    """Trains; returns run folder, exit code and what was said."""
    is_pair = kind in ("dpo", "kto")
    folder = root / (fault.translate(str.maketrans("@:.*,", "-----")) or f"straight-{batch}")
    if (folder / "runs" / kind).exists():
        return folder / "runs" / kind, 0, ""
    data = {"eval": "forge:preference/heldout" if is_pair else "forge:quickstart/heldout", "packing": kind == "packed"}
    if kind == "kto":
        data |= {split: str(_write_marked(root, name)) for split, name in (("train", "train"), ("eval", "heldout"))}
    path = write_run_file(
        folder,
        "dpo" if is_pair else "full" if kind == "full" else "lora",
        name=kind,
        method=kind if is_pair else "sft",
        data=data,
        training={
            "max_steps": NUM_STEPS,
            "learning_rate": RATE,
            "per_device_train_batch_size": 2 if kind == "packed" else batch,
            "gradient_accumulation_steps": 8 // batch,
        },
        evaluation={"eval_steps": 5, "per_device_eval_batch_size": 8},
        checkpoint={"save_steps": 5},
        **({} if kind in ("full", "dpo", "kto") else {"lora": {"lora_dropout": 0.0}}),
    )
    log = folder / "log"
    child = forkserver.run(["train", str(path)], log, {"FORGE_CACHE": str(root / "cache"), "FORGE_FAULT": fault})
    return folder / "runs" / kind, child.code, log.read_text()


def _write_marked(root: Path, name: str) -> Path:
    """Writes the shipped pairs as single answers, good and bad."""
    import forge_cli

    pairs = (Path(forge_cli.__file__).parent / "assets" / "preference" / f"{name}.jsonl").read_text().splitlines()
    rows = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in map(json.loads, pairs)
        for side in ("chosen", "rejected")
    ]
    path = root / f"marked-{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _compare(straight: Path, other: Path) -> float:
    """Returns the largest difference of a final weight or a held-out loss."""
    from safetensors.numpy import load_file

    found = [0.0]
    for path in straight.glob("*/*.safetensors"):
        mine, yours = load_file(path), load_file(other / path.relative_to(straight))
        found += [float(abs(mine[name] - yours[name]).max()) for name in mine.keys() | yours.keys()]
    assert len(found) > 1
    mine, yours = _read_losses(straight), _read_losses(other)
    return max(found + [abs(mine[step] - yours[step]) for step in mine.keys() | yours.keys()])


def _read_losses(run: Path) -> dict[int, float]:
    return {one["step"]: one["eval_loss"] for one in read_records(run / "metrics.jsonl") if one.get("eval_loss")}


def _read_steps(run: Path) -> tuple[str, dict[int, int]]:
    """Reads the digest of all rows trained, and every step's tokens."""
    tokens = {one["step"]: one["tokens"] for one in read_records(run / "metrics.jsonl") if "tokens" in one}
    return read_order(max((run / "checkpoints").glob("step-*"))), tokens


if __name__ == "__main__":
    sys.exit(main())
