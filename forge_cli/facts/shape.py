"""The shape of one decoder model."""

from __future__ import annotations

from typing import NamedTuple


class ModelFacts(NamedTuple):
    """What is known of a model without its weights, under the names of transformers' ``config.json``.

    Attributes:
        name: What the user wrote.
        hub_id: ``org/name`` on the hub; None for a folder.
        path: Local folder as text; None for a hub model.
        model_type: Architecture (``llama``, ``qwen2``, ...).
        hidden_size: Width of the residual stream.
        num_hidden_layers: Decoder layers.
        num_attention_heads: Query heads.
        num_key_value_heads: Key and value heads.
        head_dim: Width of one head.
        intermediate_size: Width of the feed-forward layer (of one expert, if ``moe_intermediate_size`` is None).
        vocab_size: Rows of the embedding matrix.
        tie_word_embeddings: Whether the output layer is the embedding matrix.
        max_position_embeddings: Longest sequence in tokens; None if not known.
        num_parameters: All weights, tied ones once; None for an architecture that Forge cannot count.
        num_local_experts: Experts per layer; None for a dense model.
        num_experts_per_tok: Experts that each token visits.
        moe_intermediate_size: Width of one expert where it differs from ``intermediate_size``.
        sliding_window: Tokens that a layer with a window attends to; None without windows.
        attention_bias: Whether the attention's linear layers have biases; None leaves it to the family.
        feed_forward_bias: The same of the feed-forward's.
        layout: Name of a variant of the family (``forge_cli.facts.families``); empty for the usual one.
        num_other_parameters: Weights that are no part of the language model but are loaded with it (eyes).
        num_other_linear_parameters: Those of them in linear layers, without biases.
        source: Where these facts come from.
    """

    name: str
    hub_id: str | None
    path: str | None
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool
    max_position_embeddings: int | None = None
    num_parameters: int | None = None
    num_local_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    sliding_window: int | None = None
    attention_bias: bool | None = None
    feed_forward_bias: bool | None = None
    layout: str = ""
    num_other_parameters: int = 0
    num_other_linear_parameters: int = 0
    source: str = ""
