"""Judges every step before its update: which one is skipped, when a run goes back, and when it ends."""

from __future__ import annotations

import enum
import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence

import torch
from torch import distributed

from forge_cli.parts.ranks import count_ranks, gather

MOST_SKIPS = 3
MOST_ROLLBACKS = 2
CLEAN_STEPS = 100  # so many accepted steps in a row, and earlier skips are forgiven
MOST_OVERFLOWS = 20
SPIKE_FLOOR = 0.1  # nats: what has been learned to the letter jumps by factors without meaning anything
NORM_RATIO = 1000.0  # a gradient norm beyond this many times its median is a spike


class Verdict(enum.IntEnum):
    """What happens to a step, the more severe the higher."""

    ACCEPT = 0
    OVERFLOW = 1  # the gradient scaler skips it by itself
    SKIP = 2
    ROLL_BACK = 3  # skip, and back to the last checkpoint
    STOP = 4


SPIKE_VERDICTS = {"skip": Verdict.SKIP, "rollback": Verdict.ROLL_BACK, "stop": Verdict.STOP}


def agree(verdict: Verdict, device: torch.device | str = "cpu") -> Verdict:
    """Returns the most severe verdict of all processes, so that all of them do the same."""
    if count_ranks() == 1:
        return verdict
    worst = torch.tensor(int(verdict), device=device)
    distributed.all_reduce(worst, op=distributed.ReduceOp.MAX)
    return Verdict(worst.item())


class Guard:
    """Judges losses and gradient norms, and counts what was skipped.

    Skipped steps add up until ``CLEAN_STEPS`` in a row were accepted. When patience ends, the run goes back to its last
    checkpoint and leaves out the rows of the skipped steps from then on; after some times of that it ends.

    A gradient scaler (fp16) may skip steps that overflow. Its scale starts at 2^16 and is halved each time: after 20 in
    a row it is below 1 and was not the cause.

    Args:
        on_spike: ``warn``, ``skip``, ``rollback`` or ``stop``.
        spike_ratio: A loss of more than this many times the running median is a spike; ``None`` looks for none.
        spike_window: Steps that the medians look back; no spike before it is full.
        most_skips: The skipped step that ends patience; 1 bears none.
        most_rollbacks: How often the run may go back; 0 ends it instead.
    """

    def __init__(
        self,
        on_spike: str = "warn",
        spike_ratio: float | None = 3.0,
        spike_window: int = 50,
        *,
        most_skips: int = 1,
        most_rollbacks: int = 0,
    ) -> None:
        self.on_spike = on_spike
        self.spike_ratio = spike_ratio
        self.most_skips = most_skips
        self.most_rollbacks = most_rollbacks
        self.losses: deque[float] = deque(maxlen=spike_window)
        self.norms: deque[float] = deque(maxlen=spike_window)
        self.num_skips = 0
        self.num_clean = 0
        self.num_overflows = 0
        self.num_rollbacks = 0
        self.rows: list[int] = []  # of the step that was found bad last, in all processes
        self.suspects: set[int] = set()
        self.excluded: set[int] = set()

    def judge(
        self,
        loss: float | None,
        norm: float,
        rows: Sequence[int] = (),
        *,
        has_scaler: bool = False,
        device: torch.device | str = "cpu",
    ) -> tuple[Verdict, str]:
        """Judges a step before its update, and counts it.

        Args:
            loss: The step's loss; ``None`` where it is not known.
            norm: Norm of the whole gradient before clipping.
            rows: What the step was computed from.
            has_scaler: Whether a gradient scaler looks for overflows.
            device: Where processes exchange their verdicts.

        Returns:
            The verdict, and what is wrong with the step.
        """
        own, reason = self._assess(loss, norm, has_scaler=has_scaler)
        verdict = agree(own, device)
        if verdict <= Verdict.OVERFLOW:
            self.num_clean = self.num_clean + 1 if verdict is Verdict.ACCEPT else 0
            if self.num_clean >= CLEAN_STEPS:
                self.num_skips = 0
                self.suspects.clear()
            if verdict is Verdict.ACCEPT and self.on_spike != "warn":
                self.take(loss, norm)
            return verdict, reason
        told = gather([reason, list(rows)])
        reason = next((theirs for theirs, _ in told if theirs), reason)
        self.rows = sorted({row for _, theirs in told for row in theirs})
        self.num_clean = 0
        self.num_skips += 1
        self.suspects.update(self.rows)
        if verdict is Verdict.SKIP and self.num_skips >= self.most_skips:
            verdict = Verdict.ROLL_BACK
        if verdict is Verdict.ROLL_BACK:
            verdict = self._go_back()
        return verdict, reason

    def _assess(self, loss: float | None, norm: float, *, has_scaler: bool) -> tuple[Verdict, str]:
        if loss is not None and not math.isfinite(loss):
            return Verdict.SKIP, f"the loss is {loss:g}"
        if math.isfinite(norm):
            self.num_overflows = 0
            spike = self.find_spike(loss, norm) if self.on_spike != "warn" else ""
            return (SPIKE_VERDICTS[self.on_spike] if spike else Verdict.ACCEPT), spike
        reason = "the gradient is not finite"
        if not has_scaler:
            return Verdict.SKIP, reason
        self.num_overflows += 1
        return (Verdict.OVERFLOW if self.num_overflows <= MOST_OVERFLOWS else Verdict.STOP), reason

    def _go_back(self) -> Verdict:
        if self.num_rollbacks >= self.most_rollbacks:
            return Verdict.STOP
        self.num_rollbacks += 1
        self.num_skips = 0
        self.excluded |= self.suspects
        self.suspects.clear()
        return Verdict.ROLL_BACK

    def find_spike(self, loss: float | None, norm: float) -> str:
        """Says in which way a step's values leave the window; empty if they do not, or it is not full."""
        if self.spike_ratio is None:
            return ""
        if loss is not None and len(self.losses) == self.losses.maxlen:
            median = statistics.median(self.losses)
            if loss > max(self.spike_ratio * median, SPIKE_FLOOR):
                return f"the loss {loss:.4g} is {loss / median:.1f} times its running median {median:.4g}"
        if len(self.norms) == self.norms.maxlen:
            median = statistics.median(self.norms)
            if norm > NORM_RATIO * median > 0:
                return f"the gradient norm {norm:.4g} is {norm / median:.0f} times its running median {median:.4g}"
        return ""

    def take(self, loss: float | None, norm: float) -> None:
        """Puts the finite values of an accepted step into the window."""
        if loss is not None and math.isfinite(loss):
            self.losses.append(loss)
        if math.isfinite(norm):
            self.norms.append(norm)

    def state_dict(self) -> dict[str, object]:
        """Returns what later steps are judged by."""
        counts = ("num_skips", "num_clean", "num_overflows", "num_rollbacks")
        return {
            **{name: getattr(self, name) for name in counts},
            **{name: sorted(getattr(self, name)) for name in ("suspects", "excluded")},
            **{name: list(getattr(self, name)) for name in ("losses", "norms")},
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Takes up the state of a checkpoint; what was decided since by going back to it stands."""
        for window, name in ((self.losses, "losses"), (self.norms, "norms")):
            window.clear()
            window.extend(state[name])
        self.num_overflows = state["num_overflows"]
        self.excluded.update(state["excluded"])
        if self.num_rollbacks > state["num_rollbacks"]:
            return
        for name in ("num_skips", "num_clean", "num_rollbacks"):
            setattr(self, name, state[name])
        self.suspects = set(state["suspects"])
