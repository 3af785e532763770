"""A disk that is too small: 30 sizes, and full, read-only and limited disks under whole runs (bar 8).

python tests/campaign/disk.py

Mounts tmpfs where it may; elsewhere files are limited by RLIMIT_FSIZE, and it says so.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import forkserver
from small_runs import list_state, print_table, write_run_file

from forge_cli.checkpoints.store import Checkpoint, CheckpointStore, verify
from forge_cli.run.folder import read_run_id

RUN = "d" * 32
SIZES = 30
NUM_FLOATS = 500_000
MIB = 1 << 20


def main() -> int:
    """Runs all of it; returns the exit code."""
    root = Path(tempfile.mkdtemp(prefix="forge-disk-"))
    mounts = can_mount(root)
    if not mounts:
        print("mounts are not allowed here: files are limited by RLIMIT_FSIZE instead")
    forkserver.import_all()
    rows = [[f"{how}, 10 % to 200 % of a checkpoint", *try_sizes(root, how)] for how in list_ways(mounts)]
    header = ["disk", "sizes", "saves refused", "earlier one verified", "needed and free said", "nothing left behind"]
    print_table("A second checkpoint on a disk with a first one", rows, header)
    failures = sum(row[1] != row[3] or row[2] != row[4] or row[1] != row[5] or not row[2] for row in rows)
    cases = [*(MOUNTED if mounts else ()), try_limit, try_report, try_places]
    rows = [case(root) for case in cases]
    print_table("Whole runs", rows, ["disk", "what has to happen", "exit", "held"])
    failures += sum(row[-1] != "yes" for row in rows)
    shutil.rmtree(root)
    return 1 if failures else 0


def list_ways(mounts: bool) -> list[str]:
    """Names the ways in which this machine can make a disk small."""
    return ["tmpfs", "RLIMIT_FSIZE"] if mounts else ["RLIMIT_FSIZE"]


def can_mount(root: Path) -> bool:
    """Tells whether this user may mount."""
    try:
        with mounted(root / "probe", MIB):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextlib.contextmanager
def mounted(path: Path, num_bytes: int) -> Iterator[Path]:
    """Mounts an empty disk of a size."""
    path.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(path))
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def mount(*arguments: str) -> None:
    """Calls mount."""
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


# A second checkpoint ------------------------------------------------------------------------------------------


def try_sizes(root: Path, how: str) -> list[int]:
    """Saves a second checkpoint where a share of it fits, in the order of the table's columns."""
    size, counts = measure_checkpoint(root / "whole"), [0] * 5
    for number in range(SIZES):
        share = 0.1 + 1.9 * number / (SIZES - 1)
        with small_disk(root / f"{how}-{number}", how, size, share) as (folder, limit):
            said, refused = save_second(folder, limit)
            sound = isinstance(verify(folder / "step-00000001", RUN), Checkpoint)
            names = {path.name for path in folder.iterdir()}
            second = isinstance(verify(folder / "step-00000002", RUN), Checkpoint)
            wanted = {"step-00000001"} | (set() if refused else {"step-00000002"})
            counts[0] += 1
            counts[1] += refused
            counts[2] += sound and second != refused
            counts[3] += refused and "it needs" in said and "are free" in said and "step-00000001 is whole" in said
            counts[4] += names == wanted
    return counts


def measure_checkpoint(folder: Path) -> int:
    """Returns the size of a checkpoint."""
    keeper = make_keeper(folder, [])
    save(keeper, 1)
    return sum(path.stat().st_size for path in (folder / "step-00000001").iterdir())


@contextlib.contextmanager
def small_disk(folder: Path, how: str, size: int, share: float) -> Iterator[tuple[Path, int | None]]:
    """Makes room for a first checkpoint and a share of a second; yields the folder and a limit of a file's size."""
    if how == "tmpfs":
        with mounted(folder, round((1 + share) * size)):
            yield folder, None
    else:
        folder.mkdir()
        yield folder, round(share * 4 * NUM_FLOATS)


