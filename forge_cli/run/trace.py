"""The memory of a plan's training step, traced on fake tensors in a process of its own: ``forge estimate --trace``.

``python -m forge_cli.run.trace`` reads a list of requests as JSON on stdin and prints a list of answers on stdout. A
request names ``spec`` (a run file), ``facts`` (a model's shape), ``num_layers``, ``num_frozen``, ``device`` (``cuda``
or ``cpu``) and ``masked``. With ``list`` (a phase, or ``peak``) the answer also holds every storage that was live at
that phase's peak, and with ``events`` (a phase) all that were made and freed in it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from forge_cli.errors import MachineError, ModelError

if TYPE_CHECKING:
    from forge_cli.resolve.plan import Plan

MOST_SECONDS = 600


@dataclass(frozen=True)
class Trace:
    """What a trace found.

    Attributes:
        phases: Highest live bytes of each phase, at the model's depth. ``load`` is the weights alone.
        traced: The same as traced, by (decoder layers, frozen ones among them).
        seconds: What it took.
    """

    phases: Mapping[str, int]
    traced: Mapping[tuple[int, int], Mapping[str, int]]
    seconds: float

    @property
    def peak_bytes(self) -> int:
        """The highest of all phases."""
        return max(self.phases.values())


def trace_plan(
    plan: Plan, device: str = "cuda", *, masked: bool | None = None, layers: tuple[int, int] = (2, 3)
) -> Trace:
    """Traces a plan's step at two depths, and goes on along the line through them to the model's depth.

    Rows are at full length. Every phase is a line over the layers, as each layer adds the same; frozen layers and
    trained ones have a line each.

    Args:
        plan: The plan; only sft is traced.
        device: ``cuda`` or ``cpu``: whose number formats, kernels and rounding.
        masked: Whether attention needs a mask that is written out; ``None``: where rows share a sequence and flash
            attention is not asked for.
        layers: The two depths, in trained layers.

    Raises:
        ModelError: The model's shape is not known, or the method is not traced.
        MachineError: The trace failed.
    """
    facts, frozen = plan.facts, plan.derived.num_frozen_layers
    if facts is None or frozen is None:
        raise ModelError(f"the shape of {plan.spec.model.name} is not known", fix="download it and name its folder")
    if plan.spec.method != "sft":
        raise ModelError(f"{plan.spec.method} is not traced", fix="trace the same settings with method: sft")
    began = time.perf_counter()
    shares = plan.spec.data.packing or plan.spec.data.padding_free
    flash = plan.spec.model.attn_implementation == "flash_attention_2"
    few, more = layers
    # (trained, frozen)
    depths = [(few, min(frozen, 1)), (more, min(frozen, 1)), *([(few, 2)] if frozen else [])]
    request = {
        "spec": plan.spec.model_dump(mode="json"),
        "facts": facts._asdict(),
        "device": device,
        "masked": shares and not flash if masked is None else masked,
    }
    requests = [request | {"num_layers": sum(depth), "num_frozen": depth[1]} for depth in depths]
    answers = [answer["phases"] for answer in run_requests(requests)]
    trained = facts.num_hidden_layers - frozen
    phases = {}
    # Between the first and the last layer lies nothing higher, and with few layers there is nothing at all.
    for name in [one for one in answers[0] if all(one in answer for answer in answers)]:
        low = answers[0][name]
        value = low + (answers[1][name] - low) * (trained - few) / (more - few)
        if frozen:
            value += (answers[2][name] - low) * (frozen - 1)
        phases[name] = round(value)
    traced = {(sum(depth), depth[1]): answer for depth, answer in zip(depths, answers, strict=True)}
    return Trace(phases, traced, time.perf_counter() - began)


def run_requests(requests: Sequence[Mapping[str, object]]) -> list[dict]:
    """Traces several steps in one process.

    Raises:
        MachineError: The process failed; carries what it said last.
    """
    command = [sys.executable, "-m", "forge_cli.run.trace"]
    done = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True, timeout=MOST_SECONDS)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["it said nothing"]
        raise MachineError(f"the trace ended with {done.returncode}", why=said[-1][:300])
    return json.loads(done.stdout)


def _answer(request: dict) -> dict:
    from forge_cli.facts.shape import ModelFacts
    from forge_cli.run.trace_step import Scene, trace_step
    from forge_cli.schema.runspec import RunSpec

    wanted, events = request.pop("list", None), request.pop("events", None)
    scene = Scene(
        **request | {"spec": RunSpec.model_validate(request["spec"]), "facts": ModelFacts(**request["facts"])}
    )
    live = trace_step(scene, keeps_events=bool(wanted or events))
    answer: dict = {"phases": live.peaks}
    if wanted:
        answer["storages"] = [asdict(one) for one in live.list_peak(None if wanted == "peak" else wanted)]
    if events:
        answer["events"] = [(sign, asdict(one)) for sign, one in live.list_events(events)]
    return answer


def main() -> None:
    """Answers the requests on stdin; whatever libraries print goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        answers = [_answer(request) for request in json.load(sys.stdin)]
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
