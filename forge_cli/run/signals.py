"""Signals: training ends after the step in hand, everything else ends at once, and both leave a run that goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from forge_cli.errors import Stopped
from forge_cli.parts.stop_request import Interrupt, StopRequest, name_signal

# A scheduler that sends a signal twice within this time means it once.
REPEAT_SECONDS = 5.0
_AGAIN_SECONDS = 0.01


class SignalListener:
    """Turns signals into a request that training sees, or into an :class:`Interrupt`.

    Args:
        stop_on_usr1: SIGUSR1 stops the run as well; else it saves, and the run goes on.
    """

    def __init__(self, *, stop_on_usr1: bool = False) -> None:
        self.stop_on_usr1 = stop_on_usr1
        self.request = StopRequest()
        self._owner = os.getpid()
        self._num_interrupts = 0
        self._asked_at = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Receives signals within the block; only the main thread can, so elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield self.request
            return
        wanted = {signal.SIGINT: self._receive, signal.SIGTERM: self._receive}
        if hasattr(signal, "SIGUSR1"):
            # The terminal may go; what the run writes is on the disk.
            wanted |= {signal.SIGUSR1: self._receive, signal.SIGHUP: signal.SIG_IGN}
        before = {number: signal.getsignal(number) for number in wanted}
        hook, sys.unraisablehook = sys.unraisablehook, self._receive_unraisable
        for number, action in wanted.items():
            signal.signal(number, action)
        try:
            yield self.request
        finally:
            sys.unraisablehook = hook
            for number, action in before.items():
                # None: a handler that was not set from Python and cannot be put back.
                signal.signal(number, signal.SIG_DFL if action is None else action)

    def _receive(self, number: int, frame: object) -> None:
        if os.getpid() != self._owner:
            self._receive_in_child(number)
            return
        request = self.request
        if number == getattr(signal, "SIGUSR1", None) and not self.stop_on_usr1:
            request.wants_save = True
            return
        if request.is_over:
            request.signal_number = request.signal_number or number
            return
        is_repeated = bool(request.signal_number) and time.monotonic() - self._asked_at < REPEAT_SECONDS
        self._num_interrupts += number == signal.SIGINT
        request.signal_number = request.signal_number or number
        if self._num_interrupts > 1:
            raise Interrupt(signal.SIGINT, at_once=True)
        if is_repeated:
            return
        self._asked_at = time.monotonic()
        if not request.is_deferred:
            raise Interrupt(number)
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        # Not print: it may be what was interrupted.
        with contextlib.suppress(OSError):
            os.write(2, f"{name_signal(number)}: saving after this step, then stopping{again}\n".encode())

    def _receive_unraisable(self, event) -> None:
        """Sends a signal once more that came while an object was deleted, where nothing can be raised."""
        if not isinstance(event.exc_value, Interrupt):
            sys.__unraisablehook__(event)
            return
        number = event.exc_value.signal_number
        self._asked_at = float("-inf")
        self._num_interrupts = 0
        threading.Timer(_AGAIN_SECONDS, os.kill, (self._owner, number)).start()

    @staticmethod
    def _receive_in_child(number: int) -> None:
        """A forked worker ends with its parent at Ctrl-C, which all of a terminal's processes get, and by SIGTERM."""
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def describe_interrupt(event: Interrupt, folder: Path) -> Stopped:
    """Builds the error of a run that was interrupted outside its training steps, or at once."""
    name = name_signal(event.signal_number) + (", pressed twice" if event.at_once else "")
    if any((folder / "checkpoints").glob("step-*")):
        why, fix = "what is in the run folder is whole", f"go on with: forge resume {folder}"
    else:
        why, fix = "no step was done", "start it again; with --overwrite if the run folder is still there"
    # What was interrupted anywhere may have left a lock taken, on which the interpreter's end would wait.
    return Stopped(event.signal_number, f"stopped by {name}", at_once=True, where=str(folder), why=why, fix=fix)
