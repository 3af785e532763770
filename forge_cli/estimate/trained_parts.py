"""Which parts of a model a plan trains, by the names of its modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from forge_cli.facts.families import find_family
from forge_cli.facts.trainable_count import iterate_trained_tensors
from forge_cli.facts.weights import layer_prefix, list_outer_weights

if TYPE_CHECKING:
    from forge_cli.facts.shape import ModelFacts
    from forge_cli.schema.runspec import RunSpec

# PEFT trains a copy of a module under this name.
_COPY = ".modules_to_save.default"


class TrainedParts(NamedTuple):
    """What a plan trains.

    Attributes:
        sizes: Sizes of the trained tensors, and how many of each there are.
        embedding_sizes: Those of them that are embeddings.
        embeddings_train: The input embeddings are trained, or their adapter is.
        embeddings_adapted: The input embeddings have an adapter that is trained.
        head_trains: The output layer is trained.
        num_skipped_layers: First decoder layers that run without autograd.
        frozen: Decoder layers, and modules, that are not trained though autograd may pass through them.
    """

    sizes: Mapping[int, int]
    embedding_sizes: Mapping[int, int]
    embeddings_train: bool
    embeddings_adapted: bool
    head_trains: bool
    num_skipped_layers: int
    frozen: frozenset[str]


def find_trained_parts(facts: ModelFacts, spec: RunSpec, num_frozen: int) -> TrainedParts | None:
    """Finds what a plan trains; ``None`` for an architecture that Forge does not know.

    Args:
        facts: Shape of the model.
        spec: The settings.
        num_frozen: Decoder layers that ``freeze.first`` freezes.

    Source: the names of ``forge_cli.facts.trainable_count``; layers run without autograd where nothing below them is
    trained, as ``forge_cli.parts.freeze`` decides it.
    """
    outer, family, has_score = list_outer_weights(facts), find_family(facts), spec.method == "reward"
    if outer is None or family is None:
        return None
    trained = list(iterate_trained_tensors(facts, spec.lora, spec.freeze, num_frozen, score_head=has_score))
    unfrozen = spec.freeze and iterate_trained_tensors(facts, spec.lora, None, num_frozen, score_head=has_score)
    names = {name.removesuffix(_COPY) for name, _ in trained}
    tables = {weight.module for weight in outer if weight.kind == "embedding"}
    embedding = f"{family.body}.{family.embedding}"
    adapted = any(name.startswith(f"{embedding}.") for name in names)
    embeddings_train = adapted or embedding in names
    tied = spec.lora is None and facts.tie_word_embeddings
    return TrainedParts(
        sizes=Counter(size for _, size in trained),
        embedding_sizes=Counter(size for name, size in trained if name.removesuffix(_COPY) in tables),
        embeddings_train=embeddings_train,
        embeddings_adapted=adapted,
        head_trains=embeddings_train if tied else "lm_head" in names,
        num_skipped_layers=0 if embeddings_train else num_frozen,
        frozen=frozenset(
            [name for name, _ in unfrozen or () if name.removesuffix(_COPY) not in names]
            + [layer_prefix(facts, index) for index in range(num_frozen)]
        ),
    )
