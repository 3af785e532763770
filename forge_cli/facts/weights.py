"""Every weight of a model by name and shape, from its facts alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import NamedTuple

from forge_cli.facts.families import Family, find_family
from forge_cli.facts.shape import ModelFacts


class Weight(NamedTuple):
    """One tensor of weights.

    Attributes:
        module: Dotted name of the module that holds it.
        name: Its own name in the module.
        shape: As torch shows it.
        kind: ``linear``, ``embedding``, ``head``, ``experts``, ``router`` (matrices that are multiplied), ``norm``
            or ``bias`` (the rest).
    """

    module: str
    name: str
    shape: tuple[int, ...]
    kind: str

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def list_layer_weights(facts: ModelFacts) -> list[Weight] | None:
    """Lists the weights of one decoder layer, named from the layer; None for an unknown family.

    Source: the modelling code of transformers 5.23; the tests compare names and shapes with built models.
    """
    family = find_family(facts)
    if family is None:
        return None
    hidden, queries, keys = facts.hidden_size, *attention_widths(facts)
    weights = _list_linear(facts, family)
    weights += [Weight(name, "weight", (hidden,), "norm") for name in family.norms]
    if family.norm_bias:
        weights += [Weight(name, "bias", (hidden,), "bias") for name in family.norms]
    if family.qk_norm:
        widths = (facts.head_dim, facts.head_dim) if family.qk_norm == "head" else (queries, keys)
        for name, width in zip(("q_norm", "k_norm"), widths, strict=True):
            weights.append(Weight(f"{family.attention_block}.{name}", "weight", (width,), "norm"))
    return weights + (_list_experts(facts, family) if family.router else [])


def list_outer_weights(facts: ModelFacts, *, score_head: bool = False) -> list[Weight] | None:
    """Lists the weights outside the decoder layers; None for an unknown family. A tied head is not listed twice.

    Args:
        facts: Shape of the model.
        score_head: One score stands in place of the vocabulary, as for ``method: reward``.
    """
    family = find_family(facts)
    if family is None:
        return None
    hidden, vocabulary, body = facts.hidden_size, facts.vocab_size, family.body
    weights = [Weight(f"{body}.{family.embedding}", "weight", (vocabulary, hidden), "embedding")]
    if family.positions:
        if facts.max_position_embeddings is None:
            return None
        weights.append(
            Weight(f"{body}.{family.positions}", "weight", (facts.max_position_embeddings, hidden), "embedding")
        )
    weights.append(Weight(f"{body}.{family.final_norm}", "weight", (hidden,), "norm"))
    if family.norm_bias:
        weights.append(Weight(f"{body}.{family.final_norm}", "bias", (hidden,), "bias"))
    if score_head:
        return [*weights, Weight("score", "weight", (1, hidden), "head")]
    if not facts.tie_word_embeddings:
        weights.append(Weight("lm_head", "weight", (vocabulary, hidden), "head"))
    if family.head_bias:
        weights.append(Weight("lm_head", "bias", (vocabulary,), "bias"))
    return weights


def layer_prefix(facts: ModelFacts, index: int) -> str:
    """Returns what stands before the names in a decoder layer, such as ``model.layers.3``."""
    family = find_family(facts) or Family()
    return f"{family.body}.{family.layers}.{index}"


def iterate_weights(facts: ModelFacts, *, score_head: bool = False) -> Iterator[tuple[int | None, Weight]]:
    """Yields every weight with its full name and the number of its layer, None outside the layers."""
    layer = list_layer_weights(facts) or []
    for weight in list_outer_weights(facts, score_head=score_head) or []:
        yield None, weight
    for index in range(facts.num_hidden_layers):
        prefix = layer_prefix(facts, index)
        for weight in layer:
            yield index, weight._replace(module=f"{prefix}.{weight.module}")


def is_named(module: str, names: Collection[str]) -> bool:
    """Whether PEFT takes a module, by its dotted name, for one of the names: the whole of it or its end."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def list_holders(module: str) -> list[str]:
    """Lists the names that a pattern may hit a module by: those of all modules it is in, and its own."""
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def attention_widths(facts: ModelFacts) -> tuple[int, int]:
    """Returns the widths of all query heads and of all key heads."""
    return facts.num_attention_heads * facts.head_dim, facts.num_key_value_heads * facts.head_dim


def _list_linear(facts: ModelFacts, family: Family) -> list[Weight]:
    hidden, wide = facts.hidden_size, facts.intermediate_size
    queries, keys = attention_widths(facts)
    block = family.attention_block
    *entries, output = family.attention
    widths = (queries + 2 * keys,) if len(entries) == 1 else (queries, keys, keys)
    found = [(f"{block}.{n}", hidden, w, family.qkv_bias) for n, w in zip(entries, widths, strict=True)]
    found.append((f"{block}.{output}", queries, hidden, family.output_bias))
    if family.feed_forward:
        block = family.feed_forward_block
        *rising, falling = family.feed_forward
        for name in rising:
            found.append((f"{block}.{name}", hidden, wide * (1 + name.endswith("+")), family.feed_forward_bias))
        found.append((f"{block}.{falling}", wide, hidden, family.feed_forward_bias))
    weights = []
    for name, inputs, outputs, has_bias in found:
        shape = (inputs, outputs) if family.transposed else (outputs, inputs)
        weights.append(Weight(name.rstrip("+"), "weight", shape, "linear"))
        if has_bias:
            weights.append(Weight(name.rstrip("+"), "bias", (outputs,), "bias"))
    return weights


def _list_experts(facts: ModelFacts, family: Family) -> list[Weight]:
    """Lists router and experts: transformers 5 keeps all experts of a layer in two three-dimensional tensors."""
    hidden, experts = facts.hidden_size, facts.num_local_experts or 0
    width = facts.moe_intermediate_size or facts.intermediate_size
    router, block = f"{family.feed_forward_block}.{family.router}", f"{family.feed_forward_block}.experts"
    rising, falling = (experts, 2 * width, hidden), (experts, hidden, width)
    if family.biased_experts:  # gpt-oss holds them inputs x outputs
        rising, falling = (experts, hidden, 2 * width), (experts, width, hidden)
    weights = [
        Weight(router, "weight", (experts, hidden), "router"),
        Weight(block, "gate_up_proj", rising, "experts"),
        Weight(block, "down_proj", falling, "experts"),
    ]
    if family.biased_experts:
        weights += [
            Weight(router, "bias", (experts,), "bias"),
            Weight(block, "gate_up_proj_bias", (experts, 2 * width), "bias"),
            Weight(block, "down_proj_bias", (experts, hidden), "bias"),
            Weight(family.attention_block, "sinks", (facts.num_attention_heads,), "bias"),
        ]
    return weights
