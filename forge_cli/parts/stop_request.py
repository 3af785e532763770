"""What a signal asked of a run: to be stopped, or to save."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass


def name_signal(number: int) -> str:
    """Returns what a user calls a signal."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


class Interrupt(BaseException):
    """Ends what is going on because of a signal; no ``except Exception`` of a library may hold it up.

    Args:
        signal_number: The signal.
        at_once: The user has no patience for what is being written.
    """

    def __init__(self, signal_number: int, *, at_once: bool = False) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number
        self.at_once = at_once


@dataclass
class StopRequest:
    """What signals have asked for so far.

    Attributes:
        signal_number: Signal that asked for the end, or 0.
        wants_save: A checkpoint is wanted at the next step.
        is_deferred: The end waits for a good moment: training looks after every step.
        is_over: Everything is written, or the first process writes it: a signal ends nothing any more.
    """

    signal_number: int = 0
    wants_save: bool = False
    is_deferred: bool = False
    is_over: bool = False

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Lets the end wait while the block looks for itself.

        Raises:
            Interrupt: The end was asked for when the block had looked for the last time.
        """
        self.is_deferred = True
        try:
            yield
        finally:
            self.is_deferred = False
        if self.signal_number:
            raise Interrupt(self.signal_number)
