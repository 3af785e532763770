"""Which settings have an effect, given the others.

A setting without effect is left out of the digest and of ``plan.yaml``; one that somebody wrote on purpose is an
error. So two run files with the same digest train the same, and ``plan.yaml`` is free of such errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from forge_cli.resolve.rules_preference import iterate_idle_preferences
from forge_cli.resolve.sources import EMBEDDED_MODEL, is_model_folder
from forge_cli.schema.data import write_sources

if TYPE_CHECKING:
    from forge_cli.schema.runspec import RunSpec

# The last step always logs, saves and evaluates, so an interval beyond it says the same as the last step.
INTERVALS = ("logging.logging_steps", "checkpoint.save_steps", "evaluation.eval_steps")
# Not what is trained, but where it goes and what it was built from.
NOT_TRAINING = frozenset({"name", "output_dir", "preset", "extends"})
EVALUATION_SOURCES = ("data.eval", "data.eval_fraction", "data.eval_rows")
_NO_EVALUATION = "there are no evaluation rows"
_ADD_EVALUATION = "add data.eval or data.eval_fraction, or remove the line"


class Idle(NamedTuple):
    """Why a setting has no effect.

    Attributes:
        causes: The settings that take its effect away.
        why: The reason.
        fix: What to write instead.
    """

    causes: tuple[str, ...]
    why: str
    fix: str = "remove the line"


def has_evaluation(spec: RunSpec) -> bool:
    """Tells whether a run has evaluation rows."""
    return any(getattr(spec.data, path.rpartition(".")[2]) is not None for path in EVALUATION_SOURCES)


def find_idle(spec: RunSpec) -> dict[str, Idle]:
    """Finds the settings that have no effect in a run: dotted path to reason."""
    return dict(_iterate_idle(spec))


def _iterate_idle(spec: RunSpec) -> Iterator[tuple[str, Idle]]:
    sources = EVALUATION_SOURCES
    if not has_evaluation(spec):
        for path in ("evaluation.eval_steps", "evaluation.per_device_eval_batch_size"):
            yield path, Idle(sources, _NO_EVALUATION, _ADD_EVALUATION)
    yield from _iterate_idle_report(spec, sources)
    if spec.quantization and spec.quantization.bits == 8:
        for name in type(spec.quantization).model_fields:
            if name.startswith("bnb_4bit_"):
                yield f"quantization.{name}", Idle(("quantization.bits",), "quantization.bits is 8")
    if spec.training.max_steps is not None:
        why = f"training.max_steps is {spec.training.max_steps}"
        yield "training.num_train_epochs", Idle(("training.max_steps",), why, "keep one of them")
        if spec.monitor and spec.training.max_steps <= spec.monitor.spike_window:
            for name in ("spike_ratio", "spike_window", "on_spike"):
                why = f"the run has {spec.training.max_steps} steps and the window is {spec.monitor.spike_window}"
                yield f"monitor.{name}", Idle(("training.max_steps", "monitor.spike_window"), why)
    if spec.training.lr_scheduler_type == "constant":
        fix = "remove the line, or write lr_scheduler_type: constant_with_warmup"
        yield "training.warmup_steps", Idle(("training.lr_scheduler_type",), "a constant schedule has no warm-up", fix)
    yield from _iterate_idle_sources(spec)
    for path, causes, why in iterate_idle_preferences(spec):
        yield path, Idle(causes, why)


def _iterate_idle_report(spec: RunSpec, sources: tuple[str, ...]) -> Iterator[tuple[str, Idle]]:
    report = spec.report
    if report is None:
        return
    evaluated = has_evaluation(spec)
    if not evaluated and report.samples:
        yield "report.samples", Idle(sources, _NO_EVALUATION, _ADD_EVALUATION)
    if not report.prompts and not (evaluated and (report.samples or report.exact_match)):
        causes = (*sources, "report.samples", "report.exact_match", "report.prompts")
        yield "report.max_new_tokens", Idle(causes, "the report generates no answers")


def _iterate_idle_sources(spec: RunSpec) -> Iterator[tuple[str, Idle]]:
    data, model = spec.data, spec.model
    if data.format in ("text", "tokens"):
        yield "data.train_on", Idle(("data.format",), f"all of a {data.format} row is trained")
    if data.on_bad_row == "error":
        yield "data.max_bad_ratio", Idle(("data.on_bad_row",), "data.on_bad_row is error")
    if data.on_overlong in ("error", "split"):
        yield "data.max_lost_ratio", Idle(("data.on_overlong",), f"data.on_overlong is {data.on_overlong}")
    if data.streaming:
        why = "streamed rows are mixed within a buffer"
        yield "training.train_sampling_strategy", Idle(("data.streaming",), why)
    if model.revision is not None and (model.name == EMBEDDED_MODEL or is_model_folder(model.name)):
        yield "model.revision", Idle(("model.name",), f"{model.name} does not come from a hub")


def list_effective(spec: RunSpec) -> dict[str, object]:
    """Returns every setting that has an effect, by dotted path, in the schema's order; a section that is off is null.

    Intervals beyond the last step are given as the last step, which means the same.
    """
    idle = find_idle(spec)
    values: dict[str, object] = {}
    for name in type(spec).model_fields:
        value = getattr(spec, name)
        fields = getattr(type(value), "model_fields", None)
        if fields is None:
            values[name] = value
            continue
        for inner in fields:
            if (path := f"{name}.{inner}") not in idle:
                one = getattr(value, inner)
                values[path] = write_sources(one) if path in ("data.train", "data.eval") else one
    last = spec.training.max_steps
    for path in INTERVALS if last is not None else ():
        if isinstance(values.get(path), int):
            values[path] = min(values[path], last)
    return values
