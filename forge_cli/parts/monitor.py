"""Watches a run: every step's loss and gradient norm, norms per layer, alarms, and a stop before a bad update.

What is measured stays on the device until a logging step reads all of it at once. The one exception is the question
whether the gradient is finite, which has to be answered before each optimizer step.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import TrainerCallback

from forge_cli.errors import DivergedError
from forge_cli.parts.layers import ParameterGroups, measure_norms
from forge_cli.parts.memory import MemoryCallback

Record = dict[str, object]
MOST_OVERFLOWS = 20
SPIKE_FLOOR = 0.1  # nats: what has been learned to the letter jumps by factors without meaning anything


def pick_rewards(metrics: Mapping[str, object]) -> Record:
    """Picks the rewards and log probabilities of better and worse answers, with ``eval_`` before their names or not."""
    return {name: value for name, value in metrics.items() if "rewards/" in name or "logps/" in name}


class MonitorCallback(TrainerCallback):
    """Records every optimizer step and stops the run before a non-finite update.

    With a plain ``transformers.Trainer`` it sees gradients after clipping and losses when they are logged; inside
    Forge's own trainer it is handed each micro step's loss and each step's norms before clipping.

    A gradient scaler (fp16) may skip steps that overflow; such steps are marked ``skipped``, and 20 of them in a row
    stop the run.

    Args:
        check_gradients: Record norms per layer group and look for tensors without gradient.
        spike_ratio: Alarm when a loss exceeds this many times the running median; ``None`` raises no alarms at all.
        spike_window: Steps the median looks back; no spike alarm before it is full.
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
        metrics_path: Path | None = None,
        on_record: Callable[[Record], None] | None = None,
        name_rows: Callable[[Sequence[int]], list[str]] | None = None,
        memory: MemoryCallback | None = None,
    ) -> None:
        self.check_gradients = check_gradients
        self.spike_ratio = spike_ratio
        self.metrics_path = metrics_path
        self.on_record = on_record
        self.name_rows = name_rows or _number_rows
        self._memory = memory
        self.records: list[Record] = []
        self.alarms: list[Record] = []
        self.num_tokens = 0
        self.step_seconds = 0.0
        self.rows_digest = ""
        self._groups: ParameterGroups | None = None
        self._recent_losses: deque[float] = deque(maxlen=spike_window)
        self._pending: list[dict] = []
        self._num_overflows = 0
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
        self._groups = ParameterGroups(model)
        self._pending = []
        self._clear_step()
        self._last_time = time.perf_counter()

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        """Stops before the update if the loss or the gradient is not finite.

        Raises:
            DivergedError: It is not; names the step, the tensors and the rows.
        """
        step = state.global_step + 1
        norms, total = self._step_norms or measure_norms(self._groups)
        if step == 1 and self.check_gradients:
            self._check_missing_gradients(step)
        loss = self._step_loss
        entry = {"step": step, "loss": loss, "norms": norms, "total": total, "tokens": self._step_tokens}
        if not torch.isfinite(total if loss is None else total + loss.to(total.device)):
            self._judge_overflow(step, norms, loss, has_scaler=getattr(optimizer, "scaler", None) is not None)
            entry["skipped"] = True
        else:
            self._num_overflows = 0
        if lr_scheduler is not None:
            entry["learning_rate"] = lr_scheduler.get_last_lr()[0]
        self._pending.append(entry)
        self.rows_digest = hashlib.sha256(f"{self.rows_digest}{self._step_rows}".encode()).hexdigest()
        self._clear_step()

    def on_step_end(self, args, state, control, **kwargs):
        """Notes the time."""
        if self._pending:
            now = time.perf_counter()
            self._pending[-1]["seconds"] = now - self._last_time
            self._last_time = now

    def on_save(self, args, state, control, **kwargs):
        """Leaves the time of a checkpoint out of the next step."""
        self._last_time = time.perf_counter()

    def on_evaluate(self, args, state, control, **kwargs):
        """Leaves the time of an evaluation out of the next step."""
        self._last_time = time.perf_counter()

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
        names = ("num_tokens", "step_seconds", "_num_overflows", "rows_digest")
        return {**{name: getattr(self, name) for name in names}, "_recent_losses": list(self._recent_losses)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Takes up a state."""
        values = dict(state)
        self._recent_losses.clear()
        self._recent_losses.extend(values.pop("_recent_losses"))
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
        device = pending[0]["total"].device
        blank = torch.full((), math.nan, device=device)
        columns = [
            torch.stack([p["total"], blank if p["loss"] is None else p["loss"].to(device, torch.float32)])
            for p in pending
        ]
        group_norms = None
        if self.check_gradients:
            squares = torch.stack([p["norms"] for p in pending]) ** 2
            index = self._groups.index.to(device)
            group_norms = torch.zeros(len(pending), len(self._groups.labels), device=device)
            columns.append(group_norms.index_add_(1, index, squares).sqrt().flatten())
        flat = torch.cat([column.flatten() for column in columns]).tolist()
        for place, entry in enumerate(pending):
            total, loss = flat[2 * place : 2 * place + 2]
            record: Record = {"step": entry["step"], "loss": loss if entry["loss"] is not None else None}
            record["grad_norm"] = total
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
            if self.check_gradients and place == len(pending) - 1:
                width = len(self._groups.labels)
                start = 2 * len(pending) + place * width
                record["group_norms"] = dict(zip(self._groups.labels, flat[start : start + width], strict=True))
                record["peak_memory_bytes"] = self.memory.peak_bytes()
            self._write(record)
            if not entry.get("skipped"):
                self._judge(entry["step"], record["loss"], total)

    def _judge(self, step: int, loss: object, total: float) -> None:
        """Raises the alarms that need values; the running median never contains a spike's own value."""
        if self.spike_ratio is None:
            return
        if total == 0:
            self.alarm(step, "zero_gradient", "the gradient norm is exactly 0: nothing is learned")
        if not isinstance(loss, float) or not math.isfinite(loss):
            return
        if loss == 0:
            self.alarm(step, "zero_loss", "the loss is exactly 0: are all labels masked?")
        if len(self._recent_losses) == self._recent_losses.maxlen:
            median = statistics.median(self._recent_losses)
            if loss > max(self.spike_ratio * median, SPIKE_FLOOR):
                text = f"the loss {loss:.4g} is {loss / median:.1f} times its running median {median:.4g}"
                self.alarm(step, "spike", text)
        self._recent_losses.append(loss)

    def _check_missing_gradients(self, step: int) -> None:
        missing = [name for name, p in zip(self._groups.names, self._groups.parameters, strict=True) if p.grad is None]
        if missing and self.spike_ratio is not None:
            shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            self.alarm(step, "no_gradient", f"{len(missing)} trainable tensors got no gradient: {shown}")

    def _judge_overflow(self, step: int, norms: torch.Tensor, loss: torch.Tensor | None, *, has_scaler: bool) -> None:
        """Lets a gradient scaler skip the steps it expects to overflow, a few in a row; everything else stops.

        The scale starts at 2^16 and is halved at each overflow: after 20 it is below 1 and was not the cause.
        """
        self._num_overflows += 1
        is_loss_finite = loss is None or bool(torch.isfinite(loss))
        if not (has_scaler and is_loss_finite) or self._num_overflows > MOST_OVERFLOWS:
            self._stop(step, norms, loss)

    def _stop(self, step: int, norms: torch.Tensor, loss: torch.Tensor | None) -> None:
        self.flush()
        bad = [name for name, norm in zip(self._groups.names, norms.tolist(), strict=True) if not math.isfinite(norm)]
        rows = sorted(set(self._step_rows))
        value = "unknown" if loss is None else f"{loss.item():g}"
        self._write({"step": step, "diverged": True, "loss": value, "rows": rows, "tensors": bad[:20]})
        where = ", ".join([*self.name_rows(rows[:16]), *(["..."] if len(rows) > 16 else [])])
        named = f"; first tensor: {bad[0]}" if bad else ""
        raise DivergedError(
            f"step {step}: the loss is {value} and {len(bad)} of {len(norms)} gradients are not finite{named}",
            where=where,
            why="the update was not made, and the weights are those of the step before",
            fix="look at these rows, lower training.learning_rate, or use training.precision: bf16 or fp32",
        )

    def alarm(self, step: int, kind: str, message: str) -> None:
        """Records an alarm."""
        record: Record = {"step": step, "alarm": kind, "message": message}
        self.alarms.append(record)
        self._write(record)

    def _write(self, record: Record) -> None:
        self.records.append(record)
        if self.metrics_path is not None:
            with self.metrics_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({k: _as_json(v) for k, v in record.items()}) + "\n")
        if self.on_record is not None:
            self.on_record(record)


def _number_rows(rows: Sequence[int]) -> list[str]:
    return [f"row {row}" for row in rows]


def _as_json(value: object) -> object:
    """JSON has no NaN; a lost value is written as text rather than as an invalid file."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
