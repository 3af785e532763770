"""One run in several processes: which one this is, and what all of them have to agree on. Imports torch late."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from forge_cli.errors import ConfigError, MachineError
from forge_cli.resolve.plan import Plan
from forge_cli.version import __version__


@dataclass(frozen=True)
class Rank:
    """The place of this process among those of the run.

    Attributes:
        number: From 0; the first one writes everything.
        count: How many there are.
        local: Number on this machine, which is also its GPU's.
    """

    number: int = 0
    count: int = 1
    local: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return self.number == 0


def read_rank() -> Rank:
    """Reads what ``torchrun``, ``accelerate launch`` or ``forge train --num-processes`` put into the environment.

    Raises:
        ConfigError: It is no whole number, or makes no sense.
    """
    try:
        count = int(os.environ.get("WORLD_SIZE", "1"))
        number = int(os.environ.get("RANK", "0"))
        local = int(os.environ.get("LOCAL_RANK", str(number)))
    except ValueError as error:
        raise ConfigError(f"not a whole number: {error}", where="WORLD_SIZE, RANK, LOCAL_RANK") from None
    if not (0 <= number < count and local >= 0):
        raise ConfigError(
            f"process {number} of {count} cannot be",
            where="WORLD_SIZE, RANK",
            fix="unset both, or start the run with: forge train RUN_FILE --num-processes N",
        )
    return Rank(number, count, local) if count > 1 else Rank()


def meet(rank: Rank, device: str) -> None:
    """Meets the other processes.

    Raises:
        MachineError: They cannot be reached.
    """
    if rank.count == 1:
        return
    from forge_cli.parts.ranks import join_ranks

    where = f"{os.environ.get('MASTER_ADDR', '(no MASTER_ADDR)')}:{os.environ.get('MASTER_PORT', '(no MASTER_PORT)')}"
    try:
        join_ranks(device)
    except (RuntimeError, ValueError, KeyError) as error:
        raise MachineError(
            f"process {rank.number} cannot meet the other {rank.count - 1}: {str(error).splitlines()[0][:200]}",
            where=where,
            why="the port is taken, or the first process is not reachable there",
            fix="set MASTER_ADDR and MASTER_PORT to a free port of the first machine",
        ) from error


def compare_ranks(plan: Plan, data_fingerprint: str) -> None:
    """Makes sure that all processes carry out the same plan with the same rows and libraries.

    Raises:
        MachineError: They differ; names in what.
    """
    from importlib.metadata import version

    from forge_cli.parts.ranks import gather

    own = {
        "the plan": plan.digest,
        "the rows": data_fingerprint,
        "forge": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "trl", "peft")},
    }
    everyone = gather(own)
    for key in own:
        values = [str(one[key])[:12] for one in everyone]
        if len(set(values)) > 1:
            shown = ", ".join(f"process {number}: {value}" for number, value in enumerate(values))
            raise MachineError(
                f"the processes differ in {key}",
                where=shown,
                why="they would train different things into one model",
                fix="start all of them with the same run file, files and versions",
            )


def name_file(path: Path, rank: Rank) -> Path:
    """Returns a log file's name for this process: ``forge.log``, ``forge-1.log``."""
    return path if rank.is_main else path.with_name(f"{path.stem}-{rank.number}{path.suffix}")
