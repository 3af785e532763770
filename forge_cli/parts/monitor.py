"""Watches a run: every step's loss and gradient norm, norms per layer, alarms, and no bad update.

What is measured stays on the device until a logging step reads all of it at once. The one exception is a step's loss
and gradient norm, which have to be judged before its update: one transfer of two numbers.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import TrainerCallback

from forge_cli.errors import DivergedError
from forge_cli.parts.guard import Guard, Verdict
from forge_cli.parts.layers import ParameterGroups, measure_norms
from forge_cli.parts.memory import MemoryCallback
from forge_cli.parts.ranks import add_up, count_ranks
from forge_cli.parts.step_records import RecordFile, number_rows, pick_rewards, read_steps

Record = dict[str, object]


class MonitorCallback(TrainerCallback):
    """Records every optimizer step and lets no non-finite update happen.

    With a plain ``transformers.Trainer`` it sees gradients after clipping and losses when they are logged, and stops
    at the first step that is not finite, as nothing there could go back. Inside Forge's own trainer it is handed each
    micro step's loss and each step's norms before clipping, and a guard with more patience.

    Args:
        check_gradients: Record norms per layer group and look for tensors without gradient.
        spike_ratio: Alarm when a loss exceeds this many times the running median; ``None`` raises no alarms at all.
        spike_window: Steps the median looks back; no spike alarm before it is full.
        guard: Judges steps; has its own ratio and window. ``None`` warns of spikes and stops at what is not finite.
        metrics_path: JSON-lines file to append to; ``None`` keeps records in memory only.
        on_record: Called with every record, in order.
        name_rows: Writes where rows stand.
        memory: Reads the peak of memory.
    """

    def __init__(
        self,
        check_gradients: bool = True,
        *,
        spike_ratio: float | None = 3.0,
        spike_window: int = 50,
        guard: Guard | None = None,
        metrics_path: Path | None = None,
        on_record: Callable[[Record], None] | None = None,
        name_rows: Callable[[Sequence[int]], list[str]] | None = None,
        memory: MemoryCallback | None = None,
    ) -> None:
        self.check_gradients = check_gradients
        self.guard = guard or Guard("warn", spike_ratio, spike_window)
        self.is_skipped = False
        self.rollback_reason = ""
        self._file = RecordFile(metrics_path) if metrics_path else None
        self.on_record = on_record
        self.name_rows = name_rows or number_rows
        self._memory = memory
        self.records: list[Record] = []
        self.alarms: list[Record] = []
        self.num_tokens = 0
        self.step_seconds = 0.0
        self.rows_digest = ""
        self._groups: ParameterGroups | None = None
        self._pending: list[dict] = []
        self._last_time = 0.0
        self._clear_step()

    @property
    def memory(self) -> MemoryCallback:
        """Reads the peak of memory."""
        if self._memory is None:
            self._memory = MemoryCallback()
        return self._memory

    def _clear_step(self) -> None:
        """Forgets the micro steps of the last step, also of one that was interrupted."""
        self._step_loss: torch.Tensor | None = None
        self._step_norms: tuple[torch.Tensor, torch.Tensor] | None = None
        self._step_rows: list[int] = []
        self._step_tokens = 0

    # What Forge's trainer hands over --------------------------------------------------------------------------

    def record_micro_step(self, loss: torch.Tensor, rows: Sequence[int], num_tokens: int) -> None:
        """Takes one micro step's share of the step's loss ``[]``, its data rows and its real (unpadded) tokens."""
        self._step_loss = loss.detach() if self._step_loss is None else self._step_loss + loss.detach()
        self._step_rows.extend(rows)
        self._step_tokens += num_tokens

    def measure_step(self) -> torch.Tensor:
        """Measures the gradient norms before clipping and returns the global norm ``[]``."""
        self._step_norms = measure_norms(self._groups)
        return self._step_norms[1]

    # What the Trainer calls -----------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Turns the NaN filter off (it shows NaN as 0) and notes which parameters are trained."""
        args.logging_nan_inf_filter = False
        # After going back: the steps since are made again, and only what happened in them is kept.
        self.records = [one for one in self.records if one["step"] <= state.global_step or "alarm" in one]
        self._groups = ParameterGroups(model)
        self._pending = []
        self._clear_step()
        self._last_time = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        """Takes the gradients away if the update is to be skipped: optimizers leave alone what has none.

        Raises:
            DivergedError: The guard has no patience left; names the step, the tensors and the rows.
        """
        self._share_step()
        step = state.global_step + 1
        norms, total = self._step_norms or measure_norms(self._groups)
        if step == 1 and self.check_gradients:
            self._check_missing_gradients(step)
        loss = self._step_loss
        entry = {"step": step, "loss": loss, "norms": norms, "total": total, "tokens": self._step_tokens}
        if self._judge_step(step, norms, total, has_scaler=getattr(optimizer, "scaler", None) is not None):
            entry["skipped"] = True
        if lr_scheduler is not None:
            entry["learning_rate"] = lr_scheduler.get_last_lr()[0]
        self._pending.append(entry)
        self.rows_digest = hashlib.sha256(f"{self.rows_digest}{self._step_rows}".encode()).hexdigest()
        self._clear_step()

    def _share_step(self) -> None:
        """Makes loss and tokens those of all processes: each has its share of the loss times their number."""
        if count_ranks() > 1 and self._step_loss is not None:
            loss, self._step_tokens = add_up([self._step_loss.item(), self._step_tokens])
            self._step_loss = self._step_loss.new_tensor(loss / count_ranks())

    def on_step_end(self, args, state, control, **kwargs):
        """Notes the time."""
        if self._pending:
            now = time.perf_counter()
            self._pending[-1]["seconds"] = now - self._last_time
            self._last_time = now

    def on_save(self, args, state, control, **kwargs):
        """Leaves the time of a checkpoint or an evaluation out of the next step."""
        self._last_time = time.perf_counter()

    on_evaluate = on_save

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Reads everything measured since the last log line in one transfer.

        A plain Trainer hands over no step losses; there the mean that it logs stands for the last step.
        """
        loss = (logs or {}).get("loss")
        if self._pending:
            self._pending[-1]["rewards"] = pick_rewards(logs or {})
        if isinstance(loss, float) and self._pending and self._pending[-1]["loss"] is None:
            self._pending[-1]["loss"] = torch.tensor(loss)
        self.flush()
        if isinstance(loss, float) and not math.isfinite(loss):
            raise DivergedError(f"the loss logged at step {state.global_step} is {loss}")

    def on_train_end(self, args, state, control, **kwargs):
        """Reads what is left."""
        self.flush()
        rates = [record["learning_rate"] for record in self.records if record.get("learning_rate") is not None]
        if rates and not any(rates):
            # A warm-up begins at 0, so a run as short as its warm-up changes nothing.
            self.alarm(state.global_step, "zero_rate", "the learning rate was 0 in every step: nothing was learned")

    def record_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Takes the losses of an evaluation, raw and averaged, and the rewards."""
        self.flush()
        losses = {key: metrics.get(key) for key in ("eval_loss", "eval_ema_loss")}
        self._write({"step": step, **losses, "eval_seconds": metrics.get("eval_runtime"), **pick_rewards(metrics)})

    # Reading and judging --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, object]:
        """Returns what later steps are judged and counted by; everything measured is written first."""
        self.flush()
        names = ("num_tokens", "step_seconds", "rows_digest")
        return {**{name: getattr(self, name) for name in names}, "guard": self.guard.state_dict()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Takes up a state."""
        values = dict(state)
        self.guard.load_state_dict(values.pop("guard"))
        for name, value in values.items():
            setattr(self, name, value)

    def take_up(self, records: Sequence[Record]) -> None:
        """Takes the records of the steps that a resumed run has behind it."""
        self.records = list(records)
        self.alarms = [record for record in records if "alarm" in record]

    def flush(self) -> None:
        """Moves all pending measurements to the host in one transfer, judges and writes them."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        index = self._groups.index if self.check_gradients else None
        pairs, group_norms = read_steps(pending, index, len(self._groups.labels))
        for entry, (total, loss) in zip(pending, pairs, strict=True):
            record: Record = {"step": entry["step"], "loss": loss, "grad_norm": total}
            if entry.get("skipped"):
                record["skipped"] = True
            record["learning_rate"] = entry.get("learning_rate")
            seconds = entry.get("seconds") or 0.0
            record["seconds"] = round(seconds, 6)
            record["tokens"] = entry["tokens"]
            record["tokens_per_second"] = round(entry["tokens"] / seconds, 1) if seconds else None
            record |= entry.get("rewards", {})
            self.num_tokens += entry["tokens"]
            self.step_seconds += seconds
            if self.check_gradients and entry is pending[-1]:
                record["group_norms"] = dict(zip(self._groups.labels, group_norms[-1], strict=True))
                record["peak_memory_bytes"] = self.memory.peak_bytes()
            self._write(record)
            if not entry.get("skipped"):
                self._judge(entry["step"], record["loss"], total)

    def _judge(self, step: int, loss: object, total: float) -> None:
        """Raises the alarms that need values; the running median never contains a spike's own value."""
        if self.guard.spike_ratio is None:
            return
        if total == 0:
            self.alarm(step, "zero_gradient", "the gradient norm is exactly 0: nothing is learned")
        if not isinstance(loss, float) or not math.isfinite(loss):
            return
        if loss == 0:
            self.alarm(step, "zero_loss", "the loss is exactly 0: are all labels masked?")
        if self.guard.on_spike == "warn":
            if text := self.guard.find_spike(loss, total):
                self.alarm(step, "spike", text)
            self.guard.take(loss, total)

    def _check_missing_gradients(self, step: int) -> None:
        missing = [name for name, p in zip(self._groups.names, self._groups.parameters, strict=True) if p.grad is None]
        if missing and self.guard.spike_ratio is not None:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            self.alarm(step, "no_gradient", f"{len(missing)} trainable tensors got no gradient: {shown}")

    def _judge_step(self, step: int, norms: torch.Tensor, total: torch.Tensor, *, has_scaler: bool) -> bool:
        """Asks the guard before the update and does what it says; returns whether the step is skipped."""
        loss = self._step_loss
        if loss is not None and self._step_tokens == 0:
            self.is_skipped = True
            self.alarm(step, "empty", "all rows of this step are left out: nothing is learned from it")
            return True
        values = [total] if loss is None else [total, loss.to(total.device, total.dtype)]
        norm, value = [*torch.stack(values).tolist(), None][:2]
        verdict, reason = self.guard.judge(value, norm, self._step_rows, has_scaler=has_scaler, device=total.device)
        self.is_skipped = verdict >= Verdict.SKIP
        if self.is_skipped:
            self._skip(step, verdict, reason, norms, value)
        return verdict > Verdict.ACCEPT

    def _skip(self, step: int, verdict: Verdict, reason: str, norms: torch.Tensor, loss: float | None) -> None:
        self.flush()
        for parameter in self._groups.parameters:
            parameter.grad = None
        bad = [name for name, norm in zip(self._groups.names, norms.tolist(), strict=True) if not math.isfinite(norm)]
        rows = self.guard.rows
        where = ", ".join([*self.name_rows(rows[:16]), *(["..."] if len(rows) > 16 else [])])
        if bad:
            reason += f", {len(bad)} of {len(norms)} gradients are not finite; first tensor: {bad[0]}"
        value = "unknown" if loss is None else f"{loss:g}"
        record: Record = {"step": step, "rows": rows, "tensors": bad[:20]}
        if verdict is Verdict.STOP:
            self._write({**record, "loss": value, "diverged": True})
            raise DivergedError(
                f"step {step}: {reason}",
                where=where,
                why="the update was not made, and the weights are those of the step before",
                fix="look at these rows, lower training.learning_rate, or use training.precision: bf16 or fp32",
            )
        message = f"{reason}; the update is skipped; {where}"
        self.alarms.append({**record, "skipped": True, "alarm": "skipped", "message": message})
        self._write(self.alarms[-1])
        if verdict is Verdict.ROLL_BACK:
            self.rollback_reason = f"step {step}: {reason}; the rows of the skipped steps are left out from now on"

    def alarm(self, step: int, kind: str, message: str) -> None:
        """Records an alarm."""
        self.alarms.append({"step": step, "alarm": kind, "message": message})
        self._write(self.alarms[-1])

    def _write(self, record: Record) -> None:
        self.records.append(record)
        if self.on_record is not None:
            self.on_record(record)
        if self._file is not None and (lost := self._file.append(record)):
            self.alarm(record["step"], "disk", lost)
