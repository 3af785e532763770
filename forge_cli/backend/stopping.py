"""Ending a training early: after a step that every process agrees on, and with that step saved."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed

from forge_cli import faults
from forge_cli.backend.keeping import KeptTrainer
from forge_cli.errors import CheckpointError, Stopped
from forge_cli.parts.stop_request import StopRequest, name_signal


class EvaluationAbandoned(Exception):
    """Ends an evaluation, as the training is to end."""


class StoppableTrainer(KeptTrainer):
    """The part of Forge's trainers that looks for requests to stop after every step.

    Set ``stop`` before training; ``on_progress`` receives ``step``, ``batch``, ``save`` and ``saved``.
    """

    stop: StopRequest | None = None
    on_progress: Callable[[str], None] = staticmethod(lambda event: None)

    def train(self, *args, **kwargs):
        """Trains; a request that comes after the last look is honoured when training is over.

        Raises:
            Stopped: A signal asked for it.
        """
        if self.stop is None:
            return super().train(*args, **kwargs)
        with self.stop.deferred():
            output = super().train(*args, **kwargs)
            number, _ = self._agree()
            if number:
                self._end(number)
        return output

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """Logs, evaluates and saves what is due; saves and stops if that is wanted."""
        self.on_progress("step")
        number, wants_save = self._agree()
        if wants_save:
            self.control.should_save = True
        if number:
            self.control.should_evaluate = False
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except EvaluationAbandoned:
            number, _ = self._agree()
        if number:
            self._end(number)

    def prediction_step(self, *args, **kwargs):
        """Evaluates a batch, unless the training is to end.

        Raises:
            EvaluationAbandoned: It is. Several processes evaluate to the end, as each waits for the others.
        """
        self.on_progress("batch")
        faults.reach("evaluation", self.state.global_step)
        stop = self.stop
        if stop is not None and stop.is_deferred and stop.signal_number and self.args.world_size == 1:
            raise EvaluationAbandoned
        return super().prediction_step(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs) -> None:
        self.on_progress("save")
        super()._save_checkpoint(*args, **kwargs)
        self.on_progress("saved")

    def _agree(self) -> tuple[int, bool]:
        """Returns the signal that stops the training (or 0) and whether to save, the same in all processes."""
        if self.stop is None:
            return 0, False
        number, wants_save = self.stop.signal_number, self.stop.wants_save
        if self.args.world_size > 1 and torch.distributed.is_initialized():
            asked = torch.tensor([number, int(wants_save)], device=self.args.device)
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
            number, wants_save = (int(value) for value in asked.tolist())
        if wants_save:
            self.stop.wants_save = False
        return number, bool(wants_save)

    def _end(self, number: int) -> None:
        """Saves the present step and ends the training.

        Raises:
            Stopped: Always, if the step could be saved or nothing is to be saved.
            CheckpointError: It could not.
        """
        step = self.state.global_step
        name = name_signal(number)
        if self.keeper is None:
            raise Stopped(
                number,
                f"stopped by {name} at step {step}; nothing was saved",
                why="checkpoint: null",
                fix="start it again with --overwrite, and remove checkpoint: null",
            )
        folder = self.keeper.store.root.parent
        self.keeper.finish()
        self._save_checkpoint(self.model)
        self.keeper.finish()
        if not self.is_saved(step):
            raise CheckpointError(
                f"stopped by {name} at step {step}, which could not be saved",
                where=str(folder),
                why="earlier checkpoints are untouched",
                fix=f"make room, then: forge resume {folder}",
            )
        raise Stopped(
            number,
            f"stopped by {name} at step {step}, which is saved",
            where=str(folder),
            fix=f"go on with: forge resume {folder}",
        )
