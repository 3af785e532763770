"""Exponential moving average of the trained weights.

The average is a float32 copy of the trainable parameters only, updated after each optimizer step that really
happened::

    n-th update, every k steps:   average = d_n * average + (1 - d_n) * weight
                                  d_n = min(decay, (1 + n) / (10 + n)) ** k     (warm-up on)
                                  d_n = decay ** k                              (warm-up off)

float32 is not a luxury: at decay 0.999 an update is below half a bfloat16 step, and a bfloat16 average never moves.
For LoRA it is the average of A and the average of B, whose product is not the average of the products.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from forge_cli.errors import ConfigError, ModelError

EMA_FILE = "ema.safetensors"
EMA_STATE_FILE = "ema.json"


class WeightAverage:
    """The averaged weights of one model.

    Args:
        model: The model; its parameters that require a gradient now are averaged, in their order.
        decay: Share of the old average kept per optimizer step (0 to 1).
        decay_warmup: Start with a low decay, so that the first weights do not weigh for long.
        update_every: Optimizer steps between updates.
        device: ``cpu`` keeps the average in host memory; ``None`` beside the weights.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.999,
        *,
        decay_warmup: bool = True,
        update_every: int = 1,
        device: str | None = None,
    ) -> None:
        self.decay = decay
        self.decay_warmup = decay_warmup
        self.update_every = update_every
        self.num_updates = 0
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ModelError("EMA has nothing to average: no parameter is trainable", fix="remove the ema section")
        self.averages = [p.detach().to(device or p.device, torch.float32, copy=True) for p in self.parameters]
        self._set_aside: list[torch.Tensor] | None = None

    @property
    def is_applied(self) -> bool:
        """Whether the model holds the averaged weights at the moment."""
        return self._set_aside is not None

    def current_decay(self) -> float:
        """Returns the decay of the next update."""
        n = self.num_updates + 1
        decay = min(self.decay, (1 + n) / (10 + n)) if self.decay_warmup else self.decay
        return decay**self.update_every

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the weights: ``average += (1 - d) * (weight - average)``."""
        if self.is_applied:
            raise ModelError("EMA was updated while its weights were swapped in", fix="call restore() first")
        weight = 1 - self.current_decay()
        for averages, parameters in _group_by_place(self.averages, self.parameters):
            # The transfer and the cast are one launch per tensor; the update itself is one launch in all.
            sources = [p.detach().to(a.device, torch.float32) for a, p in zip(averages, parameters, strict=True)]
            torch._foreach_lerp_(averages, sources, weight)
        self.num_updates += 1

    @torch.no_grad()
    def apply(self) -> None:
        """Puts the averaged weights into the model and keeps the raw ones aside."""
        if self.is_applied:
            return
        self._set_aside = [p.detach().clone() for p in self.parameters]
        torch._foreach_copy_([p.detach() for p in self.parameters], self.averages)

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the raw weights back, bit for bit."""
        if self._set_aside is not None:
            torch._foreach_copy_([p.detach() for p in self.parameters], self._set_aside)
            self._set_aside = None

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Holds the averaged weights in the model for a block; the raw ones come back on any exception."""
        self.apply()
        try:
            yield
        finally:
            self.restore()

    def state_dict(self) -> dict[str, object]:
        """Returns the average and its counters."""
        averages = dict(zip(self.names, self.averages, strict=True))
        return {**self._settings(), "num_updates": self.num_updates, "averages": averages}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Takes up an average.

        Raises:
            ModelError: It is of other parameters or has another decay.
        """
        saved: Mapping[str, torch.Tensor] = state["averages"]
        theirs = {key: state.get(key) for key in self._settings()}
        shapes = {name: a.shape for name, a in zip(self.names, self.averages, strict=True)}
        if theirs != self._settings() or {name: tensor.shape for name, tensor in saved.items()} != shapes:
            raise ModelError(
                "the saved average belongs to other settings or other parameters",
                why=f"saved with {theirs}, running with {self._settings()}",
                fix="resume with the settings of the checkpoint",
            )
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(saved[name])
        self.num_updates = state["num_updates"]

    def _settings(self) -> dict[str, object]:
        return {"decay": self.decay, "decay_warmup": self.decay_warmup, "update_every": self.update_every}

    def save(self, folder: Path) -> None:
        """Writes the average and its counters; no pickle."""
        state = self.state_dict()
        averages = state.pop("averages")
        save_file({name: a.cpu().contiguous() for name, a in averages.items()}, folder / EMA_FILE)
        (folder / EMA_STATE_FILE).write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        """Reads what ``save`` wrote.

        Raises:
            ModelError: The files are missing, or hold other parameters or another decay.
        """
        if not (folder / EMA_FILE).is_file() or not (folder / EMA_STATE_FILE).is_file():
            raise ModelError(
                f"the checkpoint has no {EMA_FILE}",
                where=str(folder),
                why="the average would start anew from the resumed weights",
                fix="resume from a checkpoint that was written with EMA on, or remove the ema section",
            )
        state = json.loads((folder / EMA_STATE_FILE).read_text())
        self.load_state_dict({**state, "averages": load_file(folder / EMA_FILE)})


