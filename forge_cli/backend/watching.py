"""What every trainer of Forge does beside TRL's: shows the monitor micro steps, evaluates exactly, keeps weights."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback

from forge_cli.backend.guarding import GuardedTrainer
from forge_cli.backend.splitting import SplittingTrainer
from forge_cli.backend.stopping import StoppableTrainer
from forge_cli.backend.trackers import guard_trackers
from forge_cli.errors import MachineError
from forge_cli.parts.ema import EMACallback
from forge_cli.parts.keeper import Stateful
from forge_cli.parts.monitor import MonitorCallback
from forge_cli.parts.ranks import add_up, count_ranks
from forge_cli.parts.state import kept_random_state

EMA_PREFIX = "eval_ema"
# Means of a batch: (value [], how much it is a mean of []).
WeightedMeans = list[tuple[torch.Tensor, torch.Tensor]]


class RowCollator:
    """Wraps TRL's collator: keeps the numbers of the data rows and the count of real tokens with each batch.

    Args:
        collator: TRL's collator.
        reshape: Brings Forge's columns into the form that this collator takes; ``None`` when they are in it.
    """

    def __init__(self, collator, reshape: Callable[[list[dict]], list[dict]] | None = None) -> None:
        self.collator = collator
        self.reshape = reshape

    def __call__(self, examples: Sequence[dict]) -> dict[str, object]:
        """Collates; a row carries its number as ``row``, a packed sequence those of its tokens as ``rows``."""
        bare = [{k: v for k, v in one.items() if k not in ("row", "rows", "length")} for one in examples]
        batch = self.collator(self.reshape(bare) if self.reshape else bare)
        batch["rows"] = sorted({number for one in examples for number in one.get("rows", [one.get("row")])} - {None})
        batch["real_tokens"] = sum(map(_count_tokens, bare))
        return batch


def _count_tokens(example: dict) -> int:
    if "input_ids" in example:
        return len(example["input_ids"])
    answers = [example[name] for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in example]
    return sum(len(example["prompt_ids"]) + len(answer) for answer in answers)


class WatchedTrainer(SplittingTrainer, GuardedTrainer, StoppableTrainer):
    """The part of Forge's trainers that stands before one of TRL's in the order of calls.

    A subclass and not a callback, because no event carries a micro step's loss or the gradients before clipping, and
    none brackets an evaluation.
    """

    shards_evaluation = False

    def __init__(self, *args, monitor: MonitorCallback, ema: EMACallback | None = None, **kwargs) -> None:
        for name in ("_clip_grad_norm", "_get_grad_norm"):
            if not hasattr(Trainer, name):
                raise MachineError(
                    f"the installed transformers has no Trainer.{name}",
                    why="gradient norms would be measured after clipping",
                    fix='pip install "transformers>=5.19,<6"',
                )
        self.check_methods()
        super().__init__(*args, **kwargs)
        self.monitor = monitor
        self.ema = ema
        if ema is not None:
            ema.was_skipped = lambda: monitor.is_skipped
        self.latest_evaluation: tuple[int, dict[str, float]] = (-1, {})
        self.data_collator = RowCollator(self.data_collator, getattr(self, "reshape_rows", None))
        self._eval_means: list[WeightedMeans] = []
        self._num_eval_batches = sys.maxsize
        self._shown_loss = torch.zeros((), device=self.args.device)

    def training_step(self, model, inputs, *args, **kwargs) -> torch.Tensor:
        """Runs one micro step and hands its loss ``[]``, rows and token count to the monitor."""
        rows, real_tokens = inputs.pop("rows"), inputs.pop("real_tokens")
        if real_tokens:
            loss = super().training_step(model, inputs, *args, **kwargs)
        elif self.args.world_size > 1:  # the other processes wait for this one's gradients
            loss = self.train_on_nothing(model, inputs, *args, **kwargs)
        else:  # the guard has left out all its rows
            loss = torch.zeros((), device=self.args.device)
        self.monitor.record_micro_step(loss, rows, real_tokens)
        # The Trainer adds losses up for its log, where one NaN would stay; the monitor has it, and this is its place.
        self._shown_loss = torch.where(torch.isfinite(loss), loss, self._shown_loss)
        return self._shown_loss

    def _clip_grad_norm(self, model) -> torch.Tensor:
        """Clips with the norms that the monitor needs anyway, measured before the clipping."""
        self.accelerator.unscale_gradients()
        total = self.monitor.measure_step()
        parameters = [p for p in model.parameters() if p.grad is not None]
        torch.nn.utils.clip_grads_with_norm_(parameters, self.args.max_grad_norm, total)
        return total

    def _get_grad_norm(self, model, grad_norm=None) -> torch.Tensor:
        """Leaves the norm on the device; measures it here when nothing is clipped."""
        if grad_norm is None:
            self.accelerator.unscale_gradients()
            return self.monitor.measure_step()
        return grad_norm

    def weigh_loss(self, loss: torch.Tensor, inputs: dict) -> WeightedMeans:
        """Says what a batch's loss ``[]`` is a mean of; several means add up to the loss."""
        raise NotImplementedError

    def prediction_step(self, model, inputs, *args, **kwargs):
        """Evaluates one batch and notes what its loss is a mean of; stays on the device."""
        inputs.pop("rows"), inputs.pop("real_tokens")
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        means = self.weigh_loss(loss.detach(), inputs)
        if len(self._eval_means) >= self._num_eval_batches:  # takes part only because the others have one more
            means = [(value, weight * 0) for value, weight in means]
        self._eval_means.append(means)
        # The loop would gather the losses of batches that are of different sizes; it has no use for them.
        return (loss if self.args.world_size == 1 else None), logits, labels

    def get_eval_dataloader(self, eval_dataset=None):
        """Gives each of several processes every n-th batch, or all of them where TRL gathers figures of each row."""
        if self.args.world_size == 1:
            return super().get_eval_dataloader(eval_dataset)
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        size, count = self.args.per_device_eval_batch_size, self.args.world_size
        batches = [list(range(len(dataset))[start : start + size]) for start in range(0, len(dataset), size)]
        own = batches[self.args.process_index :: count] if self.shards_evaluation else batches
        self._num_eval_batches = len(own)
        if self.shards_evaluation and len(own) < -(-len(batches) // count):
            own = [*own, batches[0]]
        loader = DataLoader(dataset, batch_sampler=own, collate_fn=self.data_collator)
        return prepare_data_loader(loader, self.args.device, num_processes=1, process_index=0, put_on_device=True)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """Evaluates; the loss is the mean over tokens or rows, not the mean of the batches' means."""
        self._eval_means = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics[f"{metric_key_prefix}_loss"] = self._mean_of_batches()
        return output

    def _mean_of_batches(self) -> float:
        stacked = torch.stack(
            [torch.stack([torch.stack([v.double(), w.double()]) for v, w in batch]) for batch in self._eval_means]
        )
        values, weights = stacked.unbind(dim=-1)
        sums = torch.cat([(values * weights).sum(dim=0), weights.sum(dim=0)])
        if self.shards_evaluation and count_ranks() > 1:
            sums = torch.tensor(add_up(sums.tolist()), dtype=torch.float64)
        totals, counts = sums.chunk(2)
        return (totals / counts).sum().item()

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Evaluates the raw weights, then the averaged ones under ``eval_ema``; the raw ones come back always.

        Random numbers go on as if there had been no evaluation, so that a run can be resumed without repeating it.
        """
        average = self.ema.average if self.ema else None
        with kept_random_state():
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            if average is not None and not average.is_applied and metric_key_prefix == "eval":
                with average.applied():
                    metrics |= super().evaluate(eval_dataset, ignore_keys, EMA_PREFIX)
        self.monitor.record_evaluation(self.state.global_step, metrics)
        self.latest_evaluation = (self.state.global_step, metrics)
        return metrics

    def list_parts(self) -> dict[str, Stateful]:
        """Lists what goes into a checkpoint beside weights and optimizer."""
        return {**super().list_parts(), "monitor": self.monitor, **({"ema": self.ema} if self.ema else {})}

    def latest_eval_loss(self) -> float | None:
        """Returns the held-out loss of the present step's weights, if it is known."""
        step, metrics = self.latest_evaluation
        return metrics.get("eval_loss") if step == self.state.global_step else None

    def evaluate_now(self) -> dict[str, float]:
        """Evaluates the present weights, unless that was the last thing done; nothing without evaluation rows."""
        if self.eval_dataset is None:
            return {}
        step, metrics = self.latest_evaluation
        return metrics if step == self.state.global_step else self.evaluate()


@contextlib.contextmanager
def kept_weights(model: torch.nn.Module) -> Iterator[None]:
    """Keeps what is trained, and in which format, over what TRL and PEFT do meanwhile.

    TRL casts the adapters of a quantised model to bfloat16, whose updates are lost below 1/256 of a weight and which
    fp16 scaling refuses. PEFT makes all of an adapter trainable when adapters are added or switched, frozen layers
    included.
    """
    kept = {id(p): p.data for p in model.parameters() if p.requires_grad}
    yield
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in kept)
        if id(parameter) in kept:
            parameter.data = kept[id(parameter)]


def construct_trainer(
    kind: type[WatchedTrainer],
    *,
    model,
    monitor: MonitorCallback,
    ema: EMACallback | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **parts,
) -> WatchedTrainer:
    """Builds a trainer around a finished model and finished rows; what is trained stays as it was."""
    with kept_weights(model):
        trainer = kind(
            model=model,
            # EMA first: what it writes into a checkpoint is not the next step's time.
            callbacks=[*([ema] if ema else []), monitor, *callbacks],
            monitor=monitor,
            ema=ema,
            **parts,
        )
    trainer.remove_callback(PrinterCallback)
    guard_trackers(trainer, monitor)
    return trainer
