"""Many real runs of Forge without paying the imports for each: one process imports, and forks a child per run.

The parent imports the libraries, starts no thread and runs nothing, so that a child is what a fresh process would be.
Import this module before anything that starts threads; it needs a system that has ``fork``.
"""

# ruff: noqa: E402
from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # torch reads them when it is imported

import atexit
import contextlib
import signal
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# What a run imports late.
MODULES = (
    "forge_cli.cli.app",
    "forge_cli.cli.resume",
    "forge_cli.cli.live",
    "forge_cli.run.execute",
    "forge_cli.run.stages",
    "forge_cli.run.training",
    "forge_cli.run.artifacts",
    "forge_cli.run.report",
    "forge_cli.run.summary",
    "forge_cli.run.describe",
    "forge_cli.build.adapter",
    "forge_cli.build.model",
    "forge_cli.build.data",
    "forge_cli.build.tokenizer",
    "forge_cli.data.store",
    "pyarrow.ipc",
    "pyarrow.dataset",
    "datasets",
    "safetensors.torch",
    "torch._dynamo",
    "transformers.models.auto",
    "transformers.integrations.integration_utils",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.gpt2.modeling_gpt2",
)
TIMED_OUT = None


@dataclass
class Child:
    """A run in a process of its own, which leads its own process group.

    Attributes:
        pid: The process.
        log: Its stdout and stderr.
        began: When it was started, ``time.monotonic()``.
        code: Exit code as a shell gives it (128 + n for a signal that killed it); ``None`` while it runs.
        seconds: How long it ran.
    """

    pid: int
    log: Path
    began: float
    code: int | None = None
    seconds: float = 0.0

    def poll(self) -> int | None:
        """Returns the exit code, or ``None`` while the process runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.seconds = time.monotonic() - self.began
                code = os.waitstatus_to_exitcode(status)
                self.code = code if code >= 0 else 128 - code
        return self.code

    def wait(self, timeout_seconds: float) -> int | None:
        """Waits for the end; returns the exit code, or ``None`` if the process still runs."""
        until = time.monotonic() + timeout_seconds
        while self.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        return self.code

    def send(self, number: int) -> bool:
        """Sends a signal to the process alone; false if it has ended."""
        if self.poll() is not None:
            return False
        os.kill(self.pid, number)
        return True

    def kill(self) -> None:
        """Ends the process and all that it started, whatever state it is in."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait(30)

    def wait_for(self, test: Callable[[], bool], timeout_seconds: float) -> bool:
        """Waits until something is so; false if the process ended or time ran out first."""
        until = time.monotonic() + timeout_seconds
        while time.monotonic() < until:
            if test():
                return True
            if self.poll() is not None:
                return test()
            time.sleep(0.002)
        return False

    def read_log(self) -> str:
        """Returns what the process printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def import_all(modules: Sequence[str] = MODULES) -> float:
    """Imports what runs need; returns how long that took.

    Raises:
        RuntimeError: A thread was started, so that a fork would not be sound.
    """
    import importlib

    began = time.monotonic()
    for name in modules:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(name)
    import torch
    import trl

    for name in ("SFTTrainer", "DPOTrainer"):
        getattr(trl, name)  # lazy attributes
    torch.set_num_threads(1)
    if threading.active_count() > 1:
        raise RuntimeError(f"threads are running: {threading.enumerate()}")
    return time.monotonic() - began


def start(arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> Child:
    """Starts ``forge ARGUMENTS`` in a child.

    Args:
        arguments: As typed after ``forge``.
        log: File for its stdout and stderr; what was in it is lost.
        environment: Variables to set in the child: ``FORGE_FAULT``, ``FORGE_CACHE``, ...
    """
    return start_function(lambda: _run_forge(arguments), log, environment)


def start_function(function: Callable[[], None], log: Path, environment: Mapping[str, str] | None = None) -> Child:
    """Starts a function in a child; it ends the process by ``SystemExit`` or by coming back."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    sys.stdout.flush()
    sys.stderr.flush()
    began = time.monotonic()
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)  # in both processes, so that it is done when either goes on
        return Child(pid, log, began)
    try:
        _become(log, environment or {})
        code = _call(function)
    except BaseException:
        traceback.print_exc()
        code = 99
    os._exit(code)


def run(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, timeout_seconds: float = 120
) -> Child:
    """Runs ``forge ARGUMENTS`` in a child to its end; one that hangs is killed, and its code is ``None``."""
    child = start(arguments, log, environment)
    if child.wait(timeout_seconds) is None:
        child.kill()
        child.code = TIMED_OUT
    return child


def _become(log: Path, environment: Mapping[str, str]) -> None:
    """Makes the child look like a process that was started from a shell."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.close(output)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    weakref.finalize._registry.clear()  # the parent's temporary folders are not this process's to delete
    from forge_cli import faults

    faults._read_plan.cache_clear()


def _run_forge(arguments: Sequence[str]) -> None:
    from forge_cli.cli.app import run_app

    sys.argv = ["forge", *arguments]
    try:
        run_app(list(arguments))
    except KeyboardInterrupt:
        sys.exit(130)  # as forge_cli.__main__ does


def _call(function: Callable[[], None]) -> int:
    """Calls a function and does what an interpreter does at its end; returns the exit code."""
    try:
        function()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return code
