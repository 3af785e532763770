"""Bytes that one micro step moves outside its matrix products, and the kernels that it launches.

The counts are of transformers' modelling code as it runs without compilation: every kernel reads its inputs from the
GPU's memory and writes its outputs there. Caches make it a little less.
"""

from __future__ import annotations

from typing import NamedTuple

from forge_cli.estimate.work import Work
from forge_cli.facts.families import find_family
from forge_cli.facts.parameter_count import count_linear_parameters, count_quantized_parameters, list_linear_paths
from forge_cli.facts.weights import attention_widths


class _Counts(NamedTuple):
    """What one layer moves with 16-bit weights, per token.

    Attributes:
        forward: Bytes per unit of hidden size, width of all queries, width of all keys, feed-forward width.
        whole: The same of forward and backward pass together.
        kernels: Kernels of the forward pass, and of both.
    """

    forward: tuple[int, int, int, int]
    whole: tuple[int, int, int, int]
    kernels: tuple[int, int]


_LLAMA = _Counts((84, 20, 20, 10), (298, 52, 52, 28), (36, 109))
_FALCON = _Counts((28, 10, 0, 4), (110, 24, 0, 12), (19, 62))
_COUNTS: dict[str, _Counts] = {
    "qwen3": _Counts((84, 56, 56, 10), (298, 180, 180, 28), (52, 157)),
    "qwen3_moe": _Counts((84, 56, 56, 10), (298, 180, 180, 28), (52, 157)),
    "gemma": _Counts((92, 20, 20, 10), (330, 52, 52, 28), (40, 115)),
    "gemma2": _Counts((172, 20, 20, 10), (618, 52, 52, 28), (59, 169)),
    "gemma3_text": _Counts((172, 60, 60, 10), (618, 196, 196, 28), (79, 223)),
    "olmo2": _Counts((92, 76, 76, 10), (330, 238, 238, 28), (53, 169)),
    "olmo3": _Counts((92, 76, 76, 10), (330, 238, 238, 28), (53, 169)),
    "phi3": _Counts((84, 24, 24, 10), (280, 84, 104, 36), (35, 109)),
    "phi": _Counts((16, 14, 14, 36), (50, 46, 48, 94), (27, 87)),
    "gpt2": _Counts((20, 0, 0, 36), (66, 0, 0, 94), (15, 46)),
    "gpt_neox": _FALCON,
    "falcon": _FALCON,
}
# fp32 weights under autocast: norms and rotary work in fp32. The Llama family's counts.
_MASTER_FORWARD, _MASTER_WHOLE = (22, 16, 10, 0), (94, 42, 30, 0)
# Per visited expert: gathering, weighting and adding up, and the activation; counted without grouped kernels.
_VISIT_FORWARD, _VISIT_WHOLE = (30, 0, 0, 16), (89, 0, 0, 54)


class MicroStepTraffic(NamedTuple):
    """Bytes and kernels of one micro step.

    Attributes:
        activations_bytes: Norms, activations, residuals, rotary tables, adapters' sums and casts.
        loss_bytes: Logits and what the loss makes of them.
        weights_bytes: Unpacking quantised weights, or casting fp32 ones and their gradients.
        reads_bytes: Weights that the matrix products themselves read.
        kernels: Kernel launches.
    """

    activations_bytes: float
    loss_bytes: float
    weights_bytes: float
    reads_bytes: float
    kernels: float


