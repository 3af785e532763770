"""Going on with a run: which checkpoint, what has changed since, what is lost."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from forge_cli.checkpoints.store import Checkpoint, CheckpointStore, refuse_broken, verify
from forge_cli.errors import CheckpointError, ConfigError, DataError, MachineError, Problem
from forge_cli.resolve.effect import find_idle
from forge_cli.resolve.plan import Plan
from forge_cli.run.folder import RUN_FILE, RunFolder, recover_run
from forge_cli.run.ranks import Rank, meet
from forge_cli.schema.runspec import RunSpec

# What may be another without changing a single weight: evaluation draws no random number that training sees.
HARMLESS = ("name", "output_dir", "preset", "extends", "logging", "evaluation", "checkpoint", "monitor", "report")
ALLOW_DATA = "data"
ALLOW_RANKS = "num_processes"


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


def find_run(output_dir: str, name: str | None, stem: str) -> Path:
    """Finds the run that ``forge train RUN_FILE --resume`` means: the named one, or the latest of its file.

    Raises:
        CheckpointError: There is none.
    """
    root = Path(output_dir).expanduser()
    if name:
        recover_run(root / name)
        found = [root / name] if (root / name).is_dir() else []
    else:
        runs = [path for path in root.glob(f"{glob.escape(stem)}*") if (path / RUN_FILE).is_file()]
        numbers = {path: re.fullmatch(r"(?:-(\d+))?", path.name[len(stem) :]) for path in runs}
        found = [path for path in runs if numbers[path]]
        found = [max(found, key=lambda path: int(numbers[path][1] or 1))] if found else []
    if not found:
        raise CheckpointError(
            "there is no run to resume",
            where=str(root / (name or stem)),
            why="--resume never starts a run from the beginning",
            fix="leave --resume out to start it",
        )
    return found[0]


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
        kind, key = ("adapter", "adapter") if (folder.path / "adapter").is_dir() else ("model", "name")
        raise MachineError(
            "this run is finished: nothing is left to do",
            where=str(folder.path),
            why="its schedule has come to its end, and more steps are another run",
            fix="start a new run that begins with its weights: forge train RUN.yaml --set name=NEW "
            f"--set model.{key}={folder.path / kind}",
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


def introduce_folder(folder: RunFolder, device: str, point: ResumePoint | None) -> None:
    """Meets the other processes of the run and tells them its folder, and where it goes on."""
    if folder.rank.count == 1 or not folder.rank.is_main:
        return
    from forge_cli.parts.ranks import share

    meet(folder.rank, device)
    step = point.checkpoint.path.name if point else None
    share({"path": str(folder.path.absolute()), "run_id": folder.run_id, "checkpoint": step})


def find_folder_of_main(spec: RunSpec, rank: Rank) -> tuple[RunFolder, ResumePoint | None]:
    """Meets the first process and learns from it which folder the run has, and where it goes on.

    Raises:
        MachineError: The folder is not on this machine.
        CheckpointError: The checkpoint is not what the first process sees.
    """
    from forge_cli.build.compute import choose_compute
    from forge_cli.parts.ranks import share

    meet(rank, choose_compute(spec, rank.local).device)
    told = share()
    path = Path(told["path"])
    if not path.is_dir():
        raise MachineError(
            f"process {rank.number} does not see the run folder",
            where=str(path),
            why="all processes read the same checkpoints",
            fix="set output_dir to a folder that all machines share",
        )
    folder = RunFolder(path, told["run_id"], None, resumed=True, rank=rank)
    if told["checkpoint"] is None:
        return folder, None
    checkpoint = verify(folder.checkpoints / told["checkpoint"], folder.run_id)
    if not isinstance(checkpoint, Checkpoint):
        raise refuse_broken([checkpoint], folder.checkpoints)
    return folder, ResumePoint(checkpoint, (), 0, ())


def read_num_processes(run: Path) -> int:
    """Reads how many processes wrote the newest checkpoint of a run that can be read; 1 if none can."""
    for path in CheckpointStore(run / "checkpoints", "").list_paths():
        found = verify(path, hashes=False)
        if isinstance(found, Checkpoint):
            return found.manifest.world_size
    return 1


def compare_ranks_before(before: int, now: int, allowed: Collection[str]) -> list[str]:
    """Compares how many processes a run had with how many it has.

    Returns:
        One line if a change is taken.

    Raises:
        ConfigError: They differ, and ``allowed`` does not hold ``num_processes``.
    """
    if before == now:
        return []
    words = f"was {before} and is {now}"
    if ALLOW_RANKS in allowed:
        return [f"{ALLOW_RANKS} {words}, as allowed; a step has other rows, and the run is not what it would have been"]
    raise ConfigError(
        f"{ALLOW_RANKS} {words}",
        where="--num-processes",
        why="every step would see other rows, and random numbers would be others",
        fix=f"start {before}, or add --allow-change {ALLOW_RANKS}",
    )


def read_records(path: Path) -> list[dict]:
    """Reads ``metrics.jsonl``; a last line that was cut off by a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if (record := parse_record(line)) is not None:
            records.append(record)
    return records


def parse_record(line: str | bytes) -> dict | None:
    """Reads a line of ``metrics.jsonl``; ``None`` if it is no JSON object."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


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
    # A plan on disk leaves out what has no effect, so such a key would come back as the schema's default.
    idle = find_idle(before.spec).keys() & find_idle(now.spec).keys()
    changed = [path for path in sorted(was.keys() | new.keys()) if was.get(path) != new.get(path) and path not in idle]
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
