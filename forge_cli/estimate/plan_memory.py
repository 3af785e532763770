"""The memory of a plan: its settings and the model's shape become a :class:`Setting`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forge_cli.estimate.memory import MemoryEstimate, estimate_memory
from forge_cli.estimate.setting import Adapters, Setting
from forge_cli.estimate.weights import weigh_model, weigh_tensors
from forge_cli.facts.families import find_family
from forge_cli.facts.parameter_count import linear_modules
from forge_cli.facts.trainable_count import count_lora_parameters, freezes_embeddings, list_trained_tensors
from forge_cli.facts.weights import list_outer_weights

if TYPE_CHECKING:
    from forge_cli.facts.shape import ModelFacts
    from forge_cli.resolve.plan import Plan
    from forge_cli.schema.adapter import LoraSection
    from forge_cli.schema.runspec import RunSpec

__all__ = ["count_lora_parameters", "estimate_from_plan", "setting_from_plan"]

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp32": 4, "bf16": 2, "fp16": 2}
# TRL's trainers of these methods make all logits at once.
_PLAIN_LOSS = ("orpo", "cpo")


def estimate_from_plan(plan: Plan, *, cuda: bool = True) -> MemoryEstimate | None:
    """Estimates the memory of a plan's training step; see :func:`setting_from_plan`."""
    setting = setting_from_plan(plan, cuda=cuda)
    return None if setting is None else estimate_memory(setting)


def setting_from_plan(plan: Plan, *, cuda: bool = True) -> Setting | None:
    """Returns what the memory of a plan depends on.

    Rows are taken at full length (``data.max_length``) and, unless they are packed, as padded where a batch has more
    than one. ``training.precision: auto`` is 16 bit on a GPU and float32 on the CPU.

    Args:
        plan: The plan.
        cuda: For a GPU; ``False`` for the CPU.

    Returns:
        The setting, or ``None`` when the model's shape is not known before it is loaded.
    """
    spec, facts, num_frozen = plan.spec, plan.facts, plan.derived.num_frozen_layers
    if facts is None or num_frozen is None or facts.num_parameters is None:
        return None
    is_reward = spec.method == "reward"
    trained = list_trained_tensors(facts, spec.lora, spec.freeze, num_frozen, score_head=is_reward)
    if trained is None:
        return None
    mixed = _BYTES.get(spec.training.precision, 2 if cuda else 4)
    weight_bytes = _BYTES.get(spec.model.dtype, mixed if spec.lora else 4)
    compute_bytes = min(mixed, weight_bytes)
    whole = spec.lora.modules_to_save if spec.lora else []
    embeddings_train = _trains_embeddings(spec, whole)
    granule = 512 if cuda else 1
    quantized = spec.quantization
    return Setting(
        facts=facts,
        batch_size=spec.training.per_device_train_batch_size,
        sequence_length=spec.data.max_length,
        weights_bytes=weigh_model(
            facts,
            weight_bytes,
            quantized_bits=quantized.bits if quantized else None,
            double_quant=quantized.bnb_4bit_use_double_quant if quantized else True,
            granule_bytes=granule,
            score_head=is_reward,
        )
        or 0,
        trained=trained,
        trained_embeddings=_list_embeddings(facts) if embeddings_train else {},
        adapters=_describe_adapters(facts, spec.lora),
        quantized_bits=quantized.bits if quantized else None,
        weight_bytes=weight_bytes,
        trained_bytes=4 if spec.lora else weight_bytes,
        compute_bytes=compute_bytes,
        autocast=mixed < 4,
        cuda=cuda,
        # Trained embeddings below frozen layers need a backward pass through them.
        num_frozen_layers=0 if embeddings_train else num_frozen,
        embeddings_train=embeddings_train,
        head_trains=_trains_head(spec, facts, embeddings_train),
        activation_checkpointing=spec.training.activation_checkpointing,
        accumulation_steps=spec.training.gradient_accumulation_steps,
        optim=spec.training.optim,
        # Without a GPU both are host memory.
        ema="" if spec.ema is None else "cpu" if spec.ema.device == "cpu" and cuda else "device",
        pairs=spec.method != "sft",
        reference_forward=spec.method in ("dpo", "kto") and not spec.preference.precompute_ref_log_probs,
        reference_bytes=_weigh_reference(facts, spec, trained, compute_bytes, granule),
        loading_bytes=_weigh_loading(facts, weight_bytes) if quantized else 0,
        attention=_choose_attention(spec, facts),
        padded=_is_padded(spec),
        packed=spec.data.packing or spec.data.padding_free,
        loss="score" if is_reward else "plain" if spec.method in _PLAIN_LOSS else "fused",
        eval_batch_size=spec.evaluation.per_device_eval_batch_size if _evaluates(spec) else 0,
    )


def _describe_adapters(facts: ModelFacts, lora: LoraSection | None) -> Adapters | None:
    if lora is None:
        return None
    names = [name for name, _, _ in linear_modules(facts) or []]
    targets = names if lora.target_modules == "all-linear" else lora.target_modules
    return Adapters(lora.r, tuple(sorted(set(targets))), lora.lora_dropout, lora.use_dora)


def _trains_embeddings(spec: RunSpec, whole: list[str]) -> bool:
    if freezes_embeddings(spec.freeze, whole):
        return False
    return spec.lora is None or "embed_tokens" in whole


def _list_embeddings(facts: ModelFacts) -> dict[int, int]:
    found: dict[int, int] = {}
    for weight in list_outer_weights(facts) or []:
        if weight.kind == "embedding":
            found[weight.size] = found.get(weight.size, 0) + 1
    return found


def _trains_head(spec: RunSpec, facts: ModelFacts, embeddings_train: bool) -> bool:
    if spec.lora:
        return "lm_head" in spec.lora.modules_to_save
    return embeddings_train or not facts.tie_word_embeddings


def _weigh_reference(
    facts: ModelFacts, spec: RunSpec, trained: dict[int, int], bytes_per_weight: int, granule: int
) -> int:
    """Returns the bytes of the model or adapter that dpo and kto compare with; base under LoRA needs none."""
    if spec.method not in ("dpo", "kto"):
        return 0
    wanted = spec.preference.reference
    if spec.lora:
        is_base = wanted == "base" or (wanted == "auto" and spec.model.adapter is None)
        return 0 if is_base else weigh_tensors(trained, 4, granule)
    if spec.preference.precompute_ref_log_probs and wanted in ("auto", "base"):
        return 0
    return weigh_model(facts, bytes_per_weight, granule_bytes=granule) or 0


def _weigh_loading(facts: ModelFacts, weight_bytes: int) -> int:
    """Returns the largest linear layer before it is quantised: weights are quantised one after the other."""
    return weight_bytes * max((inputs * outputs for _, inputs, outputs in linear_modules(facts) or []), default=0)


def _choose_attention(spec: RunSpec, facts: ModelFacts) -> str:
    wanted, family = spec.model.attn_implementation, find_family(facts)
    if wanted == "auto":
        return "sdpa" if family is None or family.has_sdpa else "eager"
    return "flash" if wanted == "flash_attention_2" else wanted


def _is_padded(spec: RunSpec) -> bool:
    joined = spec.data.packing or spec.data.padding_free
    rows = spec.training.per_device_train_batch_size * (1 if spec.method == "sft" else 2)
    return not joined and rows > 1 and spec.model.attn_implementation != "flash_attention_2"


def _evaluates(spec: RunSpec) -> bool:
    return spec.data.eval is not None or spec.data.eval_fraction is not None or spec.data.eval_rows is not None
