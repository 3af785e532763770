"""Contradictions of the methods that learn from preferences, and of going on with an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from forge_cli.errors import ConfigError, ForgeError
from forge_cli.facts.model_facts import locate_model
from forge_cli.resolve.adapter_file import FILE, list_lora_values, read_adapter_config
from forge_cli.resolve.scene import Clash, Scene
from forge_cli.resolve.wording import printable, show

if TYPE_CHECKING:
    from forge_cli.schema.runspec import RunSpec

_PAIR_LOSSES = ("sigmoid", "hinge", "ipo")
LOSSES: dict[str, tuple[str, ...]] = {
    "dpo": (
        *_PAIR_LOSSES, "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero",
        "apo_down", "discopop", "sft", "sigmoid_norm",
    ),
    "kto": ("kto", "apo_zero_unpaired"),
    "cpo": (*_PAIR_LOSSES, "simpo"),
}  # fmt: skip
_SMOOTHED = {"dpo": {"exo_pair", "robust", "aot", "aot_unpaired"}, "cpo": {"sigmoid", "simpo"}}
_SETTINGS: dict[str, set[str]] = {
    "sft": set(),
    "dpo": {"loss_type", "loss_weights", "beta", "label_smoothing", "reference", "precompute_ref_log_probs"},
    "kto": {"loss_type", "beta", "reference", "precompute_ref_log_probs", "desirable_weight", "undesirable_weight"},
    "orpo": {"beta"},
    "cpo": {"loss_type", "beta", "label_smoothing", "cpo_alpha", "simpo_gamma"},
    "reward": {"center_rewards_coefficient"},
}
# Learning rate x (lora_alpha / r) in the preference examples of four tools. Source: LLaMA-Factory 5e-6 x 2, Axolotl
# 2e-4 x 0.5 and 1e-4 x 2, ms-swift 1e-4 x 4.
_USUAL_STEP = (1e-5, 4e-4)
_LOSS, _BATCH = "preference.loss_type", "training.per_device_train_batch_size"


def list_losses(spec: RunSpec) -> tuple[str, ...]:
    """Returns the losses of a run, with the method's own when none is named."""
    named = spec.preference.loss_type
    if named is None:
        return LOSSES.get(spec.method, ())[:1]
    return (named,) if isinstance(named, str) else tuple(named)


