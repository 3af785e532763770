"""The memory of a training step at each of its instants, and the highest of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from forge_cli.estimate.setting import Setting
from forge_cli.estimate.step import replay_evaluation, replay_step
from forge_cli.estimate.weights import step_transient_bytes, weigh_optimizer, weigh_tensors

# cuBLAS keeps a workspace per thread that multiplies: the forward pass's and the backward pass's.
CUBLAS_BYTES = 2 * 8_519_680
INSTANTS = {
    "load": "weights are loaded",
    "forward": "forward pass",
    "loss": "output layer and loss",
    "reference": "forward pass of the reference",
    "backward loss": "backward pass of the loss",
    "backward layer": "backward pass of a layer",
    "end of backward": "end of the backward pass",
    "optimizer step": "optimizer step",
    "evaluation": "evaluation",
    "save": "averaged weights are swapped in",
}


class Instant(NamedTuple):
    """One instant of a step.

    Attributes:
        name: A key of ``INSTANTS``.
        parts: Bytes by part, largest first.
    """

    name: str
    parts: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())


class MemoryEstimate(NamedTuple):
    """What a step needs, as torch counts allocated bytes.

    Attributes:
        instants: In the order in which they happen.
        setting: What was estimated.
    """

    instants: tuple[Instant, ...]
    setting: Setting

    @property
    def peak(self) -> Instant:
        """The highest instant."""
        return max(self.instants, key=lambda one: one.total_bytes)

    @property
    def total_bytes(self) -> int:
        """Bytes at the highest instant."""
        return self.peak.total_bytes

    @property
    def activations_bytes(self) -> int:
        """Most that is kept between forward and backward pass."""
        return max(one.parts.get("activations", 0) for one in self.instants)


def estimate_memory(setting: Setting) -> MemoryEstimate:
    """Estimates every instant of a training step with optimizer states (the second step or a later one).

    Units: bytes. Source: the sum of what is held (``forge_cli.estimate.weights``) and of what the replay finds
    (``forge_cli.estimate.step``).
    """
    granule = 512 if setting.cuda else 1
    held = {"weights": setting.weights_bytes}
    adapters = weigh_tensors(setting.trained, setting.trained_bytes, granule) if setting.adapters else 0
    gradients = weigh_tensors(setting.trained, setting.trained_bytes, granule)
    # The average covers what asks for a gradient, whether it gets one or not.
    average = weigh_tensors(setting.trained, 4, granule) + 4 * setting.num_idle_parameters
    held["adapters"] = adapters
    held["reference"] = setting.reference_bytes
    held["EMA"] = average if setting.ema == "device" else 0
    instants = [Instant("load", _tidy({**held, "EMA": 0, "reference": 0, "loading": setting.loading_bytes}))]
    # On the CPU bitsandbytes pages nothing.
    optim = setting.optim if setting.cuda else setting.optim.removeprefix("paged_")
    held["optimizer"] = weigh_optimizer(
        setting.trained, optim, setting.trained_bytes, granule, setting.trained_embeddings
    )
    held["workspace"] = CUBLAS_BYTES if setting.cuda else 0
    for name, (_, parts) in replay_step(setting).items():
        if name in INSTANTS:
            instants.append(_join(name, held, parts))
    step = {
        "gradients": gradients,
        "optimizer": step_transient_bytes(setting.trained, setting.optim, setting.trained_bytes, cuda=setting.cuda),
    }
    if setting.ema == "device" and setting.trained_bytes < 4:
        step["EMA"] = average
    instants.append(_join("optimizer step", held, step))
    aside = weigh_tensors(setting.trained, setting.trained_bytes, granule)
    aside += setting.trained_bytes * setting.num_idle_parameters
    swapped = {"EMA": aside} if setting.ema else {}
    if setting.eval_batch_size:
        found = replay_evaluation(setting)
        instants.append(_join("evaluation", held, {**found, "EMA": swapped.get("EMA", 0)}))
    if swapped:
        instants.append(_join("save", held, swapped))
    return MemoryEstimate(tuple(instants), setting)


def _join(name: str, held: Mapping[str, int], parts: Mapping[str, int]) -> Instant:
    return Instant(name, _tidy({key: held.get(key, 0) + parts.get(key, 0) for key in {**held, **parts}}))


def _tidy(parts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(((k, v) for k, v in parts.items() if v > 0), key=lambda one: -one[1]))
