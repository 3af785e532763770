"""Faults on demand: what a run does when it is killed, out of memory or out of disk at a chosen place.

``FORGE_FAULT="kill@save:optimizer.safetensors:37"`` kills the process while step 37's optimizer state is half written.
Off unless the variable is set. ``docs/reliability.md`` lists places and actions.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from forge_cli.errors import ConfigError

VARIABLE = "FORGE_FAULT"
RANK_VARIABLE = "FORGE_FAULT_RANK"
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT, "usr1": signal.SIGUSR1}
ERRORS = {"full": errno.ENOSPC, "readonly": errno.EROFS, "ioerror": errno.EIO}
# What the code at the place has to do itself, as it needs tensors.
LEFT_TO_CALLER = ("nan", "inf", "oom", "spike")
ACTIONS = (*SIGNALS, *ERRORS, *LEFT_TO_CALLER, "abort", "hang", "pause", "exit")
_HANG_SECONDS = 3600.0
_FORM = re.compile(r"(?P<action>[a-z0-9]+)(\*(?P<times>\d+))?@(?P<place>[a-z0-9_.:-]+?)(:(?P<step>\d+))?")


@dataclass
class Fault:
    """One fault to cause.

    Attributes:
        action: What happens.
        place: Where, as the code names it.
        step: Optimizer step, or ``None`` for the first time that the place is reached.
        times_left: How often it still happens.
    """

    action: str
    place: str
    step: int | None
    times_left: int = 1


def parse_faults(text: str) -> list[Fault]:
    """Reads ``ACTION[*TIMES]@PLACE[:STEP]``, several with commas between.

    Raises:
        ConfigError: The text has another form.
    """
    faults = []
    for part in filter(None, (one.strip() for one in text.split(","))):
        match = _FORM.fullmatch(part)
        if match is None or match["action"] not in ACTIONS:
            raise ConfigError(
                f"{part!r} is not a fault",
                where=VARIABLE,
                fix=f"write ACTION@PLACE:STEP, as in kill@save:weights.safetensors:37; actions: {', '.join(ACTIONS)}",
            )
        step = int(match["step"]) if match["step"] else None
        faults.append(Fault(match["action"], match["place"], step, int(match["times"] or 1)))
    return faults


class FaultPlan:
    """The faults that this process is to suffer."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults

    def reach(self, place: str, step: int | None = None) -> str:
        """Says that a place is reached; returns an action that the caller has to carry out, or nothing.

        Raises:
            OSError: The fault is one of the disk.
        """
        for fault in self.faults:
            if fault.times_left and fault.place == place and fault.step in (None, step):
                fault.times_left -= 1
                return _carry_out(fault.action)
        return ""


def _carry_out(action: str) -> str:
    if action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[action])
    elif action in ERRORS:
        raise OSError(ERRORS[action], os.strerror(ERRORS[action]))
    elif action == "abort":
        os.abort()
    elif action == "exit":
        os._exit(1)
    elif action in ("hang", "pause"):
        _announce_pause()
        time.sleep(_HANG_SECONDS)
    return action if action in LEFT_TO_CALLER else ""


def _announce_pause() -> None:
    """Tells a campaign that the place is reached: it waits for this file before it kills."""
    if path := os.environ.get(f"{VARIABLE}_FILE"):
        with contextlib.suppress(OSError):
            Path(path).touch()


@functools.cache
def _read_plan() -> FaultPlan:
    faults = parse_faults(os.environ.get(VARIABLE, ""))
    # Of several processes, only this one is to suffer.
    wanted, own = os.environ.get(RANK_VARIABLE), os.environ.get("RANK", "0")
    return FaultPlan(faults if wanted in (None, own) else [])


def reach(place: str, step: int | None = None) -> str:
    """Says that the process reaches a place where a fault may be wanted; see :meth:`FaultPlan.reach`."""
    plan = _read_plan()
    return plan.reach(place, step) if plan.faults else ""
