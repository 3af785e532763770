"""How many weights a model of a given shape has, by formula."""

from __future__ import annotations

from forge_cli.facts.families import find_family
from forge_cli.facts.shape import ModelFacts
from forge_cli.facts.weights import list_layer_weights, list_outer_weights


def linear_modules(facts: ModelFacts) -> list[tuple[str, int, int]] | None:
    """Lists the linear layers of one decoder layer as (name, inputs, outputs); None for an unknown family.

    Experts are not in it: transformers keeps them as one three-dimensional tensor, not as linear layers.

    Source: module names of transformers 5.23's modelling code.
    """
    found = list_linear_paths(facts)
    return None if found is None else [(path.rsplit(".", 1)[-1], inputs, outputs) for path, inputs, outputs in found]


def list_linear_paths(facts: ModelFacts) -> list[tuple[str, int, int]] | None:
    """Lists the linear layers of one decoder layer as (dotted name in the layer, inputs, outputs).

    Source: module names of transformers 5.23's modelling code.
    """
    family, weights = find_family(facts), list_layer_weights(facts)
    if family is None or weights is None:
        return None
    return [
        (weight.module, *(weight.shape if family.transposed else reversed(weight.shape)))
        for weight in weights
        if weight.kind == "linear"
    ]


def count_linear_parameters(facts: ModelFacts) -> int | None:
    """Counts the weights (without biases) of the linear layers of all decoder layers.

    Units: weights. Source: the sum of inputs x outputs over ``linear_modules``, times the layers.
    """
    modules = list_linear_paths(facts)
    return None if modules is None else facts.num_hidden_layers * sum(i * o for _, i, o in modules)


def count_quantized_parameters(facts: ModelFacts) -> int | None:
    """Counts the weights that bitsandbytes packs: linear layers, but neither embeddings, head, router nor experts.

    Falcon has none: its linear layers are a class of its own, which the conversion passes over.

    Units: weights. Source: transformers 5.23, ``get_keys_to_not_convert`` (the head, tied weights, the last module)
    and ``replace_with_bnb_linear`` (only modules of exactly the type ``nn.Linear``, and GPT-2's ``Conv1D``).
    """
    family, count = find_family(facts), count_linear_parameters(facts)
    if family is None or count is None:
        return None
    return 0 if family.own_linear else count + facts.num_other_linear_parameters


def count_layer_parameters(facts: ModelFacts) -> int | None:
    """Counts all weights of one decoder layer.

    Units: weights. Source: the modelling code of transformers 5.23, tensor by tensor (``list_layer_weights``).
    """
    weights = list_layer_weights(facts)
    return None if weights is None else sum(weight.size for weight in weights)


def count_embedding_parameters(facts: ModelFacts) -> int:
    """Counts the input embeddings, without positions. Units: weights. Source: vocab_size x hidden_size."""
    return facts.vocab_size * facts.hidden_size


def count_parameters(facts: ModelFacts, *, score_head: bool = False) -> int | None:
    """Counts all weights of the model, tied ones once; None for an unknown family.

    Args:
        facts: Shape of the model.
        score_head: One score stands in place of the vocabulary, as for ``method: reward``.

    Units: weights. Source: the modelling code of transformers 5.23; the tests compare the result with models
    built on the meta device.
    """
    layer = count_layer_parameters(facts)
    outer = list_outer_weights(facts, score_head=score_head)
    if layer is None or outer is None:
        return None
    return facts.num_hidden_layers * layer + sum(weight.size for weight in outer) + facts.num_other_parameters
