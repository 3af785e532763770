"""The memory of a plan, from its settings and the model's shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forge_cli.estimate.memory import LayerShape, MemoryEstimate, estimate_memory, estimate_weights_bytes
from forge_cli.facts.parameter_count import count_embedding_parameters, count_linear_parameters, linear_modules

if TYPE_CHECKING:
    from forge_cli.facts.shape import ModelFacts
    from forge_cli.resolve.plan import Plan
    from forge_cli.schema.adapter import LoraSection
    from forge_cli.schema.runspec import RunSpec

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp32": 4, "bf16": 2, "fp16": 2}


def estimate_from_plan(plan: Plan) -> MemoryEstimate | None:
    """Estimates the peak of one training step of a plan.

    Rows are taken at full length (``data.max_length``). ``training.precision: auto`` is taken as 16 bit, as on a GPU.

    Returns:
        Bytes by component, or None when the model's shape or number of weights is not known before it is loaded.
    """
    spec, facts = plan.spec, plan.facts
    if facts is None or facts.num_parameters is None or plan.derived.num_frozen_layers is None:
        return None
    num_frozen = plan.derived.num_frozen_layers
    num_trainable = _count_trainable(spec, facts, num_frozen)
    if num_trainable is None:
        return None
    compute_bytes = _BYTES.get(spec.training.precision, 2)
    embeddings_train = spec.lora is None and not _freezes_embeddings(spec)
    num_adapter = num_trainable if spec.lora else 0
    return estimate_memory(
        weights_bytes=_estimate_weights(spec, facts, compute_bytes)
        + 4 * num_adapter
        + _estimate_reference(facts, spec, compute_bytes),
        num_trainable_parameters=num_trainable,
        layer=layer_shape(facts),
        num_layers=facts.num_hidden_layers,
        vocab_size=facts.vocab_size,
        # A row of preferences is two sequences: chosen and rejected, or an answer and one to compare it with.
        batch_size=spec.training.per_device_train_batch_size * (1 if spec.method == "sft" else 2),
        sequence_length=spec.data.max_length,
        # Trained embeddings below frozen layers need a backward pass through them.
        num_frozen_prefix_layers=0 if embeddings_train else num_frozen,
        activation_checkpointing=spec.training.activation_checkpointing,
        optim=spec.training.optim,
        lora_rank=spec.lora.r if spec.lora else None,
        trainable_bytes=_trainable_bytes(spec),
        compute_bytes=compute_bytes,
        quantized=spec.quantization is not None,
        head_trains=spec.lora is None and (not facts.tie_word_embeddings or embeddings_train),
        ema_on_device=spec.ema is not None and spec.ema.device == "auto",
    )


def layer_shape(facts: ModelFacts) -> LayerShape:
    """Returns the shape of one decoder layer; experts count as one layer as wide as those a token visits."""
    width = facts.moe_intermediate_size or facts.intermediate_size
    return LayerShape(
        hidden_size=facts.hidden_size,
        query_size=facts.num_attention_heads * facts.head_dim,
        key_size=facts.num_key_value_heads * facts.head_dim,
        intermediate_size=width * (facts.num_experts_per_tok or 1),
        num_attention_heads=facts.num_attention_heads,
    )


def count_lora_parameters(facts: ModelFacts, lora: LoraSection, num_frozen_layers: int = 0) -> int | None:
    """Counts the weights of the adapters, and of the modules that are trained whole.

    Units: weights. Source: PEFT; r x (inputs + outputs) for each linear layer with an adapter, with DoRA one more
    weight per output.
    """
    modules = linear_modules(facts)
    if modules is None:
        return None
    count = 0
    for name, inputs, outputs in modules:
        if lora.target_modules == "all-linear" or name in lora.target_modules:
            count += lora.r * (inputs + outputs) + (outputs if lora.use_dora else 0)
    whole = sum(
        count_embedding_parameters(facts) for name in lora.modules_to_save if name in ("embed_tokens", "lm_head")
    )
    return count * (facts.num_hidden_layers - num_frozen_layers) + whole


def _count_trainable(spec: RunSpec, facts: ModelFacts, num_frozen: int) -> int | None:
    if spec.lora:
        return count_lora_parameters(facts, spec.lora, num_frozen)
    if facts.num_parameters is None:
        return None
    embeddings = count_embedding_parameters(facts)
    both = embeddings if facts.tie_word_embeddings else 2 * embeddings
    # Norms and biases are too few to matter here, so the layers share the rest alike.
    in_layers = (facts.num_parameters - both) * (facts.num_hidden_layers - num_frozen) // facts.num_hidden_layers
    return in_layers + both - (embeddings if _freezes_embeddings(spec) else 0)


def _freezes_embeddings(spec: RunSpec) -> bool:
    if spec.freeze is None:
        return False
    return spec.freeze.first is not None if spec.freeze.embeddings is None else spec.freeze.embeddings


def _estimate_weights(spec: RunSpec, facts: ModelFacts, compute_bytes: int) -> int:
    """Estimates the base model's weights as the run loads them: frozen in compute format, trained in float32."""
    by_default = compute_bytes if spec.lora else 4
    bytes_per_parameter = _BYTES.get(spec.model.dtype, by_default)
    quantized = count_linear_parameters(facts) if spec.quantization else 0
    return estimate_weights_bytes(
        facts.num_parameters or 0,
        bytes_per_parameter,
        quantized or 0,
        spec.quantization.bits if spec.quantization else 4,
        spec.quantization.bnb_4bit_use_double_quant if spec.quantization else True,
    )


def _estimate_reference(facts: ModelFacts, spec: RunSpec, compute_bytes: int) -> int:
    """Estimates a second model as the reference: whole training has one, adapters are switched off instead."""
    has_model = spec.method in ("dpo", "kto") and spec.lora is None and not spec.preference.precompute_ref_log_probs
    return (facts.num_parameters or 0) * compute_bytes if has_model else 0


def _trainable_bytes(spec: RunSpec) -> int:
    """Returns the bytes of a trained weight: adapters are float32, a whole model is what ``model.dtype`` says."""
    return 4 if spec.lora else _BYTES.get(spec.model.dtype, 4)