class EMACallback(TrainerCallback):
    """Keeps a moving average of the trained weights during a ``transformers.Trainer`` run.

    Use ``apply_ema(model)`` after training to put the average in, ``restore_original(model)`` to take it out, and
    ``with callback.applied():`` around an evaluation. Checkpoints hold the average; a resumed run restores it.

    Args:
        decay: Share of the old average kept per optimizer step.
        decay_warmup: Start with a low decay.
        update_after_step: Optimizer steps before averaging starts; until then the average follows the weights.
        update_every: Optimizer steps between updates; the decay is raised to this power.
        device: ``cpu`` keeps the average in host memory; ``auto`` beside the weights.
        resume_from: Checkpoint that holds the average when a run is resumed from another folder than its own.
    """

    # Forge's trainer asks its guard.
    was_skipped: Callable[[], bool] = staticmethod(lambda: False)

    def __init__(
        self,
        decay: float = 0.999,
        *,
        decay_warmup: bool = True,
        update_after_step: int = 0,
        update_every: int = 1,
        device: str = "auto",
        resume_from: str | Path | None = None,
    ) -> None:
        if not 0 < decay < 1 or update_every < 1 or update_after_step < 0:
            raise ConfigError(
                f"EMACallback: decay {decay}, update_every {update_every}, update_after_step {update_after_step}",
                fix="decay lies between 0 and 1, update_every is at least 1, update_after_step at least 0",
            )
        self.resume_from = resume_from
        self._resumed_state: Mapping[str, object] | None = None
        self._loss_scale = 0.0
        self.decay = decay
        self.decay_warmup = decay_warmup
        self.update_after_step = update_after_step
        self.update_every = update_every
        self.device = None if device == "auto" else device
        self.average: WeightAverage | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Copies the trainable weights, or reads the average of the checkpoint that is resumed."""
        self.average = WeightAverage(
            model, self.decay, decay_warmup=self.decay_warmup, update_every=self.update_every, device=self.device
        )
        if self._resumed_state is not None:
            self.average.load_state_dict(self._resumed_state)
            self._resumed_state = None
        elif state.global_step > 0:
            own = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.average.load(Path(self.resume_from) if self.resume_from else own)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """Notes the loss scale of fp16 training; a fused optimizer says in no other way that it skipped its step."""
        scaler = getattr(optimizer, "scaler", None)
        self._loss_scale = scaler.get_scale() if scaler is not None else 0.0

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """Updates the average, unless the step was skipped (fp16 overflow, or by a guard)."""
        if self.was_skipped():
            return
        scaler = getattr(optimizer, "scaler", None)
        if getattr(optimizer, "step_was_skipped", False) or (scaler and scaler.get_scale() < self._loss_scale):
            return
        step = state.global_step + 1
        if step <= self.update_after_step:
            torch._foreach_copy_(self.average.averages, [p.detach() for p in self.average.parameters])
        elif (step - self.update_after_step) % self.update_every == 0:
            self.average.update()

    def state_dict(self) -> dict[str, object]:
        """Returns the average and its counters."""
        return self._average_of(None).state_dict()

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Keeps a state until training starts, which makes the average."""
        self._resumed_state = state

    def on_save(self, args, state, control, **kwargs):
        """Writes the average into the checkpoint that was just made."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            self.average.save(folder)

    def apply_ema(self, model: nn.Module) -> None:
        """Puts the averaged weights into the model."""
        self._average_of(model).apply()

    def restore_original(self, model: nn.Module) -> None:
        """Puts the raw weights back."""
        self._average_of(model).restore()

    def applied(self) -> contextlib.AbstractContextManager[None]:
        """Holds the averaged weights in the model for a block."""
        return self._average_of(None).applied()

    def _average_of(self, model: nn.Module | None) -> WeightAverage:
        if self.average is None:
            raise ModelError("EMA has no average yet", why="it is made when training starts", fix="train first")
        own = {id(p) for p in self.average.parameters}
        if model is not None and not own <= {id(p) for p in model.parameters()}:
            raise ModelError("this is not the model that EMA averaged", fix="pass the model that was trained")
        return self.average


def _group_by_place(
    averages: list[torch.Tensor], parameters: list[nn.Parameter]
) -> Iterator[tuple[list[torch.Tensor], list[nn.Parameter]]]:
    """Groups pairs by the device of the average: a foreach operation needs one device."""
    groups: dict[torch.device, tuple[list, list]] = {}
    for average, parameter in zip(averages, parameters, strict=True):
        group = groups.setdefault(average.device, ([], []))
        group[0].append(average)
        group[1].append(parameter)
    yield from groups.values()
