"""The guard inside the Trainer: going back, rows left out, and the faults that it is tested with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence, Set

import torch

from forge_cli import faults
from forge_cli.backend.keeping import KeptTrainer, RollBack
from forge_cli.errors import DivergedError
from forge_cli.parts.labels import IGNORED
from forge_cli.parts.monitor import MonitorCallback

_FACTORS = {"nan": math.nan, "inf": math.inf, "spike": 1e6}


class ExcludingCollator:
    """Leaves rows out of training batches: of a row with labels nothing is learned, a pair's place takes another one.

    The batch keeps its shape, so that everything drawn by chance stays as it was. One that has no other row counts no
    tokens, and is not computed.

    Args:
        collate: Makes a batch with ``rows`` and ``real_tokens``.
        excluded: Numbers of the rows; read anew for every batch.
    """

    def __init__(self, collate: Callable[[Sequence[dict]], dict], excluded: Set[int]) -> None:
        self.collate = collate
        self.excluded = excluded

    def __call__(self, examples: Sequence[dict]) -> dict[str, object]:
        """Collates."""
        if not self.excluded or not self.excluded.intersection(_list_rows(examples)):
            return self.collate(examples)
        good = [one for one in examples if not self.excluded.issuperset(_list_rows([one]))]
        if "labels" in examples[0]:
            batch = self.collate([self._mask(one) for one in examples])
            batch["rows"] = [row for row in batch["rows"] if row not in self.excluded]
            return batch if good else {**batch, "real_tokens": 0}
        if not good:
            return {**self.collate(examples), "rows": [], "real_tokens": 0}
        return self.collate([one if one in good else good[place % len(good)] for place, one in enumerate(examples)])

    def _mask(self, example: dict) -> dict:
        labels, place = [], 0
        for row, length in zip(
            _list_rows([example]), example.get("seq_lengths") or [len(example["labels"])], strict=True
        ):
            part = example["labels"][place : place + length]
            labels += [IGNORED] * length if row in self.excluded else list(part)
            place += length
        return {**example, "labels": labels}


def _list_rows(examples: Sequence[dict]) -> list[int]:
    return [row for one in examples for row in one.get("rows", [one.get("row")])]


class GuardedTrainer(KeptTrainer):
    """The part of Forge's trainers that goes back when the monitor's guard says so."""

    monitor: MonitorCallback

    def get_train_dataloader(self):
        """Leaves out the rows that the guard excluded; those of an evaluation have numbers of their own."""
        collate = self.data_collator
        self.data_collator = ExcludingCollator(collate, self.monitor.guard.excluded)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Computes the loss; a fault on demand makes it bad before its backward pass."""
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training and (action := faults.reach("loss", self.state.global_step + 1)) in _FACTORS:
            return result * _FACTORS[action]
        return result

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """Runs one micro step; a fault on demand makes a gradient bad after the last one."""
        loss = super().training_step(*args, **kwargs)
        if not self.accelerator.sync_gradients:
            return loss
        if (action := faults.reach("gradient", self.state.global_step + 1)) in _FACTORS:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            for gradient in gradients if action == "spike" else gradients[-1:]:
                gradient.mul_(_FACTORS[action])
        return loss

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """Goes back if that was decided in this step, before anything of it is saved.

        Raises:
            RollBack: It was.
        """
        reason, self.monitor.rollback_reason = self.monitor.rollback_reason, ""
        if reason:
            raise RollBack(reason)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _run_epoch(self, *args, **kwargs) -> None:
        """Trains an epoch.

        Raises:
            DivergedError: The guard has no patience left; names the last good checkpoint.
        """
        try:
            super()._run_epoch(*args, **kwargs)
        except DivergedError as error:
            if self.keeper is None:
                raise
            self.keeper.finish()
            if self.keeper.latest is None:
                raise
            problem = error.problems[0]
            why = f"{problem.why}; the last good checkpoint is {self.keeper.latest.path}"
            raise DivergedError.from_problems([dataclasses.replace(problem, why=why)]) from error