def iterate_idle_preferences(spec: RunSpec) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Yields settings that a method makes pointless: dotted path, causes, reason."""
    method, losses = spec.method, set(list_losses(spec))
    for name in type(spec.preference).model_fields:
        if name not in _SETTINGS[method]:
            yield f"preference.{name}", ("method",), f"method is {method}"
        elif name == "label_smoothing" and not losses & _SMOOTHED[method]:
            yield f"preference.{name}", (_LOSS, "method"), f"the loss {' and '.join(sorted(losses))} is not smoothed"
        elif name == "simpo_gamma" and "simpo" not in losses:
            yield f"preference.{name}", (_LOSS, "method"), "loss_type is not simpo"
    if method != "sft":
        yield "data.train_on", ("method",), "the answers are trained, and nothing else"
        if spec.lora:
            yield "lora.lora_dropout", ("method",), "without dropout, as model and reference have to compare alike"
    if method == "reward" and spec.report:
        for name in type(spec.report).model_fields:
            yield f"report.{name}", ("method",), "a reward model scores answers and writes none"
    if spec.model.adapter and spec.lora:
        yield "lora.init_lora_weights", ("model.adapter",), "model.adapter is where the adapter starts"


def check_losses(scene: Scene) -> Iterator[Clash]:
    """The loss belongs to the method, and its weights to it."""
    spec, losses = scene.spec, list_losses(scene.spec)
    known, section = LOSSES.get(spec.method), spec.preference
    if known is None:
        return
    for loss in losses:
        if loss not in known:
            yield Clash((_LOSS, "method"), f"{spec.method} has no loss {loss}", f"write one of {', '.join(known)}")
    if spec.method != "dpo" and isinstance(section.loss_type, list):
        yield Clash((_LOSS, "method"), "only dpo adds losses up", "name one loss")
    if len(set(losses)) != len(losses) or not losses:
        yield Clash((_LOSS,), "names a loss twice, or none", "name each loss once")
    if spec.method != "dpo":
        return
    if section.loss_weights is not None and len(section.loss_weights) != len(losses):
        what = f"{len(section.loss_weights)} weights for {len(losses)} losses"
        yield Clash(("preference.loss_weights", _LOSS), what, "give each loss one weight")
    if "exo_pair" in losses and not section.label_smoothing:
        why = "it compares with a distribution that may not be 0"
        yield Clash(("preference.label_smoothing", _LOSS), "exo_pair needs label_smoothing", "write 1e-3", why)


def check_batches(scene: Scene) -> Iterator[Clash]:
    """Preference rows are neither packed nor streamed, and KTO compares the rows of a batch."""
    spec = scene.spec
    if spec.method == "sft":
        return
    for name in ("packing", "padding_free", "streaming"):
        if getattr(spec.data, name):
            what = f"{name} is for sft; {spec.method} compares whole answers of rows that are all there"
            yield Clash((f"data.{name}", "method"), what, "remove the line")
    if spec.method != "kto" or "kto" not in list_losses(spec):
        return
    why = "the KL term is estimated from answers that belong to other rows of the batch"
    for path in (_BATCH, "evaluation.per_device_eval_batch_size"):
        section, _, name = path.partition(".")
        if getattr(getattr(spec, section), name) == 1:
            yield Clash((path, "method", _LOSS), "kto needs at least 2 rows in a batch", "write 2 or more", why)
    if spec.training.train_sampling_strategy != "random":
        what = "kto keeps its batches as they are from the start"
        yield Clash(("training.train_sampling_strategy", "method"), what, "remove the line", why)


def check_reference(scene: Scene) -> Iterator[Clash]:
    """The reference is there."""
    spec, wanted = scene.spec, scene.spec.preference.reference
    path = "preference.reference"
    if spec.method not in ("dpo", "kto") or wanted in ("auto", "base"):
        return
    if wanted == "adapter":
        if spec.model.adapter is None:
            fix = "name the adapter in model.adapter, or write reference: base"
            yield Clash((path, "model.adapter"), "there is no adapter that the run goes on with", fix)
    elif not any(_has_file(wanted, name) for name in (FILE, "config.json")):
        what = f"{printable(wanted)} is no folder of an adapter or a model"
        yield Clash((path,), what, "write base, adapter, or the folder that save_pretrained wrote")


def check_adapter(scene: Scene) -> Iterator[Clash]:
    """An adapter that is to be trained further is there, belongs to the model, and is what the plan says it is."""
    spec, folder = scene.spec, scene.spec.model.adapter
    path = "model.adapter"
    if folder is None:
        return
    try:
        config = read_adapter_config(folder)
    except ConfigError as error:
        yield Clash((path,), error.problems[0].what, error.problems[0].fix)
        return
    base, model = str(config.get("base_model_name_or_path") or ""), _find_name(spec.model.name)
    if base and model and Path(base).name != model:
        what = f"the adapter was trained on {printable(base)}, and model.name is {printable(spec.model.name)}"
        fix = f"name the adapter's base; if it only moved, change base_model_name_or_path in its {FILE}"
        yield Clash((path, "model.name"), what, fix, why="on other weights it means nothing")
    if spec.method == "reward":
        what = "a reward model starts with a new head, which this adapter does not have"
        yield Clash((path, "method"), what, "train it from the base model, or from a merged one")
    elif spec.lora is None:
        what = "an adapter is trained further and lora is off"
        yield Clash(("lora", path), what, "remove the line: the adapter's own values are taken")
    else:
        for name, had in list_lora_values(config).items():
            wanted = getattr(spec.lora, name)
            if wanted not in (had, "all-linear") and (not isinstance(wanted, list) or sorted(wanted) != had):
                what = f"{name} is {show(wanted)} here and {show(had)} in the adapter {printable(folder)}"
                yield Clash((f"lora.{name}", path), what, f"leave it out, or write {name}: {show(had)}")


def _find_name(model: str) -> str:
    """Returns the last part of what a model's name means, as folders move and mirrors have owners of their own."""
    try:
        return Path(locate_model(model)).name
    except (ForgeError, OSError, RuntimeError, ValueError):  # said where the model is looked up
        return ""


def _has_file(folder: str, name: str) -> bool:
    try:
        return (Path(folder).expanduser() / name).is_file()
    except (OSError, RuntimeError, ValueError):
        return False


def warn_about_preferences(spec: RunSpec) -> Iterator[str]:
    """Warns of a method that may change, and of adapter steps far from what is usual with preferences."""
    if spec.method in ("orpo", "cpo"):
        name = "simpo (method: cpo)" if "simpo" in list_losses(spec) else spec.method
        yield f"{name} is experimental in TRL{_find_version('trl')}: it may change or go with the next release"
    if spec.method == "sft" or spec.lora is None:
        return
    scale = spec.lora.lora_alpha / (spec.lora.r**0.5 if spec.lora.use_rslora else spec.lora.r)
    step, (least, most) = spec.training.learning_rate * scale, _USUAL_STEP
    if not least <= step <= most:
        yield (
            f"training.learning_rate x adapter scale is {show(step)}; usual with preferences is {show(least)} to "
            f"{show(most)}, so a learning_rate of {show(least / scale)} to {show(most / scale)} at this scale"
        )


def _find_version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f" {version(package)}"
    except PackageNotFoundError:
        return ""


PREFERENCE_RULES = (check_losses, check_batches, check_reference, check_adapter)
