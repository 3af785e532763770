"""Injects the documented faults into real runs of a run file, and tells what survived; torch stays in the children."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from forge_cli import faults
from forge_cli.checkpoints.store import Broken, CheckpointStore, verify
from forge_cli.errors import ModelError
from forge_cli.run.folder import read_run_id

STEPS = 6
SAVE_STEPS = 2
_WEIGHTS = ("adapter", "model")


@dataclass(frozen=True)
class Trial:
    """One fault and what should come of it.

    Attributes:
        what: The fault in words.
        fault: As for ``FORGE_FAULT``.
        codes: Exit codes of the disturbed run that are right.
        same_bits: Whether the run, gone on with, has to end with the weights of an undisturbed one.
        environment: Further variables.
    """

    what: str
    fault: str
    codes: tuple[int, ...]
    same_bits: bool = True
    environment: tuple[tuple[str, str], ...] = ()


TRIALS = (
    Trial("killed while the weights are written", "kill@save:weights.safetensors:4", (137,)),
    Trial("killed while the optimizer is written", "kill@save:optimizer.safetensors:4", (137,)),
    Trial("killed before the manifest is whole", "kill@save:manifest:4", (137,)),
    Trial("killed before the rename", "kill@save:rename:4", (137,)),
    Trial("killed between two saves", "kill@step:5", (137,)),
    Trial("crashes (SIGABRT) in a step", "abort@step:5", (134,)),
    Trial("SIGTERM in a step", "term@step:5", (143,)),
    Trial("Ctrl-C in a step", "int@step:5", (130,)),
    Trial("hangs in a step", "hang@step:5", (12,), environment=(("FORGE_WATCHDOG_SECONDS", "20"),)),
    Trial("disk full while saving", "full@save:weights.safetensors:4", (0,)),
    Trial("out of memory in a step", "oom@forward:5", (0, 11), same_bits=False),
    Trial("loss is NaN in a step", "nan@loss:5", (0,), same_bits=False),
)


@dataclass(frozen=True)
class Verdict:
    """What became of one trial.

    Attributes:
        trial: The trial.
        code: Exit code of the disturbed run.
        broken: Checkpoints that can be seen and not be used.
        resumed: Exit code of the run that went on; ``None`` where none had to.
        equal: Whether it ended with the weights of the undisturbed run.
    """

    trial: Trial
    code: int
    broken: int
    resumed: int | None
    equal: bool

    @property
    def survived(self) -> bool:
        """Whether all is as it should be."""
        came_through = self.code in self.trial.codes and not self.broken and self.resumed in (None, 0)
        return came_through and (self.equal or not self.trial.same_bits or self.code == 11)


def inject_faults(
    run_file: Path, overrides: Sequence[str], folder: Path, say: Callable[[str], None]
) -> Iterator[Verdict]:
    """Runs a run file for a few steps, once undisturbed and once with every fault.

    Args:
        run_file: The run file.
        overrides: ``path=value`` settings above it.
        folder: Receives the runs.
        say: Receives progress.

    Yields:
        What became of each fault.

    Raises:
        ModelError: The undisturbed run fails.
    """
    settings = [*overrides, f"output_dir={folder}", f"training.max_steps={STEPS}", "report=null"]
    settings += [f"checkpoint={{save_steps: {SAVE_STEPS}, save_total_limit: 2}}"]
    say(f"undisturbed run of {STEPS} steps ...")
    began = time.monotonic()
    code, log = _train(run_file, settings, folder, "undisturbed", {})
    if code:
        raise ModelError(
            f"the undisturbed run ends with exit code {code}", where=str(log), fix=f"make `forge train {run_file}` run"
        )
    minutes = 2 * len(TRIALS) * (time.monotonic() - began) / 60
    say(f"{len(TRIALS)} faults follow, each run gone on with to its end: about {max(1, round(minutes))} minutes")
    for number, trial in enumerate(TRIALS, 1):
        say(f"{number}/{len(TRIALS)} {trial.what} ({trial.fault}) ...")
        name = f"fault-{number:02d}"
        code, _ = _train(run_file, settings, folder, name, {faults.VARIABLE: trial.fault, **dict(trial.environment)})
        run = folder / name
        broken = _count_broken(run)
        resumed = None
        if code:
            resumed, _ = _forge(["resume", str(run), "--quiet"], folder / f"{name}-resumed.log", {})
        yield Verdict(trial, code, broken, resumed, _read_weights(run) == _read_weights(folder / "undisturbed"))


def _train(run_file: Path, settings: Sequence[str], folder: Path, name: str, environment: dict) -> tuple[int, Path]:
    options = [part for one in (*settings, f"name={name}") for part in ("--set", one)]
    return _forge(["train", str(run_file), "--quiet", "--force", *options], folder / f"{name}.log", environment)


def _forge(arguments: list[str], log: Path, environment: dict[str, str]) -> tuple[int, Path]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        command = [sys.executable, "-m", "forge_cli", *arguments]
        done = subprocess.run(command, stdout=output, stderr=output, env={**os.environ, **environment}, check=False)
    return done.returncode if done.returncode >= 0 else 128 - done.returncode, log


def _count_broken(run: Path) -> int:
    store = CheckpointStore(run / "checkpoints", read_run_id(run))
    return sum(isinstance(verify(path, store.run_id), Broken) for path in store.list_paths())


def _read_weights(run: Path) -> list[bytes]:
    """Reads the weights that a run ended with; none if it did not end."""
    return [path.read_bytes() for name in _WEIGHTS for path in sorted((run / name).glob("*.safetensors"))]
