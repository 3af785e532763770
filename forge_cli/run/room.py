"""Room on the disk: what a run is going to write, known before it trains."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path

from torch import nn

from forge_cli.checkpoints.disk import count_free_bytes, describe_shortage
from forge_cli.checkpoints.store import CheckpointStore
from forge_cli.errors import MachineError
from forge_cli.estimate.weights import weigh_optimizer
from forge_cli.parts.state import count_bytes, list_trained
from forge_cli.resolve.plan import Plan
from forge_cli.units import MIB, format_bytes

# Tokenizer, logs, metrics, report: what grows with no weight.
MARGIN_BYTES = 32 * MIB
# States of random numbers, the Trainer's and the monitor's.
_STATE_BYTES = 26_000
# A tensor's entries in a header and in the tree of names, beside its name, which stands in both.
_ENTRY_BYTES = 110


def predict_checkpoint(model: nn.Module, optim: str, *, has_ema: bool) -> int:
    """Returns the bytes of one checkpoint: trained weights, their averages, the optimizer's states, small files.

    Args:
        model: With the weights that are trained.
        optim: A value of ``training.optim``.
        has_ema: Averages of the weights are kept.
    """
    trained = list_trained(model)
    weights = count_bytes(trained.values())
    names = sum(2 * len(name) + _ENTRY_BYTES for name in trained)
    if optim == "adafactor":
        states, num_states = sum(_weigh_factors(tuple(p.shape)) for p in trained.values()), 3 * len(trained)
    else:
        wide = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        sizes = Counter(p.numel() for p in trained.values())
        embeddings = Counter(p.numel() for p in trained.values() if id(p) in wide)
        width = max((p.element_size() for p in trained.values()), default=4)
        # On the disk a paged state takes as much as another.
        states = weigh_optimizer(sizes, optim.removeprefix("paged_"), width, 1, embeddings)
        num_states = len(trained) * (0 if optim == "sgd" else 3)
    return weights * (2 if has_ema else 1) + states + names * (2 if has_ema else 1) + num_states * 150 + _STATE_BYTES


def _weigh_factors(shape: tuple[int, ...]) -> int:
    """Returns the bytes of Adafactor's states: sums of rows and columns of what has both. Source: transformers 5.23."""
    if len(shape) < 2:
        return 4 * prod(shape)
    return 4 * (prod(shape[:-1]) + prod(shape[:-2]) * shape[-1])


def count_checkpoints(plan: Plan, num_steps: int) -> int:
    """Returns how many checkpoints lie on the disk at once at most.

    The newest, the one that is being written, and with an evaluation the best and the last that was measured; never
    more than the run makes.
    """
    if plan.spec.checkpoint is None:
        return 0
    has_eval = bool(plan.spec.data.eval or plan.spec.data.eval_fraction)
    every = plan.spec.checkpoint.save_steps
    most = num_steps if every == "epoch" else -(-num_steps // every)
    return min(plan.spec.checkpoint.save_total_limit + (3 if has_eval else 1), most + 1)


def check_room(plan: Plan, root: Path, run_id: str, model: nn.Module, num_steps: int) -> None:
    """Refuses a run whose checkpoints and weights will not fit on the disk.

    Raises:
        MachineError: They will not.
    """
    has_ema = plan.spec.ema is not None
    checkpoint = predict_checkpoint(model, plan.spec.training.optim, has_ema=has_ema)
    count = count_checkpoints(plan, num_steps)
    weights = list_trained(model).values() if hasattr(model, "peft_config") else model.parameters()
    exported = count_bytes(weights) * (2 if has_ema else 1)
    # A resumed run has some of them already.
    present = len(CheckpointStore(root / "checkpoints", run_id).list_sound())
    needed = max(0, count - present) * checkpoint + exported + MARGIN_BYTES
    if count_free_bytes(root) < needed:
        raise MachineError(
            describe_shortage(needed, root, "the disk has too little room for this run"),
            where=str(root),
            why=f"{count} checkpoints of {format_bytes(checkpoint)} and {format_bytes(exported)} of weights",
            fix="make room, lower checkpoint.save_total_limit, or set output_dir to another disk",
        )
