"""How many weights a run trains: adapters, modules trained whole, and what freezing leaves."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from forge_cli.facts.families import find_family
from forge_cli.facts.parameter_count import list_linear_paths
from forge_cli.facts.shape import ModelFacts
from forge_cli.facts.weights import is_named, iterate_weights, layer_prefix, list_holders, list_outer_weights

if TYPE_CHECKING:
    from forge_cli.schema.adapter import FreezeSection, LoraSection


def count_trainable_parameters(
    facts: ModelFacts,
    lora: LoraSection | None = None,
    freeze: FreezeSection | None = None,
    num_frozen_layers: int = 0,
    *,
    score_head: bool = False,
) -> int | None:
    """Counts the weights that a run trains.

    Args:
        facts: Shape of the model.
        lora: Adapters; None trains the model itself.
        freeze: What stays frozen.
        num_frozen_layers: Decoder layers that ``freeze.first`` freezes.
        score_head: One score stands in place of the vocabulary, as for ``method: reward``.

    Returns:
        The count, or None for an architecture that Forge cannot count.

    Units: weights. Source: PEFT 0.21 for adapters, transformers 5.23 for the rest; frozen are the first layers, the
    input embeddings (and a head tied to them) and what the patterns match, as ``forge_cli.parts.freeze`` does it.
    """
    tensors = list_trained_tensors(facts, lora, freeze, num_frozen_layers, score_head=score_head)
    if tensors is None:
        return None
    # Eyes are loaded and may be trained, though text alone gives them no gradient.
    return sum(size * times for size, times in tensors.items()) + (facts.num_other_parameters if lora is None else 0)


def list_trained_tensors(
    facts: ModelFacts,
    lora: LoraSection | None = None,
    freeze: FreezeSection | None = None,
    num_frozen_layers: int = 0,
    *,
    score_head: bool = False,
) -> dict[int, int] | None:
    """Lists the sizes of the tensors that a run trains, and how many of each there are; eyes are left out.

    Args and source: as of :func:`count_trainable_parameters`.
    """
    if find_family(facts) is None or list_outer_weights(facts) is None:
        return None
    tensors: dict[int, int] = {}
    for _, size in iterate_trained_tensors(facts, lora, freeze, num_frozen_layers, score_head=score_head):
        tensors[size] = tensors.get(size, 0) + 1
    return tensors


def iterate_trained_tensors(
    facts: ModelFacts,
    lora: LoraSection | None = None,
    freeze: FreezeSection | None = None,
    num_frozen_layers: int = 0,
    *,
    score_head: bool = False,
) -> Iterator[tuple[str, int]]:
    """Yields the module and the size of every tensor that a run trains.

    Args and source: as of :func:`count_trainable_parameters`.
    """
    whole = [] if lora is None else lora.modules_to_save
    parts = _list_model(facts, score_head) if lora is None else _list_adapters(facts, lora, num_frozen_layers)
    for layer, module, size in parts:
        if not (layer is not None and layer < num_frozen_layers) and not _is_frozen(facts, module, freeze, whole):
            yield module, size
    if score_head and lora is not None:
        yield "score.modules_to_save.default", facts.hidden_size


def count_lora_parameters(facts: ModelFacts, lora: LoraSection, num_frozen_layers: int = 0) -> int | None:
    """Counts the weights that adapters add: those of the adapters, and copies of the modules that are trained whole.

    Units: weights. Source: PEFT 0.21; r x (inputs + outputs) for each linear layer with an adapter, with DoRA one more
    weight per output.
    """
    return count_trainable_parameters(facts, lora, None, num_frozen_layers)


def freezes_embeddings(freeze: FreezeSection | None, modules_to_save: list[str]) -> bool:
    """Whether the input embeddings are frozen; unless told, they are when layers are and nobody trains them whole."""
    if freeze is None:
        return False
    if freeze.embeddings is not None:
        return freeze.embeddings
    return freeze.first is not None and not any("embed" in name or name == "wte" for name in modules_to_save)


def _list_model(facts: ModelFacts, score_head: bool) -> Iterator[tuple[int | None, str, int]]:
    for layer, weight in iterate_weights(facts, score_head=score_head):
        yield layer, weight.module, weight.size


def _list_adapters(facts: ModelFacts, lora: LoraSection, num_frozen: int) -> Iterator[tuple[int | None, str, int]]:
    """Lists (layer, name, weights) of everything that PEFT adds and trains."""
    family, rank = find_family(facts), lora.r
    linear = list_linear_paths(facts) or []
    if family and family.router and lora.target_modules != "all-linear":
        # PEFT puts a named router's adapter on its weights, in all layers; experts it refuses.
        router = f"{family.feed_forward_block}.{family.router}"
        linear.append((router, facts.hidden_size, facts.num_local_experts or 0))
    for layer in range(num_frozen, facts.num_hidden_layers):
        prefix = layer_prefix(facts, layer)
        for name, inputs, outputs in linear:
            if _is_target(f"{prefix}.{name}", lora):
                yield from ((layer, *part) for part in _split_adapter(f"{prefix}.{name}", inputs, outputs, lora))
    for weight in list_outer_weights(facts._replace(tie_word_embeddings=False)) or []:
        if (
            weight.kind in ("head", "embedding")
            and lora.target_modules != "all-linear"
            and _is_target(weight.module, lora)
        ):
            vocabulary, hidden = weight.shape
            yield None, f"{weight.module}.lora_A.default", rank * (hidden if weight.kind == "head" else vocabulary)
            yield None, f"{weight.module}.lora_B.default", rank * (vocabulary if weight.kind == "head" else hidden)
            if lora.use_dora:  # one number per word for the head, per column for the embeddings
                magnitude = vocabulary if weight.kind == "head" else hidden
                yield None, f"{weight.module}.lora_magnitude_vector.default", magnitude
        if is_named(weight.module, lora.modules_to_save):
            yield None, f"{weight.module}.modules_to_save.default", weight.size


def _split_adapter(name: str, inputs: int, outputs: int, lora: LoraSection) -> list[tuple[str, int]]:
    parts = [(f"{name}.lora_A.default", lora.r * inputs), (f"{name}.lora_B.default", lora.r * outputs)]
    return parts + ([(f"{name}.lora_magnitude_vector.default", outputs)] if lora.use_dora else [])


def _is_target(module: str, lora: LoraSection) -> bool:
    return lora.target_modules == "all-linear" or is_named(module, lora.target_modules)


def _is_frozen(facts: ModelFacts, module: str, freeze: FreezeSection | None, whole: list[str]) -> bool:
    if freeze is None:
        return False
    family = find_family(facts)
    embedding = f"{family.body}.{family.embedding}" if family else ""
    is_embedding = module == embedding or module.startswith(f"{embedding}.")
    if is_embedding and freezes_embeddings(freeze, whole):
        return True
    names = list_holders(module)
    if module == embedding and facts.tie_word_embeddings:
        names.append("lm_head")
    return any(fnmatchcase(name, pattern) for pattern in freeze.patterns for name in names)
