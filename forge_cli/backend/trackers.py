"""Trackers such as TensorBoard and W&B: one that does not start is an error, one that fails later is left out."""

from __future__ import annotations

import contextlib
import io

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from forge_cli.errors import ForgeError, MachineError
from forge_cli.parts.monitor import MonitorCallback


class GuardedTracker(TrainerCallback):
    """A tracker whose failures end a run only before its first step.

    Args:
        tracker: The library's callback.
        monitor: Receives the alarm.
    """

    def __init__(self, tracker: TrainerCallback, monitor: MonitorCallback) -> None:
        self.tracker, self.monitor = tracker, monitor
        self.name = type(tracker).__name__.removesuffix("Callback")
        self.has_started = False

    def pass_on(self, event: str, args, state, control, **kwargs):
        """Calls the tracker; what it prints would stand in the middle of the view.

        Raises:
            MachineError: It does not start.
        """
        if self.tracker is None:
            return None
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                answer = getattr(self.tracker, event)(args, state, control, **kwargs)
        except ForgeError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            if not self.has_started:
                raise MachineError(
                    f"{self.name} does not start: {what}"[:400],
                    why="it is named in logging.report_to, so its record of the run is wanted",
                    fix="mend it, or take it out of logging.report_to",
                ) from error
            self.tracker = None
            self.monitor.alarm(state.global_step, "tracker", f"{self.name} failed and is left out: {what}"[:400])
            return None
        self.has_started |= event == "on_train_begin"
        return answer


def _make_event(event: str):
    def call(self, args, state, control, **kwargs):
        return self.pass_on(event, args, state, control, **kwargs)

    return call


for _event in dir(TrainerCallback):
    if _event.startswith("on_"):
        setattr(GuardedTracker, _event, _make_event(_event))


def guard_trackers(trainer, monitor: MonitorCallback) -> None:
    """Puts a guard around every tracker of a trainer."""
    kinds = tuple(get_reporting_integration_callbacks(trainer.args.report_to))
    callbacks = trainer.callback_handler.callbacks
    callbacks[:] = [GuardedTracker(one, monitor) if isinstance(one, kinds) else one for one in callbacks]
