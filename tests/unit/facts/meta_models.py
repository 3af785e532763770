"""Real models of transformers without storage, built from facts: what the formulas are held against."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from forge_cli.facts.families import FALCON_SEQUENTIAL, FALCON_TWO_NORMS
from forge_cli.facts.shape import ModelFacts
from forge_cli.facts.shelf import list_shelf

# Gemma 3's eyes, from 4 billion parameters on: https://huggingface.co/google/gemma-3-12b-it, config.json.
EYES = {
    "hidden_size": 1152,
    "image_size": 896,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "vision_use_head": False,
}

# One model of each family and variant on the shelf.
KINDS = list({(one.model_type, one.layout, bool(one.num_other_parameters)): one for one in list_shelf()}.values())


def build_config(facts: ModelFacts, num_layers: int | None = None):
    """Translates facts into the configuration of transformers."""
    layers = num_layers or facts.num_hidden_layers
    fields = {
        "hidden_size": facts.hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": facts.num_attention_heads,
        "num_key_value_heads": facts.num_key_value_heads,
        "head_dim": facts.head_dim,
        "intermediate_size": facts.intermediate_size,
        "vocab_size": facts.vocab_size,
        "tie_word_embeddings": facts.tie_word_embeddings,
        "sliding_window": facts.sliding_window,
        "pad_token_id": None,
    }
    if facts.max_position_embeddings:
        fields["max_position_embeddings"] = facts.max_position_embeddings
    if facts.num_local_experts:
        name = "num_experts" if facts.model_type == "qwen3_moe" else "num_local_experts"
        fields |= {name: facts.num_local_experts, "num_experts_per_tok": facts.num_experts_per_tok}
    if facts.moe_intermediate_size:
        fields["moe_intermediate_size"] = facts.moe_intermediate_size
    if facts.attention_bias is not None:
        fields["attention_bias"] = facts.attention_bias
    if facts.feed_forward_bias is not None:
        fields["mlp_bias"] = facts.feed_forward_bias
    if facts.model_type == "gpt2":
        fields |= {"n_inner": facts.intermediate_size, "n_positions": facts.max_position_embeddings}
    if facts.model_type == "falcon":
        del fields["head_dim"]
        fields |= {
            "ffn_hidden_size": facts.intermediate_size,
            "num_kv_heads": facts.num_key_value_heads,
            "new_decoder_architecture": facts.layout == FALCON_TWO_NORMS,
            "multi_query": facts.num_key_value_heads == 1,
            "parallel_attn": facts.layout != FALCON_SEQUENTIAL,
            "bias": bool(facts.attention_bias),
        }
    if facts.num_other_parameters:
        return CONFIG_MAPPING["gemma3"](text_config=fields | {"model_type": facts.model_type}, vision_config=EYES)
    return CONFIG_MAPPING[facts.model_type](**fields)


def build_model(facts: ModelFacts, num_layers: int | None = None, *, score_head: bool = False, **options):
    """Builds the model that ``from_pretrained`` would, on the meta device."""
    config = build_config(facts, num_layers)
    kind = AutoModelForSequenceClassification if score_head else AutoModelForCausalLM
    if score_head:
        config.num_labels = 1
    with torch.device("meta"):
        return kind.from_config(config, **options)
