"""How many weights a model of a given shape has, by formula."""

from __future__ import annotations

from typing import NamedTuple

from forge_cli.facts.shape import ModelFacts


class _Family(NamedTuple):
    """How a family differs from Llama.

    Attributes:
        attention: Names of the attention's linear layers, in the order query, key, value, output; a fused layer
            stands once and ends in ``+``.
        feed_forward: Names of the feed-forward's linear layers; a fused layer ends in ``+``.
        qkv_bias: Query, key and value layers have a bias.
        other_bias: The output and feed-forward layers have a bias.
        norms: Norms of width hidden_size per layer.
        norm_bias: The norms have a bias.
        qk_norm: Norm on queries and keys: ``head`` (one head wide), ``all`` (all heads wide) or empty.
        learned_positions: Positions are a learned table.
        head_bias: The output layer has a bias.
        experts: ``""`` for dense, ``plain`` or ``biased`` (gpt-oss: biases and attention sinks).
    """

    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    feed_forward: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    qkv_bias: bool = False
    other_bias: bool = False
    norms: int = 2
    norm_bias: bool = False
    qk_norm: str = ""
    learned_positions: bool = False
    head_bias: bool = False
    experts: str = ""


_LLAMA = _Family()
FAMILIES: dict[str, _Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "smollm3": _LLAMA,
    "gemma": _LLAMA,
    "phi3": _Family(attention=("qkv_proj+", "o_proj"), feed_forward=("gate_up_proj+", "down_proj")),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(qk_norm="head"),
    "olmo2": _Family(qk_norm="all"),
    "gemma2": _Family(norms=4),
    "gemma3_text": _Family(norms=4, qk_norm="head"),
    "phi": _Family(
        attention=("q_proj", "k_proj", "v_proj", "dense"),
        feed_forward=("fc1", "fc2"),
        qkv_bias=True,
        other_bias=True,
        norms=1,
        norm_bias=True,
        head_bias=True,
    ),
    "gpt2": _Family(
        attention=("c_attn+", "c_proj"),
        feed_forward=("c_fc", "c_proj"),
        qkv_bias=True,
        other_bias=True,
        norm_bias=True,
        learned_positions=True,
    ),
    "gpt_neox": _Family(
        attention=("query_key_value+", "dense"),
        feed_forward=("dense_h_to_4h", "dense_4h_to_h"),
        qkv_bias=True,
        other_bias=True,
        norm_bias=True,
    ),
    "falcon": _Family(
        attention=("query_key_value+", "dense"),
        feed_forward=("dense_h_to_4h", "dense_4h_to_h"),
        norms=1,
        norm_bias=True,
    ),
    "mixtral": _Family(feed_forward=(), experts="plain"),
    "qwen3_moe": _Family(feed_forward=(), qk_norm="head", experts="plain"),
    "gpt_oss": _Family(feed_forward=(), qkv_bias=True, other_bias=True, experts="biased"),
}


def linear_modules(facts: ModelFacts) -> list[tuple[str, int, int]] | None:
    """Lists the linear layers of one decoder layer as (name, inputs, outputs); None for an unknown family.

    Experts are not in it: transformers keeps them as one three-dimensional tensor, not as linear layers.

    Source: module names of transformers 5.23's modelling code.
    """
    family = FAMILIES.get(facts.model_type)
    if family is None:
        return None
    hidden, feed_forward = facts.hidden_size, facts.intermediate_size
    queries, keys = _attention_widths(facts)
    *inputs, output = family.attention
    widths = (queries + 2 * keys,) if len(inputs) == 1 else (queries, keys, keys)
    modules = [(name.rstrip("+"), hidden, width) for name, width in zip(inputs, widths, strict=True)]
    modules.append((output, queries, hidden))
    if family.feed_forward:
        *rising, falling = family.feed_forward
        modules += [(n.rstrip("+"), hidden, feed_forward * (2 if n.endswith("+") else 1)) for n in rising]
        modules.append((falling, feed_forward, hidden))
    return modules


def count_linear_parameters(facts: ModelFacts) -> int | None:
    """Counts the weights (without biases) of the linear layers of all decoder layers.

    Units: weights. Source: the sum of inputs x outputs over ``linear_modules``, times the layers.
    """
    modules = linear_modules(facts)
    return None if modules is None else facts.num_hidden_layers * sum(i * o for _, i, o in modules)


def count_layer_parameters(facts: ModelFacts) -> int | None:
    """Counts all weights of one decoder layer.

    Units: weights. Source: the modelling code of transformers 5.23, term by term.
    """
    family = FAMILIES.get(facts.model_type)
    modules = linear_modules(facts)
    if family is None or modules is None:
        return None
    queries, keys = _attention_widths(facts)
    count = sum(inputs * outputs for _, inputs, outputs in modules)
    attention_inputs = len(family.attention) - 1
    if family.qkv_bias:
        count += sum(outputs for _, _, outputs in modules[:attention_inputs])
    if family.other_bias:
        count += sum(outputs for _, _, outputs in modules[attention_inputs:])
    count += facts.hidden_size * family.norms * (2 if family.norm_bias else 1)
    count += {"": 0, "head": 2 * facts.head_dim, "all": queries + keys}[family.qk_norm]
    return count + _count_expert_parameters(facts, family)


def count_embedding_parameters(facts: ModelFacts) -> int:
    """Counts the input embeddings, without positions. Units: weights. Source: vocab_size x hidden_size."""
    return facts.vocab_size * facts.hidden_size


def count_parameters(facts: ModelFacts) -> int | None:
    """Counts all weights of the model, tied ones once; None for an unknown family.

    Units: weights. Source: the modelling code of transformers 5.23; the tests compare the result with models
    built on the meta device.
    """
    family = FAMILIES.get(facts.model_type)
    layer = count_layer_parameters(facts)
    if family is None or layer is None:
        return None
    count = facts.num_hidden_layers * layer + count_embedding_parameters(facts)
    count += facts.hidden_size * (2 if family.norm_bias else 1)
    if not facts.tie_word_embeddings:
        count += count_embedding_parameters(facts)
    if family.head_bias:
        count += facts.vocab_size
    if family.learned_positions:
        if facts.max_position_embeddings is None:
            return None
        count += facts.max_position_embeddings * facts.hidden_size
    return count


def _attention_widths(facts: ModelFacts) -> tuple[int, int]:
    return facts.num_attention_heads * facts.head_dim, facts.num_key_value_heads * facts.head_dim


def _count_expert_parameters(facts: ModelFacts, family: _Family) -> int:
    """Counts router and experts of one layer: three matrices an expert; gpt-oss adds biases and attention sinks."""
    if not family.experts or facts.num_local_experts is None:
        return 0
    hidden, experts = facts.hidden_size, facts.num_local_experts
    width = facts.moe_intermediate_size or facts.intermediate_size
    count = experts * (3 * hidden * width + hidden)
    if family.experts == "biased":
        count += experts * (2 * width + hidden + 1) + facts.num_attention_heads
    return count