def make_keeper(folder: Path, said: list[str]):
    """Makes a keeper."""
    from forge_cli.parts.keeper import Keeper

    return Keeper(CheckpointStore(folder, RUN), {}, said.append)


def save(keeper, step: int) -> None:
    """Saves two files, and waits."""
    import torch

    half = torch.full((NUM_FLOATS // 2,), float(step))
    keeper.save(step, {"weights": {"w": half}, "optimizer": {"m": half, "v": half + 1}}, {"small.json": {"a": 1}})
    keeper.finish()


def save_second(folder: Path, limit: int | None) -> tuple[str, bool]:
    """Saves a first and a second checkpoint; returns what was said and whether the second was refused."""
    said: list[str] = []
    keeper = make_keeper(folder, said)
    save(keeper, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        save(keeper, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "\n".join(said), not keeper.has_saved(2)


# Whole runs ---------------------------------------------------------------------------------------------------


def train(run_file: Path, *more: str, limit: int | None = None):
    """Runs ``forge train`` in a child, with a limit of a file's size."""

    def start() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        forkserver._run_forge(["train", str(run_file), *more])

    child = forkserver.start_function(start, run_file.with_suffix(".log"))
    if child.wait(120) is None:
        child.kill()
    return child


def judge(name: str, wanted: str, child, held: bool) -> list[object]:
    """Makes a row; a traceback on the terminal never holds."""
    held = held and "Traceback" not in child.read_log()
    if not held:
        print(f"{name}: exit {child.code}\n{child.read_log()[-1500:]}", file=sys.stderr)
    return [name, wanted, child.code, "yes" if held else "NO"]


def try_too_small(root: Path) -> list[object]:
    """A disk that cannot hold the run."""
    with mounted(root / "small", 20 * MIB) as disk:
        child = train(write_run_file(root / "a", "full", output_dir=str(disk)))
        held = child.code == 5 and "it needs" in child.read_log() and not list(disk.iterdir())
        return judge("tmpfs of 20 MiB", "5 before training, needed and free bytes, no folder left", child, held)


def try_read_only(root: Path) -> list[object]:
    """A disk that may not be written."""
    with mounted(root / "ro", 200 * MIB) as disk:
        mount("-o", "remount,ro", str(disk))
        child = train(write_run_file(root / "b", "lora", output_dir=str(disk)))
        held = child.code == 5 and "Read-only file system" in child.read_log()
        return judge("read-only at the start", "5", child, held)


def _spoil_midway(root: Path, name: str, spoil, wanted_text: str) -> list[object]:
    """Spoils a disk while the third step is trained; three saves are missed, and the last good one is named."""
    with mounted(root / name, 100 * MIB) as disk:
        changes = {"training": {"max_steps": 12}, "checkpoint": {"save_steps": 2}}
        run_file = write_run_file(root / f"{name}-file", "lora", output_dir=str(disk), **changes)
        paused = run_file.with_suffix(".paused")
        go = run_file.with_suffix(".go")
        child = forkserver.start_function(
            lambda: _train_and_wait(run_file, paused, go), run_file.with_suffix(".log"), {}
        )
        child.wait_for(paused.exists, 90)
        spoil(disk)
        go.touch()
        if child.wait(120) is None:
            child.kill()
        log = child.read_log()
        newest, broken = list_state(disk / "lora")
        left = [path.name for path in (disk / "lora" / "checkpoints").iterdir() if path.name.startswith(".")]
        held = child.code == 13 and newest == 2 and not broken and wanted_text in log and "step-00000002" in log
        held = held and "it needs" in log and "are free" in log and not (left and name == "full")
        if held and name == "full":
            (disk / "filler").unlink()
            again = forkserver.run(["resume", str(disk / "lora")], run_file.with_suffix(".again.log"))
            held = again.code == 0
        return judge(name, "trains on, 13 after three missed saves, step 2 whole and named", child, held)


def _train_and_wait(run_file: Path, paused: Path, go: Path) -> None:
    """Trains; waits at step 3 until somebody has spoiled the disk."""
    from forge_cli import faults

    reach = faults.reach

    def wait_at_three(place: str, step: int | None = None) -> str:
        if (place, step) == ("step", 3) and not paused.exists():
            paused.touch()
            while not go.exists():
                time.sleep(0.01)
        return reach(place, step)

    faults.reach = wait_at_three
    forkserver._run_forge(["train", str(run_file)])


def try_full(root: Path) -> list[object]:
    """A disk that others fill."""

    def fill(disk: Path) -> None:
        with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
            while file.write(b"x" * 65536):
                pass

    return _spoil_midway(root, "full", fill, "does not fit")


def try_remounted(root: Path) -> list[object]:
    """A disk that becomes read-only."""

    def remount(disk: Path) -> None:
        # The whole disk cannot be made read-only while the lock is open for writing.
        folder = str(disk / "lora" / "checkpoints")
        mount("--bind", folder, folder)
        mount("-o", "remount,ro,bind", folder)

    return _spoil_midway(root, "read-only", remount, "Read-only file system")


def try_limit(root: Path) -> list[object]:
    """A user whose files may not grow: not even the first checkpoint is taken."""
    run_file = write_run_file(root / "limit", "full")
    child = train(run_file, limit=MIB)
    held = child.code == 5 and "File too large" in child.read_log() and "are free" in child.read_log()
    return judge("RLIMIT_FSIZE of 1 MiB", "5 at the first save, needed and free bytes", child, held)


def try_report(root: Path) -> list[object]:
    """A disk that takes the weights and no report: a folder is in the report's way."""
    run_file = write_run_file(root / "report", "lora", checkpoint=None)
    block = root / "report" / "runs" / "lora" / "report.json.partial" / "x"

    def start() -> None:
        from forge_cli import faults

        reach = faults.reach
        faults.reach = lambda place, step=None: (block.mkdir(parents=True, exist_ok=True), reach(place, step))[1]
        forkserver._run_forge(["train", str(run_file)])

    child = forkserver.start_function(start, run_file.with_suffix(".log"))
    child.wait(120)
    held = child.code == 5 and "the weights are saved in" in child.read_log()
    held = held and (root / "report" / "runs" / "lora" / "adapter" / "adapter_model.safetensors").exists()
    return judge("no room for the report", "5 with the place of the weights", child, held)


def try_places(root: Path) -> list[object]:
    """A killed run behind a link, in an oddly named folder, is moved and loses its best checkpoint and all times."""
    real = root / "real place ü" / ("long " * 40).strip()
    real.mkdir(parents=True)
    (root / "link").symlink_to(real)
    changes = {
        "data": {"eval": "forge:quickstart/heldout"},
        "evaluation": {"per_device_eval_batch_size": 30, "eval_steps": 2},
        "checkpoint": {"save_steps": 2, "save_total_limit": 3},
    }
    run_file = write_run_file(root / "places", "lora", output_dir=str(root / "link"), **changes)
    log = run_file.with_suffix(".log")
    killed = forkserver.run(["train", str(run_file)], log, {"FORGE_FAULT": "kill@step:7"}).code
    moved = root / "moved here"
    shutil.move(real / "lora", moved)
    found = CheckpointStore(moved / "checkpoints", read_run_id(moved)).list_sound()
    best = min(found, key=lambda one: one.manifest.eval_loss or 9e9)
    newest = max(one.step for one in found)
    if best.step != newest:
        shutil.rmtree(best.path)
    for name in (".tmp-00000007-1", ".trash-00000001-1", "mine"):
        (moved / "checkpoints" / name).mkdir()
    for path in moved.rglob("*"):
        os.utime(path, (0, 0))
    child = forkserver.run(["resume", str(moved)], log, {"FORGE_FAULT": ""})
    names = {path.name for path in (moved / "checkpoints").iterdir()}
    held = killed == 137 and child.code == 0 and f"resumed from step-{newest:08d}" in child.read_log()
    held = held and "mine" in names and not any(name.startswith(".t") for name in names)
    return judge("a link, an odd name, moved, best gone, times 0", "resumes from the newest; leftovers go", child, held)


MOUNTED = (try_too_small, try_read_only, try_full, try_remounted)


if __name__ == "__main__":
    sys.exit(main())
