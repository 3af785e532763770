"""Small real runs for the campaigns: run files, the state of their folders, and comparison byte by byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import yaml

from forge_cli.checkpoints.store import Broken, CheckpointStore, verify
from forge_cli.run.folder import read_run_id
from forge_cli.run.resume import read_records

COMPARED = ("weights.safetensors", "optimizer.safetensors", "ema.safetensors", "rng-0.json")


def write_run_file(folder: Path, kind: str, **changes: object) -> Path:
    """Writes a run file.

    Args:
        folder: Where it and its runs go.
        kind: ``full``, ``lora`` (with dropout) or ``dpo`` (LoRA); all with EMA.
        **changes: Sections to merge or replace.
    """
    lora = {"r": 4, "lora_alpha": 8, **({} if kind == "dpo" else {"lora_dropout": 0.1})}
    settings: dict[str, object] = {
        "name": kind,
        "method": "dpo" if kind == "dpo" else "sft",
        "model": {"name": "forge-tiny"},
        "data": {"train": "forge:preference/train" if kind == "dpo" else "forge:quickstart/train", "max_length": 128},
        "lora": None if kind == "full" else lora,
        "ema": {"decay": 0.9},
        "training": {
            "learning_rate": 1e-3,
            "max_steps": 8,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "activation_checkpointing": False,
        },
        "checkpoint": {"save_steps": 2, "save_total_limit": 2},
        "logging": {"logging_steps": 1},
        "report": None,
        "output_dir": str(folder / "runs"),
    }
    for section, value in changes.items():
        present = settings.get(section)
        settings[section] = {**present, **value} if isinstance(present, dict) and isinstance(value, dict) else value
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{settings['name']}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def list_state(run: Path) -> tuple[int, list[Broken]]:
    """Returns the newest sound step of a run (0 without one) and the visible checkpoints that are not sound."""
    store = CheckpointStore(run / "checkpoints", read_run_id(run))
    found = [verify(path, store.run_id) for path in store.list_paths()]
    steps = [one.step for one in found if not isinstance(one, Broken)]
    return max(steps, default=0), [one for one in found if isinstance(one, Broken)]


def last_step(run: Path) -> int:
    """Returns the last step that was trained, as ``metrics.jsonl`` has it."""
    return max((int(one.get("step") or 0) for one in read_records(run / "metrics.jsonl")), default=0)


def compare_runs(straight: Path, other: Path) -> list[str]:
    """Lists what differs: the last checkpoint, the final weights, the order of rows."""
    differing = []
    checkpoint = max((straight / "checkpoints").glob("step-*")).name
    for name in COMPARED:
        differing += _compare(straight / "checkpoints" / checkpoint / name, other / "checkpoints" / checkpoint / name)
    for folder in ("adapter", "adapter-raw", "model", "model-raw"):
        for path in (straight / folder).glob("*.safetensors"):
            differing += _compare(path, other / folder / path.name)
    orders = [read_order(run / "checkpoints" / checkpoint) for run in (straight, other)]
    return differing + (["order of rows"] if orders[0] != orders[1] else [])


def read_order(checkpoint: Path) -> str:
    """Reads the digest of all rows trained so far."""
    state = json.loads((checkpoint / "state.json").read_text()) if (checkpoint / "state.json").exists() else {}
    return dict(state.get("monitor", {"dict": []})["dict"]).get("rows_digest", "missing")


def _compare(a: Path, b: Path) -> list[str]:
    if not a.exists():
        return []
    return [] if b.exists() and a.read_bytes() == b.read_bytes() else [f"{a.parent.name}/{a.name}"]


def rewind(straight: Path, target: Path, step: int) -> None:
    """Copies a finished run as if it had been killed after a step's save."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(straight, target)
    for path in (target / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    for name in ("adapter", "adapter-raw", "model", "model-raw"):
        shutil.rmtree(target / name, ignore_errors=True)
    facts = json.loads((target / "run.json").read_text())
    facts.pop("finished", None)
    (target / "run.json").write_text(json.dumps(facts))


def print_table(title: str, rows: list[list[object]], header: list[str]) -> None:
    """Prints a table in Markdown, as ``docs/reliability.md`` keeps it."""
    print(f"\n{title}\n")
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)
