"""Resumed runs end with the bits of undisturbed ones: method by place by accumulation by packing (bar 3).

    python tests/campaign/resume_matrix.py

Each cell goes on from one checkpoint of a straight run, in a process and with a model of its own.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import forkserver
from small_runs import compare_runs, print_table, rewind, write_run_file

EPOCHS = 3
EVAL_STEPS = 3
PLACES = ("mid epoch", "epoch boundary", "second epoch", "after evaluation", "all steps done")
# Resumed once, three quarters through: name to the kind of run and its changes.
OTHERS: dict[str, tuple[str, dict]] = {
    **{
        name: ("full", {"training": {"optim": name}})
        for name in (
            "adamw_torch",
            "adamw_bnb_8bit",
            "paged_adamw_8bit",
            "paged_adamw_32bit",
            "lion_32bit",
            "lion_8bit",
            "adafactor",
            "sgd",
        )
    },
    "qlora": ("lora", {"quantization": {}, "training": {"optim": "paged_adamw_8bit"}}),
    "streaming": ("lora", {"data": {"streaming": True}}),
    "freeze": ("lora", {"freeze": {"first": "50%"}}),
    "kto": (
        "dpo",
        {
            "method": "kto",
            "data": {"train": "forge:preference/rated"},
            "training": {"per_device_train_batch_size": 2},
        },
    ),
    **{method: ("dpo", {"method": method}) for method in ("orpo", "cpo", "reward")},
}
KINDS = ("full", "lora", "dpo", "grouped")  # grouped: LoRA, rows of similar length together


def main() -> int:
    """Runs the matrix; returns the exit code."""
    print(f"imports took {forkserver.import_all():.1f} s")
    root = Path(tempfile.mkdtemp(prefix="forge-resume-"))
    environment = {"FORGE_CACHE": str(root / "cache")}
    rows, failures = [], []
    for kind in KINDS:
        for accumulation in (1, 3):
            for packing in (False, True) if kind in ("full", "lora") else (False,):
                name = f"{kind}-ga{accumulation}{'-packed' if packing else ''}"
                cells = _run_cells(root / name, name, kind, accumulation, packing, environment)
                rows.append(
                    [
                        kind,
                        accumulation,
                        "on" if packing else "off",
                        *("equal" if not c else "DIFFERENT" for c in cells.values()),
                    ]
                )
                failures += [f"{name} {place}: {wrong}" for place, wrong in cells.items() if wrong]
    print("\n".join(failures[:20]))
    print_table(
        "Stopped and resumed against straight (weights, optimizer, EMA, random state, final weights, order of rows)",
        rows,
        [
            "trained",
            "accumulation",
            "packing",
            "mid epoch",
            "epoch boundary",
            "second epoch",
            "after evaluation",
            "all steps done",
        ],
    )
    count = sum(len(row) - 3 for row in rows)
    print(f"\n{count - len(failures)} of {count} cells bit-equal")
    wrong = {name: _resume_once(root / "others", name, *case, environment) for name, case in OTHERS.items()}
    verdicts = [[name, "DIFFERENT" if what else "equal"] for name, what in wrong.items()]
    print_table("Other optimizers, methods and settings, resumed at step 6 of 8", verdicts, ["run", "verdict"])
    failures += [f"{name}: {what}" for name, what in wrong.items() if what]
    print("\n".join(f"{name}: {what}" for name, what in wrong.items() if what))
    shutil.rmtree(root)
    return 1 if failures else 0


def _resume_once(folder: Path, name: str, kind: str, changes: dict, environment: dict) -> list[str]:
    path = write_run_file(folder, kind, name=name, **changes)
    child = forkserver.run(["train", str(path)], folder / f"{name}.log", environment)
    if child.code != 0:
        return [child.read_log()[-400:]]
    target = folder / "cells" / name
    rewind(folder / "runs" / name, target, 6)
    again = forkserver.run(["resume", str(target)], folder / f"{name}-resumed.log", environment)
    return compare_runs(folder / "runs" / name, target) if again.code == 0 else [again.read_log()[-400:]]


def _run_cells(
    folder: Path, name: str, kind: str, accumulation: int, packing: bool, environment: dict
) -> dict[str, list[str]]:
    method = "lora" if kind == "grouped" else kind
    source = "preference" if kind == "dpo" else "quickstart"
    rows = {"train": {"path": f"forge:{source}/train", "rows": 14}, "eval_rows": 3}
    extra = {"max_length": 256, "packing": True} if packing else {"max_length": 256}
    training = {
        "max_steps": None,
        "num_train_epochs": EPOCHS,
        "gradient_accumulation_steps": accumulation,
        "train_sampling_strategy": "group_by_length" if kind == "grouped" else "random",
    }
    path = write_run_file(
        folder,
        method,
        name=name,
        data={**rows, **extra},
        training=training,
        evaluation={"eval_steps": EVAL_STEPS},
        checkpoint={"save_steps": 1, "save_total_limit": 100},
    )
    child = forkserver.run(["train", str(path)], folder / "straight.log", environment)
    if child.code != 0:
        return {"straight": [child.read_log()[-800:]]}
    straight = folder / "runs" / name
    steps = max(int(one.name[5:]) for one in (straight / "checkpoints").glob("step-*"))
    per_epoch = steps // EPOCHS
    places = {
        "mid epoch": max(1, per_epoch // 2),
        "epoch boundary": per_epoch,
        "second epoch": per_epoch + max(1, per_epoch // 2),
        "after evaluation": 2 * EVAL_STEPS if steps > 2 * EVAL_STEPS else EVAL_STEPS,
        "all steps done": steps,
    }
    found = {}
    for place, step in places.items():
        target = folder / "cells" / name
        rewind(straight, target, step)
        again = forkserver.run(["resume", str(target)], folder / "resume.log", environment)
        ended = again.code == 0 and json.loads((target / "run.json").read_text()).get("finished")
        found[place] = compare_runs(straight, target) if ended else [f"exit {again.code}: {again.read_log()[-400:]}"]
    return found


if __name__ == "__main__":
    sys.exit(main())
