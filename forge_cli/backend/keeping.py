"""Saving and resuming: the Trainer decides when, Forge's own checkpoints hold what."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler

from forge_cli import faults
from forge_cli.errors import CheckpointError, MachineError, ModelError
from forge_cli.parts.keeper import Keeper, Stateful, load_text, load_tree
from forge_cli.parts.ranks import count_ranks, gather, is_main, share
from forge_cli.parts.state import flatten, list_trained, load_trained, read_random_state, write_random_state

# Overridden below; without them a run would be saved the Trainer's way, without a word.
OVERRIDDEN = (
    "_save_checkpoint",
    "_load_from_checkpoint",
    "_load_optimizer_and_scheduler",
    "_load_scaler",
    "_load_rng_state",
    "_get_train_sampler",
    "_run_epoch",
    "get_batch_samples",
    "_maybe_log_save_evaluate",
)
PROBE_TOKENS = 32


class RollBack(Exception):
    """Asks for the newest checkpoint: what happened since is not to count. Raised inside training only.

    Args:
        reason: What happened, for the user.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class SeededGroupsSampler(LengthGroupedSampler):
    """Groups rows by length in an order that only seed and epoch decide; the library draws it from torch's state."""

    def __init__(self, *args, seed: int, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch."""
        self.epoch = epoch

    def __iter__(self):
        """Yields the rows of an epoch."""
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


class KeptTrainer(Trainer):
    """The part of Forge's trainers that saves and resumes.

    Set ``keeper`` before training; without one nothing is saved.
    """

    keeper: Keeper | None = None
    probe: float | None = None

    def train(self, *args, **kwargs):
        """Trains; notes first how the model answers before anything of it is trained or loaded."""
        if self.keeper is not None and self.probe is None:
            self.probe = self.measure_probe()
        if self.args.world_size > 1 and self.model_wrapped is self.model:
            # An evaluation before the training has left marks, for which accelerate would not join the gradients.
            self.accelerator._models.clear()
            self.model._is_accelerate_prepared = False
        return super().train(*args, **kwargs)

    def check_equal_weights(self) -> None:
        """Makes sure that all processes hold the same weights, which only joined gradients give them.

        Raises:
            ModelError: They do not.
        """
        if count_ranks() == 1:
            return
        own = torch.stack([p.detach().double().sum() for p in list_trained(self.model).values()]).tolist()
        sums = gather(own)
        if different := [rank for rank, theirs in enumerate(sums) if theirs != sums[0]]:
            raise ModelError(
                f"after step {self.state.global_step} process {different[0]} holds other weights than process 0",
                why="the processes would each train a model of their own, and all but one be lost",
                fix="use the library versions that Forge was tested with, and one kind of GPU",
            )

    def check_methods(self) -> None:
        """Makes sure that the Trainer still calls what is overridden here.

        Raises:
            MachineError: It has no method of that name.
        """
        missing = [name for name in OVERRIDDEN if not hasattr(Trainer, name)]
        if missing:
            raise MachineError(
                f"the installed transformers has no Trainer.{missing[0]}",
                why="checkpoints would not be Forge's",
                fix='pip install "transformers>=5.19,<6"',
            )

    def list_parts(self) -> dict[str, Stateful]:
        """Lists what has a state of its own beside weights and optimizer."""
        return {}

    def _get_train_sampler(self, train_dataset=None):
        """Keeps the order of rows a function of seed and epoch."""
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            return SeededGroupsSampler(sampler.batch_size, lengths=sampler.lengths, seed=self.args.data_seed)
        return sampler

    def _run_epoch(self, *args, **kwargs) -> None:
        """Trains an epoch; nothing where a resumed run has all its steps behind it."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """Logs, evaluates and saves what is due; the first step is always saved, to find out that it can be."""
        step = self.state.global_step
        faults.reach("step", step)
        if self.keeper is not None and step == 1:
            self.control.should_save = True
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # Saving ---------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial=None) -> None:
        """Saves the present step, unless that was just done."""
        step = self.state.global_step
        keeper = self.keeper
        if keeper is None or self.is_saved(step):
            return
        self.check_equal_weights()
        self.store_flos()
        trees = {
            "weights": {name: p.detach() for name, p in list_trained(self.model).items()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "probe": self.probe,
            **{name: part.state_dict() for name, part in self.list_parts().items()},
        }
        texts = {f"rng-{rank}.json": state for rank, state in enumerate(gather(read_random_state()))}
        if is_main():
            keeper.save(
                step, trees, {TRAINER_STATE_NAME: self.describe_state(), **texts}, eval_loss=self.latest_eval_loss()
            )

    def is_saved(self, step: int) -> bool:
        """Tells whether a step's checkpoint is on the disk, the same in all processes."""
        return bool(share(self.keeper is not None and self.keeper.has_saved(step)))

    def describe_state(self) -> dict[str, object]:
        """Returns the Trainer's own state as plain data."""
        return json.loads(json.dumps(dataclasses.asdict(self.state), default=float))

    def latest_eval_loss(self) -> float | None:
        """Returns the held-out loss of the present step's weights, if it is known."""
        return None

    @torch.no_grad()
    def measure_probe(self) -> float:
        """Returns a number that the model's whole forward pass decides: the size of its logits on fixed tokens."""
        model, was_training = self.model, self.model.training
        vocabulary = model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(PROBE_TOKENS, device=self.args.device).mul(max(1, vocabulary // PROBE_TOKENS)) % vocabulary
        model.eval()
        try:
            with self.compute_loss_context_manager():
                logits = model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]), use_cache=False).logits
        finally:
            model.train(was_training)
        return logits.double().square().mean().sqrt().item()

    # Resuming -------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Puts the weights in.

        Raises:
            CheckpointError: They are those of another model or another adapter.
        """
        folder = Path(resume_from_checkpoint)
        if wrong := load_trained(self.model, load_tree(folder, "weights")):
            raise CheckpointError(
                f"{len(wrong)} trained tensors are not those of the checkpoint: {'; '.join(wrong[:3])}",
                where=str(folder),
                why="model, adapters or frozen layers have changed",
                fix="resume with the settings of the run, or start a new one",
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Puts the optimizer, the schedule and what averages and watches back to where they were."""
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        saved = load_tree(folder, "optimizer")
        sizes = [
            [len(group["params"]) for group in one["param_groups"]] for one in (saved, self.optimizer.state_dict())
        ]
        if sizes[0] != sizes[1]:
            raise self._refuse(folder, "optimizer", f"it had groups of {sizes[0]} parameters and has {sizes[1]}")
        wanted = flatten(saved)[0]
        self.optimizer.load_state_dict(saved)
        if flatten(self.optimizer.state_dict())[0] != wanted:
            raise self._refuse(folder, "optimizer", "it did not take up its state")
        self.lr_scheduler.load_state_dict(load_tree(folder, "scheduler"))
        for name, part in self.list_parts().items():
            part.load_state_dict(load_tree(folder, name))
        self._check_probe(folder)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(load_tree(Path(checkpoint), "scaler"))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # A run that had fewer processes knows no numbers for this one; that was allowed by name.
        name = f"rng-{self.args.process_index}.json"
        if checkpoint is not None and (Path(checkpoint) / name).is_file():
            write_random_state(load_text(Path(checkpoint), name))

    def _check_probe(self, folder: Path) -> None:
        """Compares the untrained model's answer to fixed tokens with the one it gave when the run began.

        What is trained is verified byte by byte; this finds another base model, format or attention.

        Raises:
            CheckpointError: They differ by more than rounding.
        """
        was, now = load_tree(folder, "probe"), self.probe
        if abs(now - was) > 1e-3 * abs(was):
            raise self._refuse(folder, "model", f"fixed tokens give logits of size {now:.6g} instead of {was:.6g}")
        if now != was and self.keeper is not None:
            self.keeper.say("note: this machine or its libraries round differently; the run goes on, not bit for bit")

    @staticmethod
    def _refuse(folder: Path, part: str, what: str) -> CheckpointError:
        return CheckpointError(
            f"the {part} is not the one of the checkpoint: {what}",
            where=str(folder),
            why="the run would go on as another one",
            fix="resume with the model, the settings and the library versions of the run",
        )
