"""Starts the processes of a run on this machine, passes signals on, and ends all of them when one dies."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from forge_cli.errors import ConfigError, WorkerDied
from forge_cli.parts.stop_request import name_signal

# The others notice by themselves that one is gone, and save nothing then; who has not ended by now hangs.
PATIENCE_SECONDS = 15.0
_NAP_SECONDS = 0.05
_PASSED_ON = ("SIGTERM", "SIGUSR1", "SIGHUP")


def launch(arguments: Sequence[str], num_processes: int) -> int:
    """Carries out a ``forge`` command in several processes; returns the exit code of the one that ended first badly.

    Args:
        arguments: What follows ``forge``, without the option that led here.
        num_processes: How many.

    Raises:
        ConfigError: This process is one of several itself.
        WorkerDied: One was killed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "this is one of several processes already", where="--num-processes", fix="leave it out under torchrun"
        )
    processes = [
        _start(arguments, number, num_processes, port) for port in [_find_port()] for number in range(num_processes)
    ]
    asked: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        asked.append(number)
        for one in processes:
            with contextlib.suppress(ProcessLookupError):
                one.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (getattr(signal, name) for name in _PASSED_ON)}
    # Ctrl-C reaches all of a terminal's processes; this one only waits for them.
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        first = _wait_for_first(processes)
        _end_others(processes)
    finally:
        for number, action in before.items():
            signal.signal(number, action)
        for one in processes:
            with contextlib.suppress(ProcessLookupError):
                one.kill()
    code = processes[first].returncode if first is not None else 0
    if code < 0 and -code not in asked:
        raise WorkerDied(
            f"process {first} of {num_processes} on {socket.gethostname()} was killed by {name_signal(-code)}",
            why="the others were ended; what is in the run folder is whole",
            fix="go on with: forge resume",
        )
    return 128 - code if code < 0 else code


def _start(arguments: Sequence[str], number: int, count: int, port: int) -> subprocess.Popen:
    ranks = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    environment = {
        # Each would take all cores, and wait for the others' threads.
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)),
        **os.environ,
        **{name: str(value) for name, value in ranks.items()},
        "FORGE_LAUNCHED": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return subprocess.Popen([sys.executable, "-m", "forge_cli", *arguments], env=environment)


def _find_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def _wait_for_first(processes: Sequence[subprocess.Popen]) -> int | None:
    """Waits until all have ended well, or one badly; returns the number of that one."""
    while True:
        codes = [one.poll() for one in processes]
        bad = [number for number, code in enumerate(codes) if code]
        if bad:
            # One that was killed is the cause of what the others say.
            return next((number for number in bad if codes[number] < 0), bad[0])
        if all(code == 0 for code in codes):
            return None
        time.sleep(_NAP_SECONDS)


def _end_others(processes: Sequence[subprocess.Popen]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + PATIENCE_SECONDS
        while any(one.poll() is None for one in processes) and time.monotonic() < until:
            time.sleep(_NAP_SECONDS)
        for one in processes:
            if one.poll() is None:
                one.send_signal(number)
