"""Going on with a run: which checkpoint, what has changed since, what is lost."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from forge_cli.checkpoints.store import Checkpoint, CheckpointStore, refuse_broken
from forge_cli.errors import ConfigError, DataError, MachineError, Problem
from forge_cli.resolve.plan import Plan
from forge_cli.run.folder import RunFolder

# What may be another without changing a single weight: evaluation draws no random number that training sees.
HARMLESS = ("name", "output_dir", "preset", "extends", "logging", "evaluation", "checkpoint", "monitor", "report")
ALLOW_DATA = "data"


@dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on.

    Attributes:
        checkpoint: The newest one that is whole.
        records: What ``metrics.jsonl`` holds up to its step.
        lost_steps: Steps that were done after it.
        notes: What a user should know.
    """

    checkpoint: Checkpoint
    records: tuple[dict, ...]
    lost_steps: int
    notes: tuple[str, ...]


def find_resume_point(folder: RunFolder, *, require_latest: bool = False) -> ResumePoint:
    """Chooses the newest verified checkpoint and sets those aside that cannot be used.

    Args:
        folder: The run, held by this process.
        require_latest: Do not fall back to an earlier one.

    Raises:
        CheckpointError: None can be used, or with ``require_latest`` the latest cannot.
        MachineError: The run is finished.
    """
    if folder.read_facts().get("finished"):
        raise MachineError(
            "this run is finished: nothing is left to do",
            where=str(folder.path),
            why="a resumed run would train no step",
            fix="start a new run, which may begin with this one's weights",
        )
    store = CheckpointStore(folder.checkpoints, folder.run_id)
    store.clear_leftovers()
    checkpoint, broken = store.find_newest()
    if checkpoint is None or (broken and require_latest):
        raise refuse_broken(broken, folder.checkpoints)
    store.set_aside(broken)
    records = read_records(folder.metrics)
    latest = max((int(one.get("step") or 0) for one in records), default=0)
    lost = max(0, latest - checkpoint.step)
    notes = [f"{one.path.name} cannot be used: {one.reason}; it was set aside" for one in broken]
    repeated = f"; {lost} steps after it are done again" if lost else ""
    notes.append(f"resumed from {checkpoint.path.name}, all files verified{repeated}")
    kept = tuple(one for one in records if int(one.get("step") or 0) <= checkpoint.step)
    return ResumePoint(checkpoint, kept, lost, tuple(notes))


def read_records(path: Path) -> list[dict]:
    """Reads ``metrics.jsonl``; a last line that was cut off by a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def compare_plans(before: Plan, now: Plan, allowed: Collection[str]) -> list[str]:
    """Compares the plan of a run with the one it is to go on with, key by key.

    Args:
        before: The plan in the run folder.
        now: The plan of the run file and ``--set``.
        allowed: Keys that may differ (``--allow-change``).

    Returns:
        One line for every change that is taken.

    Raises:
        ConfigError: Others differ; names all of them.
    """
    was, new = (flatten_keys(plan.spec.model_dump(mode="json")) for plan in (before, now))
    changed = [path for path in sorted(was.keys() | new.keys()) if was.get(path) != new.get(path)]
    notes, problems = [], []
    for path in changed:
        words = f"was {json.dumps(was.get(path))} and is {json.dumps(new.get(path))}"
        if path.split(".")[0] in HARMLESS:
            notes.append(f"{path} {words}")
        elif any(path == one or path.startswith(one + ".") for one in allowed):
            notes.append(f"{path} {words}, as allowed; the run is not what it would have been")
        else:
            why = "the run would go on as another one"
            problems.append(Problem("", path, words, why, f"put it back, or add --allow-change {path}"))
    if problems:
        raise ConfigError.from_problems(problems)
    return notes


def flatten_keys(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Turns nested mappings into dotted paths."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten_keys(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def compare_data(before: Mapping[str, str], now: Mapping[str, str], allowed: Collection[str]) -> list[str]:
    """Compares the rows that a run was trained on with those it is to go on with, source by source.

    Returns:
        One line for every change that is taken.

    Raises:
        DataError: They differ, and ``allowed`` does not hold ``data``.
    """
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if not changed:
        return []
    if ALLOW_DATA not in allowed:
        raise DataError(
            f"the rows are no longer those that the run was trained on: {', '.join(changed)} changed",
            why="the steps that are left would see other rows than they were to see",
            fix=f"put the file back, or add --allow-change {ALLOW_DATA}",
        )
    return [f"{name} changed, as allowed; the run is not what it would have been" for name in changed]