def count_micro_step_traffic(work: Work, trained_bytes: int = 4) -> MicroStepTraffic | None:
    """Counts one micro step under 16-bit computation; None for an architecture that Forge does not know.

    Args:
        work: What is computed.
        trained_bytes: Bytes per trained weight: 4 under autocast, 2 for pure 16-bit training.

    Units: bytes and launches. Source: counted op by op on small models of each family (transformers 5.23, PEFT 0.21);
    the tests count again. A frozen layer moves its forward pass alone, a checkpointed one its forward pass twice.
    Falcon's counts are GPT-NeoX's. Loss: 36 bytes per logit written out (float, log-softmax and back), 6 in TRL's
    tiles. 4-bit weights: 0.52 bytes read and 2 written per weight and pass, 8-bit 1 and 2; fp32 masters: 12 per weight
    (a 16-bit copy, and its gradient cast back).
    """
    facts = work.facts
    if find_family(facts) is None:
        return None
    forward, whole = (_count_layer(work, trained_bytes, both) for both in (False, True))
    layers, opened = facts.num_hidden_layers, work.num_open_layers
    again = -(-layers // work.checkpoint_every) if work.checkpoint_every else 0
    again = min(again, opened)
    extra = (work.own_forwards + work.reference_forwards) * layers
    passes = layers - opened + again + extra
    tokens = work.num_tokens
    positions = tokens if work.loss_tokens is None else work.loss_tokens
    per_logit = {"plain": 36, "fused": 6, "score": 0}[work.loss]
    # Passes of all weights: forward, the gradient of inputs, the gradient of weights, recomputation.
    weight_passes = (passes + opened * (3 if work.lora_rank is None else 2)) / layers
    return MicroStepTraffic(
        activations_bytes=tokens * (opened * whole[0] + passes * forward[0]),
        loss_bytes=per_logit * positions * facts.vocab_size,
        weights_bytes=_count_unpacking(work, trained_bytes, (passes + 2 * opened) / layers),
        reads_bytes=2 * weight_passes * (facts.num_parameters or 0),
        kernels=opened * whole[1] + passes * forward[1],
    )


def _count_layer(work: Work, trained_bytes: int, both: bool) -> tuple[float, float]:
    """Counts one layer as (bytes per token, kernels): the forward pass, or both passes."""
    facts, counts = work.facts, _COUNTS.get(work.facts.model_type, _LLAMA)
    queries, keys = attention_widths(facts)
    wide = facts.moe_intermediate_size or facts.intermediate_size
    widths = (facts.hidden_size, queries, keys, 0 if facts.num_local_experts else wide)
    moved = _dot(counts.whole if both else counts.forward, widths)
    kernels: float = counts.kernels[both]
    if facts.num_local_experts:
        visits = facts.num_experts_per_tok or 1
        moved += visits * _dot(_VISIT_WHOLE if both else _VISIT_FORWARD, (facts.hidden_size, 0, 0, wide))
    if work.lora_rank is None:
        if trained_bytes == 4:
            moved += _dot(_MASTER_WHOLE if both else _MASTER_FORWARD, widths)
            kernels += 24 if both else 2
        return moved, kernels
    adapters = [one for one in list_linear_paths(facts) or [] if work.has_adapter(one[0])]
    # Scaling and adding B's output: 10 bytes per output forward, 4 backward; adding up the input's gradient: 6 per
    # input; fp32 adapters under autocast cast the input to fp32 and back: 12 in each pass.
    casts = 12 if trained_bytes == 4 else 0
    for _, inputs, outputs in adapters:
        moved += (14 if both else 10) * outputs + ((2 * casts + 6) if both else casts) * inputs
        kernels += (16.4 if casts else 8.4) if both else (5.7 if casts else 3.9)
    return moved - (_count_norm_gradients(work) if both else 0), kernels


def _count_norm_gradients(work: Work) -> float:
    """Counts what frozen norms save: 8 bytes per number, 16 where the norm multiplies in fp32; fused ones little."""
    facts, family = work.facts, find_family(work.facts)
    if family is None or family.norm_bias:
        return 0
    widths = len(family.norms) * facts.hidden_size + (sum(attention_widths(facts)) if family.qk_norm else 0)
    return widths * (16 if facts.model_type.startswith(("gemma", "olmo")) else 8)


def _count_unpacking(work: Work, trained_bytes: int, passes: float) -> float:
    if work.quantized_bits is not None:
        per_weight = 2.52 if work.quantized_bits == 4 else 3.0
        return per_weight * passes * (count_quantized_parameters(work.facts) or 0)
    if work.lora_rank is None and trained_bytes == 4:
        return 12 * (count_linear_parameters(work.facts) or 0)
    return 0


def _dot(rates: tuple[int, ...], widths: tuple[int, ...]) -> float:
    return sum(rate * width for rate, width in zip(rates, widths, strict=True))
