"""The memory of a plan: its settings and the model's shape become a :class:`Setting`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from forge_cli.estimate.memory import MemoryEstimate, estimate_memory
from forge_cli.estimate.setting import Adapters, Setting
from forge_cli.estimate.trained_parts import TrainedParts, find_trained_parts
from forge_cli.estimate.weights import weigh_model, weigh_tensors
from forge_cli.facts.families import find_family
from forge_cli.facts.model_facts import find_model_facts
from forge_cli.facts.parameter_count import linear_modules
from forge_cli.facts.trainable_count import count_lora_parameters

if TYPE_CHECKING:
    from forge_cli.facts.shape import ModelFacts
    from forge_cli.resolve.plan import Plan
    from forge_cli.schema.adapter import LoraSection
    from forge_cli.schema.runspec import RunSpec

__all__ = ["count_lora_parameters", "estimate_from_plan", "setting_from_plan"]

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp32": 4, "bf16": 2, "fp16": 2}
# TRL's trainers of these methods make all logits at once.
_PLAIN_LOSS = ("orpo", "cpo")
# Their rows are two sequences. Of KTO's two, the mismatched one runs before the other and keeps nothing (TRL 1.16).
_PAIRS = ("dpo", "orpo", "cpo", "reward")


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
    trained = find_trained_parts(facts, spec, num_frozen)
    if trained is None:
        return None
    mixed, weight_bytes = _choose_formats(spec, cuda)
    compute_bytes = min(mixed, weight_bytes)
    weights, reference = _weigh_held(facts, spec, trained, (weight_bytes, compute_bytes), 512 if cuda else 1)
    if weights is None or reference is None:
        return None
    bits, double_quant = _read_quantization(spec)
    return Setting(
        facts=facts,
        batch_size=spec.training.per_device_train_batch_size,
        sequence_length=spec.data.max_length,
        weights_bytes=weights,
        trained=trained.sizes,
        trained_embeddings=trained.embedding_sizes,
        adapters=_describe_adapters(facts, spec.lora, trained),
        quantized_bits=bits,
        double_quant=double_quant,
        weight_bytes=weight_bytes,
        trained_bytes=4 if spec.lora else weight_bytes,
        compute_bytes=compute_bytes,
        autocast=mixed < 4,
        cuda=cuda,
        num_frozen_layers=trained.num_skipped_layers,
        frozen=trained.frozen,
        num_idle_parameters=0 if spec.lora else facts.num_other_parameters,
        embeddings_train=trained.embeddings_train,
        head_trains=trained.head_trains,
        activation_checkpointing=spec.training.activation_checkpointing,
        accumulation_steps=spec.training.gradient_accumulation_steps,
        optim=spec.training.optim,
        # Without a GPU both are host memory.
        ema="" if spec.ema is None else "cpu" if spec.ema.device == "cpu" and cuda else "device",
        pairs=spec.method in _PAIRS,
        reference_forward=spec.method in ("dpo", "kto") and not spec.preference.precompute_ref_log_probs,
        reference_bytes=reference,
        loading_bytes=_weigh_loading(facts, weight_bytes) if bits else 0,
        attention=_choose_attention(spec, facts),
        padded=_is_padded(spec),
        packed=spec.data.packing or spec.data.padding_free,
        loss="score" if spec.method == "reward" else "plain" if spec.method in _PLAIN_LOSS else "fused",
        eval_batch_size=spec.evaluation.per_device_eval_batch_size if _evaluates(spec) else 0,
    )


def _choose_formats(spec: RunSpec, cuda: bool) -> tuple[int, int]:
    """Returns the bytes of a number under mixed precision, and of a weight."""
    mixed = _BYTES.get(spec.training.precision, 2 if cuda else 4)
    return mixed, _BYTES.get(spec.model.dtype, mixed if spec.lora else 4)


def _read_quantization(spec: RunSpec) -> tuple[int | None, bool]:
    section = spec.quantization
    return (None, True) if section is None else (section.bits, section.bnb_4bit_use_double_quant)


def _describe_adapters(facts: ModelFacts, lora: LoraSection | None, trained: TrainedParts) -> Adapters | None:
    if lora is None:
        return None
    names = [name for name, _, _ in linear_modules(facts) or []]
    targets = names if lora.target_modules == "all-linear" else lora.target_modules
    return Adapters(lora.r, tuple(sorted(set(targets))), lora.lora_dropout, lora.use_dora, trained.embeddings_adapted)


def _weigh_held(
    facts: ModelFacts, spec: RunSpec, trained: TrainedParts, formats: tuple[int, int], granule: int
) -> tuple[int | None, int | None]:
    """Returns the bytes of the model, and of the model or adapter that dpo and kto compare it with.

    Args:
        facts: Shape of the model.
        spec: The settings.
        trained: What is trained.
        formats: Bytes per weight of the model, and in multiplications.
        granule: Sizes are rounded up to a multiple of this.

    Units: bytes; ``None`` for an architecture that Forge does not know. Source: ``forge_cli.build.reference``.
    """
    wanted, (bits, double_quant) = spec.preference.reference, _read_quantization(spec)

    def weigh(one: ModelFacts | None, size: int, *, score_head: bool = False) -> int | None:
        return one and weigh_model(
            one,
            size,
            quantized_bits=bits,
            double_quant=double_quant,
            granule_bytes=granule,
            score_head=score_head,
        )

    weights = weigh(facts, formats[0], score_head=spec.method == "reward")
    if spec.method not in ("dpo", "kto"):
        return weights, 0
    is_base = wanted == "base" or (wanted == "auto" and spec.model.adapter is None)
    if is_base and (spec.lora or spec.preference.precompute_ref_log_probs):
        return weights, 0
    if wanted not in ("auto", "base", "adapter") and not (Path(wanted).expanduser() / "adapter_config.json").is_file():
        return weights, weigh(find_model_facts(wanted), formats[0 if spec.lora else 1])
    if spec.lora:
        return weights, weigh_tensors(trained.sizes, 4, granule)
    # An adapter's folder is merged into a frozen copy.
    return weights, weigh(facts, formats[1])


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
    rows = spec.training.per_device_train_batch_size * (2 if spec.method in _PAIRS else 1)
    return not joined and rows > 1 and spec.model.attn_implementation != "flash_attention_2"


def _evaluates(spec: RunSpec) -> bool:
    return spec.data.eval is not None or spec.data.eval_fraction is not None or spec.data.eval_rows is not None
