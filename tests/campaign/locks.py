"""Two processes want one run folder: one gets it, the other is told who has it; a killed one leaves it free (bar 10).

python tests/campaign/locks.py
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import forkserver
from small_runs import print_table

from forge_cli.errors import ForgeError
from forge_cli.run.folder import create_run_folder, open_run_folder

RACES = 50
WON, TOLD = 0, 5


def main() -> int:
    """Runs the races; returns the exit code."""
    root = Path(tempfile.mkdtemp(prefix="forge-locks-"))
    rows, failures = [], 0
    for what in ("a new run of one name", "resuming one run"):
        one_winner = told = freed = 0
        slowest = 0.0
        for number in range(RACES):
            folder = root / f"{what[:3]}-{number}"
            if what.startswith("res"):
                create_run_folder(str(folder), "run", "run", "", overwrite=False).lock.release()
            start = folder.with_suffix(".go")
            children = [
                forkserver.start_function(lambda f=folder, g=start, w=what: _race(f, g, w), root / f"{number}-{n}.log")
                for n in (0, 1)
            ]
            start.touch()
            loser = _wait_for_one(children)
            winner = children[1 - children.index(loser)]
            one_winner += loser.code == TOLD and winner.poll() is None
            told += "in use by" in loser.read_log() or "exists already" in loser.read_log()
            winner.wait_for(lambda f=folder: (f / "run" / "run.json").exists(), 5)
            winner.send(signal.SIGKILL)
            began = time.monotonic()
            freed += _opens(folder / "run")
            slowest = max(slowest, time.monotonic() - began)
            winner.wait(10)
        rows.append([what, RACES, one_winner, told, freed, f"{slowest:.3f}"])
        failures += 3 * RACES - one_winner - told - freed
    header = ["race for", "races", "one winner", "loser told by whom or why", "free after kill -9", "slowest, s"]
    print_table("Two processes, one folder", rows, header)
    shutil.rmtree(root)
    return 1 if failures else 0


def _race(folder: Path, start: Path, what: str) -> None:
    while not start.exists():
        time.sleep(0.0005)
    try:
        if what.startswith("res"):
            open_run_folder(folder / "run")
        else:
            create_run_folder(str(folder), "run", "run", "", overwrite=False)
    except ForgeError as error:
        print(error)
        sys.exit(error.exit_code)
    time.sleep(60)


def _wait_for_one(children: list) -> object:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        for child in children:
            if child.poll() is not None:
                return child
        time.sleep(0.001)
    return children[0]


def _opens(run: Path) -> bool:
    until = time.monotonic() + 1
    while time.monotonic() < until:
        try:
            open_run_folder(run).lock.release()
        except ForgeError:
            time.sleep(0.002)
        else:
            return True
    return False


if __name__ == "__main__":
    sys.exit(main())
