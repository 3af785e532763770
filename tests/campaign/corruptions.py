"""Damaged checkpoints are detected, the file is named, and the one before is used (bar 4).

python tests/campaign/corruptions.py
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import forkserver
from small_runs import compare_runs, print_table, rewind, write_run_file

from forge_cli.checkpoints.store import Broken, CheckpointStore, verify
from forge_cli.run.folder import read_run_id

NEWEST, BEFORE = "step-00000006", "step-00000004"


def _flip(path: Path, share: float) -> None:
    data = bytearray(path.read_bytes())
    data[min(len(data) - 1, int(share * len(data)))] ^= 0x10
    path.write_bytes(data)


def _replace_by_link(path: Path) -> None:
    path.rename(path.parents[2] / path.name)
    path.symlink_to(path.parents[2] / path.name)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "one byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "one byte long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "bit flipped at the start": lambda path: _flip(path, 0.001),
    "bit flipped in the middle": lambda path: _flip(path, 0.5),
    "bit flipped at the end": lambda path: _flip(path, 1.0),
    "zeros of the same size": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "of another step": lambda path: shutil.copy(path.parents[1] / BEFORE / path.name, path),
    "a link to the right content": _replace_by_link,
}


def _edit_manifest(path: Path, **values: object) -> None:
    text = json.loads(path.read_text())
    path.write_text(json.dumps({**text, **values}))


FOLDER_DAMAGES: dict[str, Callable[[Path], object]] = {
    "MANIFEST.json: step edited": lambda folder: _edit_manifest(folder / "MANIFEST.json", step=5),
    "MANIFEST.json: run edited": lambda folder: _edit_manifest(folder / "MANIFEST.json", run_id="0" * 32),
    "MANIFEST.json: no files listed": lambda folder: _edit_manifest(folder / "MANIFEST.json", files={}),
    "MANIFEST.json: later format": lambda folder: _edit_manifest(folder / "MANIFEST.json", format=2),
    "intruder.bin: a file too many": lambda folder: (folder / "intruder.bin").write_bytes(b"x"),
}


def main() -> int:
    """Runs the corpus; returns the exit code."""
    forkserver.import_all()
    root = Path(tempfile.mkdtemp(prefix="forge-corrupt-"))
    environment = {"FORGE_CACHE": str(root / "cache")}
    path = write_run_file(root / "straight", "lora", checkpoint={"save_total_limit": 10})
    child = forkserver.run(["train", str(path)], root / "straight.log", environment)
    assert child.code == 0, child.read_log()
    straight = root / "straight" / "runs" / "lora"
    names = sorted(one.name for one in (straight / "checkpoints" / NEWEST).iterdir())
    cases = [(name, what, lambda f, n=name, d=damage: d(f / n)) for name in names for what, damage in DAMAGES.items()]
    cases += [(*label.split(": "), damage) for label, damage in FOLDER_DAMAGES.items()]
    failures, rows = [], {}
    for number, (name, what, damage) in enumerate(cases):
        target = root / "cells" / "lora"
        rewind(straight, target, 6)
        damage(target / "checkpoints" / NEWEST)
        found = verify(target / "checkpoints" / NEWEST, read_run_id(target))
        newest, _ = CheckpointStore(target / "checkpoints", read_run_id(target)).find_newest()
        named = isinstance(found, Broken) and name in found.reason
        used = newest is not None and newest.path.name == BEFORE
        row = rows.setdefault(name, [0, 0, 0, 0])
        for place, holds in enumerate((True, isinstance(found, Broken), named, used)):
            row[place] += holds
        if not (named and used):
            failures.append(f"{name} {what}: {found} {newest and newest.path.name}")
        if number % 9 == 0:  # the whole command for some of them
            again = forkserver.run(["resume", str(target)], root / "resume.log", environment)
            wrong = [f"exit {again.code}"] if again.code else compare_runs(straight, target)
            if wrong or name not in again.read_log():
                failures.append(f"resume after {name} {what}: {wrong} {again.read_log()[-300:]}")
    print("\n".join(failures[:20]))
    header = ["file", "damages", "detected", "file named", "one before used"]
    print_table("Damaged checkpoints", [[name, *row] for name, row in rows.items()], header)
    print(f"\n{len(cases) - len(failures)} of {len(cases)}; every ninth resumed by the command, bit-equal at the end")
    shutil.rmtree(root)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
