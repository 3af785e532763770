"""Contradictions about weights: quantisation, LoRA, freezing, number formats."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from forge_cli.facts.families import find_family
from forge_cli.facts.layer_count import count_frozen_layers, read_share
from forge_cli.facts.weights import is_named, iterate_weights, list_holders
from forge_cli.resolve.scene import Clash, Scene
from forge_cli.resolve.wording import printable, show

_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in")


def refuse_quantised_training(scene: Scene) -> Iterator[Clash]:
    """Quantised weights cannot be trained, only adapters on top of them."""
    spec = scene.spec
    if spec.quantization is not None and spec.lora is None:
        what = f"{spec.quantization.bits}-bit weights cannot be trained, and there are no adapters"
        fix = "add lora: {}, or write quantization: null"
        yield Clash(("quantization", "lora", "quantization.bits"), what, fix)


def check_freeze(scene: Scene) -> Iterator[Clash]:
    """A freeze section freezes something, and leaves something."""
    freeze, facts = scene.spec.freeze, scene.facts
    if freeze is None:
        return
    if freeze.first is None and not freeze.embeddings and not freeze.patterns:
        yield Clash(
            ("freeze", "freeze.first", "freeze.embeddings", "freeze.patterns"),
            "the freeze section freezes nothing",
            'write first: "50%" below it, or freeze: null',
        )
    if "*" in freeze.patterns:
        yield Clash(("freeze.patterns",), 'the pattern "*" freezes the whole model', "name the modules to freeze")
    if freeze.first is None:
        return
    if (fault := _find_fault_in_first(freeze.first)) is not None:
        yield Clash(("freeze.first",), fault, 'write a count (16) or a share ("50%")')
    elif facts is not None:
        yield from _check_frozen_count(freeze.first, facts.num_hidden_layers)


def _find_fault_in_first(first: int | str) -> str | None:
    """Says what is wrong with ``freeze.first`` itself; ``None`` if nothing is."""
    if isinstance(first, int):
        return None if first >= 1 else f"{first} layers cannot be frozen; the least is 1"
    if read_share(first) is not None:
        return None
    if first.endswith("%"):
        return f"{show(first)} is not a share between 0% and 100%; 100% would leave no layer to train"
    return f"{show(first)} is neither a count nor a share"


def _check_frozen_count(first: int | str, num_layers: int) -> Iterator[Clash]:
    paths = ("freeze.first", "model.name")
    frozen = count_frozen_layers(first, num_layers)
    if isinstance(first, int) and first > num_layers:
        yield Clash(
            paths, f"{first} layers to freeze, but the model has {num_layers}", f"write at most {num_layers - 1}"
        )
    elif frozen >= num_layers:
        what = f"all {num_layers} layers of the model are frozen; nothing is left to train"
        yield Clash(paths, what, f"write at most {num_layers - 1}")
    elif frozen == 0:
        yield Clash(paths, f"{first} of {num_layers} layers is less than one layer", "freeze more, or write a count")


def check_frozen_patterns(scene: Scene) -> Iterator[Clash]:
    """Every pattern matches a module of the model; judged where Forge knows all of them."""
    freeze, facts = scene.spec.freeze, scene.facts
    if freeze is None or facts is None or facts.num_other_parameters or find_family(facts) is None:
        return
    # What adapters bring along has names of its own.
    patterns = [one for one in freeze.patterns if not any(part in one for part in ("lora_", "base_", "modules_to_"))]
    names = {"lm_head": None, "score": None}
    for _, weight in iterate_weights(facts) if patterns else ():
        names |= dict.fromkeys(list_holders(weight.module))
    strangers = [one for one in patterns if not any(fnmatchcase(name, one) for name in names)]
    if strangers:
        longest = max(names, key=lambda name: name.count("."))
        what = f"{', '.join(map(printable, strangers))} matches no module of {printable(scene.spec.model.name)}"
        fix = f"names of modules look like {longest}; * stands for any text"
        yield Clash(("freeze.patterns", "model.name"), what, fix, why="a pattern that matches nothing freezes nothing")


def check_frozen_embeddings(scene: Scene) -> Iterator[Clash]:
    """With LoRA the embeddings are frozen anyway, unless they are among ``modules_to_save``."""
    freeze, lora = scene.spec.freeze, scene.spec.lora
    if freeze is None or lora is None or freeze.embeddings is None:
        return
    paths = ("freeze.embeddings", "lora", "lora.modules_to_save")
    trained = [name for name in lora.modules_to_save if name.rpartition(".")[2] in _EMBEDDINGS]
    if freeze.embeddings and trained:
        what = f"the embeddings are frozen here and trained by lora.modules_to_save ({', '.join(trained)})"
        yield Clash(paths, what, "keep one of them")
    elif not trained:
        fix = "remove the line" if freeze.embeddings else "to train them, write lora: {modules_to_save: [embed_tokens]}"
        yield Clash(paths, "has no effect: with lora the embeddings are frozen anyway", fix)


def check_lora_targets(scene: Scene) -> Iterator[Clash]:
    """The target list names something, and nothing that adapters do not reach."""
    lora = scene.spec.lora
    if lora is None or isinstance(lora.target_modules, str):
        return
    paths = ("lora.target_modules",)
    if not lora.target_modules:
        yield Clash(paths, "the list is empty, so nothing gets an adapter", "write all-linear, or name the layers")
    if any(name.rpartition(".")[2] == "lm_head" for name in lora.target_modules):
        yield Clash(
            paths,
            "lm_head cannot carry an adapter",
            "remove it; to train it whole, write lora: {modules_to_save: [lm_head]}",
            why="the fused loss multiplies with lm_head's own weight and would skip the adapter",
        )
    both = sorted(set(lora.target_modules) & set(lora.modules_to_save))
    if both:
        what = f"{', '.join(both)} would be trained whole and carry an adapter too"
        yield Clash((*paths, "lora.modules_to_save"), what, "name each module in one of the lists")


def check_target_names(scene: Scene) -> Iterator[Clash]:
    """Every name stands for a module of the model; judged where Forge knows all of them."""
    lora, facts = scene.spec.lora, scene.facts
    if lora is None or facts is None or facts.num_other_parameters or find_family(facts) is None:
        return
    modules = {weight.module: weight.kind for _, weight in iterate_weights(facts) if weight.kind != "norm"}
    targets = [] if isinstance(lora.target_modules, str) else lora.target_modules
    for path, names in (("lora.target_modules", targets), ("lora.modules_to_save", lora.modules_to_save)):
        strangers = [name for name in names if not any(is_named(module, [name]) for module in (*modules, "lm_head"))]
        if strangers:
            known = dict.fromkeys(one.rpartition(".")[2] for one, kind in modules.items() if kind == "linear")
            if path == "lora.modules_to_save":
                known = {"embed_tokens": None, "lm_head": None}
            what = f"{', '.join(map(printable, strangers))} matches no module of {printable(scene.spec.model.name)}"
            fix = f"this model has {', '.join(known)}"
            yield Clash((path, "model.name"), what, fix, why="what is placed nowhere trains nothing")


def check_lora_start(scene: Scene) -> Iterator[Clash]:
    """An orthogonal start splits the rank in two halves."""
    lora = scene.spec.lora
    if lora is not None and lora.init_lora_weights == "orthogonal" and lora.r % 2:
        what = f"an orthogonal start needs an even rank; r is {lora.r}"
        yield Clash(("lora.init_lora_weights", "lora.r"), what, f"write r: {lora.r + 1}, or another start")


def check_number_formats(scene: Scene) -> Iterator[Clash]:
    """Weights that are trained keep their small updates only in float32 or bfloat16."""
    spec = scene.spec
    dtype, precision = spec.model.dtype, spec.training.precision
    if precision == "fp32" and dtype in ("bfloat16", "float16"):
        what = f"fp32 computation with {dtype} weights, which would be computed in {dtype}"
        yield Clash(("training.precision", "model.dtype"), what, "write precision: auto, or model.dtype: float32")
    if spec.lora is not None:
        return
    if dtype == "float16":
        what = "float16 weights cannot be trained"
        what += " with fp16 mixed precision: it needs float32 weights" if precision == "fp16" else ""
        why = "updates smaller than a float16 step are lost, and gradients overflow"
        paths = ("model.dtype", "lora", "training.precision")
        yield Clash(paths, what, "write model.dtype: auto (float32 weights), or bfloat16, or add lora: {}", why)
    elif dtype == "bfloat16" and precision == "fp16":
        what = "bfloat16 weights with fp16 mixed precision"
        fix = "write precision: bf16, or model.dtype: auto"
        yield Clash(
            ("training.precision", "model.dtype", "lora"), what, fix, why="the loss scaler works on float32 weights"
        )


WEIGHT_RULES = (
    refuse_quantised_training,
    check_freeze,
    check_frozen_patterns,
    check_frozen_embeddings,
    check_lora_targets,
    check_target_names,
    check_lora_start,
    check_number_formats,
)
