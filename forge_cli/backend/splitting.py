"""Going on when memory runs out: a step is made again in smaller parts, an evaluation with fewer rows at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from forge_cli import faults
from forge_cli.backend.batch_parts import KeepingCollator, Split, cut, join_figures, list_pieces
from forge_cli.backend.keeping import KeptTrainer, RollBack
from forge_cli.errors import MemoryExceeded
from forge_cli.parts.keeper import Stateful
from forge_cli.parts.memory import free_memory, is_out_of_memory
from forge_cli.parts.monitor import MonitorCallback

MOST_ROLLBACKS = 2


class SplittingTrainer(KeptTrainer):
    """The part of Forge's trainers that goes on when memory runs out.

    In the forward or backward pass, the step's gradients are thrown away and its micro batches made again in parts,
    whose losses and gradients add up to those of the whole; dropout draws other numbers then. In the optimizer, where
    weights may be half updated, the run goes back to its last checkpoint. In an evaluation, it begins again with half
    the rows at a time. In a save, it is made again without a copy.

    Several processes would have to cut alike: there, memory that runs out in a step ends the run.
    """

    monitor: MonitorCallback
    _begun: tuple[Sequence[dict], ...] = ()
    _figures_before: tuple[dict[str, int], int] = ({}, 0)
    _weight: float = 1.0
    _place: str = ""
    _num_rollbacks = 0

    def __init__(self, *args, **kwargs) -> None:
        self.split = Split()
        super().__init__(*args, **kwargs)

    def list_parts(self) -> dict[str, Stateful]:
        """Lists what goes into a checkpoint beside weights and optimizer."""
        return {**super().list_parts(), "split": self.split}

    def find_joining(self) -> str:
        """Says what in the loss joins the rows of a micro batch, so that parts would not add up; mostly nothing."""
        if getattr(self, "aux_loss_enabled", False):
            return "the balance of experts is measured over a whole micro batch"
        return ""

    # A step ---------------------------------------------------------------------------------------------------

    def get_train_dataloader(self):
        """Keeps the examples of every batch with it."""
        collate = self.data_collator
        self.data_collator = KeepingCollator(collate)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def get_batch_samples(self, *args, **kwargs):
        """Fetches the micro batches of a step."""
        self._begun = ()
        self._figures_before = (self._count_figures(), getattr(self, "_total_train_tokens", 0))
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        """Runs one micro step; if memory runs out, this one and those before it in the step, in parts.

        Raises:
            MemoryExceeded: There is nothing smaller to try.
        """
        kept = inputs.pop("examples", None)
        if kept is None:
            return super().training_step(model, inputs, num_items_in_batch)
        self._begun = (*self._begun, kept.examples)
        place = len(self._begun) - 1
        while True:
            try:
                for number in range(place, len(self._begun)):
                    self._place = f".{number + 1}"
                    examples, place = self._begun[number], number
                    loss = self._train_in_parts(model, inputs, examples, num_items_in_batch)
                return loss
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                text = str(error)
            # Outside of the block above: the error's frames hold the tensors that are to be freed.
            self._cut_smaller(self._begun[place], text)
            place = 0

    def train_on_nothing(self, model, inputs: dict, num_items=None) -> torch.Tensor:
        """Runs a micro step whose gradients are 0; returns its loss ``[]``."""
        inputs.pop("examples", None)
        self._weight = 0.0
        try:
            return super().training_step(model, inputs, num_items)
        finally:
            self._weight = 1.0

    def _train_in_parts(self, model, inputs: dict, examples: Sequence[dict], num_items) -> torch.Tensor:
        """Runs a micro step in as many parts as are needed; returns its loss ``[]``.

        With a number of trained tokens (sft), losses are shares of a sum already; else they are means over rows.
        """
        if self.split.num_parts == 1:
            return super().training_step(model, inputs, num_items)
        before, losses, shares = self._count_figures(), [], []
        try:
            for part in cut(examples, self.split.num_parts):
                shares.append(len(part) / len(examples))
                self._weight = 1.0 if num_items is not None else shares[-1]
                batch = self.data_collator(part)
                del batch["rows"], batch["real_tokens"]
                losses.append(super().training_step(model, batch, num_items))
        finally:
            self._weight = 1.0
        join_figures(self._list_figures(), before, shares)
        return torch.stack(losses).sum()

    def compute_loss(self, model, inputs, *args, **kwargs):
        """Computes the loss of a batch, or a part's share of it."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not model.training:
            return loss
        self._run_out_on_demand("forward")
        if self._reaches("backward"):
            _break_backward(model)
        return loss if self._weight == 1 else loss * self._weight

    def _cut_smaller(self, examples: Sequence[dict], text: str) -> None:
        """Forgets the step's gradients and doubles the number of parts.

        Raises:
            MemoryExceeded: The micro batch that failed cannot be cut any more.
        """
        step, split = self.state.global_step + 1, self.split
        self.model.zero_grad(set_to_none=True)
        free_memory()
        joining = self.find_joining()
        if self.args.world_size > 1:
            raise _refuse(f"memory ran out at step {step}", "several processes would have to cut it alike", text)
        if joining:
            raise self._refuse_joined(step, joining, text)
        if split.num_parts >= len(list_pieces(examples)):
            raise _refuse(f"memory ran out at step {step} with one row at a time", "", text)
        split.num_parts *= 2
        figures, self._total_train_tokens = self._figures_before
        for name, values in self._list_figures().items():
            del values[figures.get(name, 0) :]
        batch, parts = len(examples), cut(examples, split.num_parts)
        even = f"as {len(parts)} x {len(parts[0])}" if len(parts) * len(parts[0]) == batch else f"in {len(parts)} parts"
        what = f"micro batches of {batch} are trained {even}"
        message = f"memory ran out at step {step}: {what} from here; the step's rows and loss are unchanged"
        self.monitor.alarm(step, "memory", message)

    def _refuse_joined(self, step: int, joining: str, text: str) -> MemoryExceeded:
        size, count = self.args.per_device_train_batch_size, self.args.gradient_accumulation_steps
        smaller = f"per_device_train_batch_size={size // 2} --set training.gradient_accumulation_steps={count * 2}"
        return _refuse(
            f"memory ran out at step {step}",
            f"the micro batch is not cut: {joining}",
            text,
            fix=f"--set training.{smaller}" if size > 2 else "",
        )

    # TRL's figures --------------------------------------------------------------------------------------------

    def _list_figures(self, mode: str = "train") -> dict[str, list[float]]:
        """Returns what TRL noted of batches since the last log line."""
        noted = self._stored_metrics if hasattr(self, "_stored_metrics") else self._metrics
        return noted[mode]

    def _count_figures(self) -> dict[str, int]:
        return {name: len(values) for name, values in self._list_figures().items()}

    # The update -----------------------------------------------------------------------------------------------

    def create_optimizer(self, *args, **kwargs):
        """Builds the optimizer; a fault on demand strikes when the weights are updated and the step is not counted."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new:
            optimizer.register_step_post_hook(lambda *_: self._run_out_on_demand("optimizer"))
        return optimizer

    def _run_epoch(self, *args, **kwargs) -> None:
        """Trains an epoch. Memory that runs out beside forward, backward, evaluation and save did so in the update.

        Raises:
            RollBack: It did.
            MemoryExceeded: It did for the third time, or there is no checkpoint yet.
        """
        try:
            return super()._run_epoch(*args, **kwargs)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            text = str(error)
        self.model.zero_grad(set_to_none=True)
        free_memory()
        what = f"memory ran out in the update of step {self.state.global_step + 1}"
        self._num_rollbacks += 1
        if self.keeper is None or self._num_rollbacks > MOST_ROLLBACKS:
            raise _refuse(what, "weights may be half updated", text)
        self.keeper.finish()
        if self.keeper.store.find_newest()[0] is None:
            raise _refuse(what, "there is no checkpoint to go back to", text)
        self.monitor.alarm(self.state.global_step, "memory", what)
        raise RollBack(what)

    # Evaluations and saves ------------------------------------------------------------------------------------

    def prediction_step(self, *args, **kwargs):
        """Evaluates a batch."""
        self._run_out_on_demand("evaluation", self.state.global_step)
        return super().prediction_step(*args, **kwargs)

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Evaluates; if memory runs out, again from the start with half the rows at a time.

        Raises:
            MemoryExceeded: It does with one.
        """
        while True:
            try:
                return super().evaluate(*args, **kwargs)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                text = str(error)
            free_memory()
            step, size = self.state.global_step, self.args.per_device_eval_batch_size
            if size == 1 or self.args.world_size > 1:
                raise _refuse(f"memory ran out in the evaluation at step {step}, {size} rows at a time", "", text)
            self._list_figures("eval").clear()
            self._eval_dataloaders = {}
            self.args.per_device_eval_batch_size = size // 2
            joining = self.find_joining()
            effect = f"losses may differ a little, as {joining}" if joining else "the held-out loss is the same"
            message = f"memory ran out in the evaluation at step {step}: {size // 2} rows at a time from here; {effect}"
            self.monitor.alarm(step, "memory", message)

    def _save_checkpoint(self, *args, **kwargs) -> None:
        """Saves; if memory runs out, again and from then on without a copy of everything.

        Raises:
            MemoryExceeded: It does once more.
        """
        for is_last in (False, True):
            try:
                self._run_out_on_demand("save", self.state.global_step)
                return super()._save_checkpoint(*args, **kwargs)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                text = str(error)
            free_memory()
            step = self.state.global_step
            if is_last or self.args.world_size > 1:
                raise _refuse(f"memory ran out in the save of step {step}", "earlier checkpoints are untouched", text)
            if self.keeper is not None:
                self.keeper.in_background = False
            message = f"memory ran out in the save of step {step}: training waits for saves from here"
            self.monitor.alarm(step, "memory", message)

    # Faults on demand -----------------------------------------------------------------------------------------

    def _reaches(self, place: str, step: int | None = None) -> bool:
        """Whether memory is to run out here, or in this micro step (``forward.2``)."""
        step = self.state.global_step + 1 if step is None else step
        return "oom" in (faults.reach(place, step) or faults.reach(f"{place}{self._place}", step))

    def _run_out_on_demand(self, place: str, step: int | None = None) -> None:
        if self._reaches(place, step):
            raise torch.OutOfMemoryError("out of memory on demand")


def _break_backward(model: torch.nn.Module) -> None:
    """Makes the backward pass run out of memory when only the first trained tensor has no gradient yet."""

    def run_out(gradient: torch.Tensor) -> None:
        handle.remove()
        raise torch.OutOfMemoryError("out of memory on demand")

    handle = next(p for p in model.parameters() if p.requires_grad).register_hook(run_out)


def _refuse(what: str, why: str, text: str, fix: str = "") -> MemoryExceeded:
    # Without a fix, who knows the plan says one.
    return MemoryExceeded(what, why="; ".join(filter(None, (why, text.split("\n")[0][:200]))), fix=fix)
