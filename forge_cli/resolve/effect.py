"""Which settings have an effect, given the others.

A setting without effect is left out of the digest and of ``plan.yaml``; one that somebody wrote on purpose is an
error. So two run files with the same digest train the same, and ``plan.yaml`` is free of such errors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from forge_cli.resolve.sources import EMBEDDED_MODEL, is_data_file, is_embedded_data, is_model_folder

if TYPE_CHECKING:
    from forge_cli.schema.runspec import RunSpec

# The last step always logs, saves and evaluates, so an interval beyond it says the same as the last step.
INTERVALS = ("logging.logging_steps", "checkpoint.save_steps", "evaluation.eval_steps")
# Not what is trained, but where it goes and what it was built from.
NOT_TRAINING = frozenset({"name", "output_dir", "preset", "extends"})
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
    """Tells whether a run has evaluation rows; ``eval_split`` alone means a split of the training data set."""
    data = spec.data
    return data.eval is not None or data.eval_fraction is not None or data.eval_split is not None


def find_idle(spec: RunSpec) -> dict[str, Idle]:
    """Finds the settings that have no effect in a run: dotted path to reason."""
    return dict(_iterate_idle(spec))


def _iterate_idle(spec: RunSpec) -> Iterator[tuple[str, Idle]]:
    sources = ("data.eval", "data.eval_fraction", "data.eval_split")
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
            for name in ("spike_ratio", "spike_window"):
                why = f"the run has {spec.training.max_steps} steps and the window is {spec.monitor.spike_window}"
                yield f"monitor.{name}", Idle(("training.max_steps", "monitor.spike_window"), why)
    if spec.training.lr_scheduler_type == "constant":
        fix = "remove the line, or write lr_scheduler_type: constant_with_warmup"
        yield "training.warmup_steps", Idle(("training.lr_scheduler_type",), "a constant schedule has no warm-up", fix)
    if spec.data.format == "text":
        yield "data.train_on", Idle(("data.format",), "all of a text row is trained")
    yield from _iterate_idle_sources(spec)


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
    if _is_file(data.train):
        yield "data.train_split", Idle(("data.train",), "data.train is a file, which has no splits")
    if data.eval_split is not None and _is_file(data.eval or data.train):
        owner = "data.eval" if data.eval else "data.train"
        yield "data.eval_split", Idle((owner,), f"{owner} is a file, which has no splits")
    if model.revision is not None and (model.name == EMBEDDED_MODEL or is_model_folder(model.name)):
        yield "model.revision", Idle(("model.name",), f"{model.name} does not come from a hub")


def _is_file(name: str) -> bool:
    return is_data_file(name) or is_embedded_data(name)


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
                values[path] = getattr(value, inner)
    last = spec.training.max_steps
    for path in INTERVALS if last is not None else ():
        if isinstance(values.get(path), int):
            values[path] = min(values[path], last)
    return values
