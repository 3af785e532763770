"""How the architectures that Forge counts differ from Llama: names and kinds of their weights."""

from __future__ import annotations

from typing import NamedTuple

from forge_cli.facts.shape import ModelFacts


class Family(NamedTuple):
    """How a family differs from Llama.

    Attributes:
        attention: Names of the attention's linear layers, in the order query, key, value, output; a fused layer
            stands once and ends in ``+``.
        feed_forward: Names of the feed-forward's linear layers, the falling one last; a fused layer ends in ``+``.
            Empty where experts stand in their place.
        attention_block: Name of the attention in a layer.
        feed_forward_block: Name of the feed-forward in a layer.
        norms: Names of the norms of width hidden_size in a layer, in the order of the model.
        norm_bias: The norms have a bias.
        qk_norm: Norm on queries and keys: ``head`` (one head wide), ``all`` (all heads wide) or empty.
        qkv_bias: Query, key and value layers have a bias.
        output_bias: The attention's output layer has a bias.
        feed_forward_bias: The feed-forward's layers have a bias.
        parallel: The feed-forward reads what the attention reads, not its result.
        body: Name of the model without its head.
        layers: Name of the list of layers in it.
        embedding: Name of the input embeddings in it.
        positions: Name of a learned table of positions in it; empty without one.
        final_norm: Name of the last norm in it.
        head_bias: The output layer has a bias.
        router: Name of the router in the feed-forward; empty without experts.
        biased_experts: Router and experts have biases, and the attention has sinks (gpt-oss).
        transposed: Linear layers hold inputs x outputs (GPT-2's ``Conv1D``).
        own_linear: Linear layers are a subclass of ``nn.Linear``, which bitsandbytes' conversion passes over.
        has_sdpa: transformers offers torch's fused attention for it.
        full_attention_every: Every how many layers one attends to everything, where the others have a window; 1
            where all layers are alike.
    """

    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    feed_forward: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    attention_block: str = "self_attn"
    feed_forward_block: str = "mlp"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_bias: bool = False
    qk_norm: str = ""
    qkv_bias: bool = False
    output_bias: bool = False
    feed_forward_bias: bool = False
    parallel: bool = False
    body: str = "model"
    layers: str = "layers"
    embedding: str = "embed_tokens"
    positions: str = ""
    final_norm: str = "norm"
    head_bias: bool = False
    router: str = ""
    biased_experts: bool = False
    transposed: bool = False
    own_linear: bool = False
    has_sdpa: bool = True
    full_attention_every: int = 1


_LLAMA = Family()
_GEMMA_NORMS = (*_LLAMA.norms, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_OLMO_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_FALCON = Family(
    attention=("query_key_value+", "dense"),
    feed_forward=("dense_h_to_4h", "dense_4h_to_h"),
    attention_block="self_attention",
    norms=("input_layernorm",),
    norm_bias=True,
    parallel=True,
    body="transformer",
    layers="h",
    embedding="word_embeddings",
    final_norm="ln_f",
    own_linear=True,
)
# Falcon comes in three kinds, told apart by settings of its configuration; `falcon` alone is that of Falcon-7B.
FALCON_TWO_NORMS, FALCON_SEQUENTIAL = "falcon (two norms)", "falcon (sequential)"

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral3": _LLAMA,
    "granite": _LLAMA,
    "smollm3": _LLAMA,
    "gemma": _LLAMA,
    "phi3": Family(attention=("qkv_proj+", "o_proj"), feed_forward=("gate_up_proj+", "down_proj")),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm="head"),
    "olmo2": Family(qk_norm="all", norms=_OLMO_NORMS),
    "olmo3": Family(qk_norm="all", norms=_OLMO_NORMS, full_attention_every=4),
    "gemma2": Family(norms=_GEMMA_NORMS, has_sdpa=False, full_attention_every=2),
    "gemma3_text": Family(norms=_GEMMA_NORMS, qk_norm="head", full_attention_every=6),
    "phi": Family(
        attention=("q_proj", "k_proj", "v_proj", "dense"),
        feed_forward=("fc1", "fc2"),
        norms=("input_layernorm",),
        norm_bias=True,
        qkv_bias=True,
        output_bias=True,
        feed_forward_bias=True,
        parallel=True,
        final_norm="final_layernorm",
        head_bias=True,
    ),
    "gpt2": Family(
        attention=("c_attn+", "c_proj"),
        feed_forward=("c_fc", "c_proj"),
        attention_block="attn",
        norms=("ln_1", "ln_2"),
        norm_bias=True,
        qkv_bias=True,
        output_bias=True,
        feed_forward_bias=True,
        body="transformer",
        layers="h",
        embedding="wte",
        positions="wpe",
        final_norm="ln_f",
        transposed=True,
    ),
    "gpt_neox": Family(
        attention=("query_key_value+", "dense"),
        feed_forward=("dense_h_to_4h", "dense_4h_to_h"),
        attention_block="attention",
        norm_bias=True,
        qkv_bias=True,
        output_bias=True,
        feed_forward_bias=True,
        parallel=True,
        body="gpt_neox",
        embedding="embed_in",
        final_norm="final_layer_norm",
    ),
    "falcon": _FALCON,
    FALCON_TWO_NORMS: _FALCON._replace(norms=("ln_attn", "ln_mlp")),
    FALCON_SEQUENTIAL: _FALCON._replace(norms=_LLAMA.norms, parallel=False),
    "mixtral": Family(feed_forward=(), router="gate"),
    "qwen3_moe": Family(feed_forward=(), qk_norm="head", router="gate"),
    "gpt_oss": Family(
        feed_forward=(),
        qkv_bias=True,
        output_bias=True,
        router="router",
        biased_experts=True,
        has_sdpa=False,
        full_attention_every=2,
    ),
}


def find_family(facts: ModelFacts) -> Family | None:
    """Returns the family of a model with its own settings applied; None if Forge cannot count it by formula."""
    family = FAMILIES.get(facts.layout or facts.model_type)
    if family is None:
        return None
    if facts.attention_bias is not None:
        family = family._replace(qkv_bias=facts.attention_bias, output_bias=facts.attention_bias)
    if facts.feed_forward_bias is not None:
        family = family._replace(feed_forward_bias=facts.feed_forward_bias)
    if facts.num_other_parameters:
        # A model with eyes: its decoder lies one level deeper.
        family = family._replace(body=f"{family.body}.language_model")
    return family
