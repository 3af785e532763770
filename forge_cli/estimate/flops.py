"""The floating point operations of one optimizer step, matrix product by matrix product.

A product of ``m x k`` with ``k x n`` counts ``2 m k n``. What is not a matrix product (norms, activations, the
optimizer) is not counted: it costs bytes, not operations (``forge_cli.estimate.traffic``).
"""

from __future__ import annotations

from functools import cache

from forge_cli.estimate.layer_flops import LayerFlops
from forge_cli.estimate.work import StepFlops, Work, count_extra_forwards
from forge_cli.facts.families import Family, find_family
from forge_cli.facts.parameter_count import list_linear_paths

__all__ = ["StepFlops", "Work", "count_extra_forwards", "count_model_flops", "count_step_flops"]


def count_step_flops(work: Work, *, causal: bool = True) -> StepFlops | None:
    """Counts one optimizer step; None for an architecture that Forge does not know.

    Args:
        work: What is computed.
        causal: Attention kernels skip what the causal mask hides, so a sequence of S tokens has S (S + 1) / 2 pairs;
            False counts all S x S pairs, as torch's own counter does.

    Units: floating point operations (a multiplication and an addition are two). Source: 2 m k n per matrix product,
    over the products that transformers 5.23, PEFT 0.21 and TRL 1.16 do; the tests hold it against
    ``torch.utils.flop_counter`` on real models, with ``causal=False`` and to the last digit but for the rotary
    tables (sequence_length x head_dim).
    """
    family, linear = find_family(work.facts), list_linear_paths(work.facts)
    if family is None or linear is None:
        return None
    step = StepFlops(head=_count_head(work))
    needs = _first_input_needs(work, family)
    own = reference = StepFlops(extra_forwards=_head_product(work))

    @cache  # most layers are alike
    def count_layer(trains: bool, has_window: bool, needs: bool) -> tuple[StepFlops, StepFlops, StepFlops, bool, int]:
        layer = LayerFlops(work, family, tuple(linear), trains, has_window, causal)
        forward = layer.count_forward(adapters=trains)
        again = forward.forward + forward.adapters - layer.count_stopped_early()
        return forward, layer.count_forward(adapters=False), *layer.count_backward(needs), again

    for index in range(work.facts.num_hidden_layers):
        trains, every = index >= work.num_frozen_layers, family.full_attention_every
        forward, bare, backward, output_needs, again = count_layer(
            trains, every == 1 or (index + 1) % every != 0, needs
        )
        own, reference = own.plus(_as_extra(forward)), reference.plus(_as_extra(bare))
        step = step.plus(forward)
        if not trains and work.skips_prefix:
            continue
        step, needs = step.plus(backward), output_needs
        if needs and work.checkpoint_every and index % work.checkpoint_every == 0:
            step = step.plus(StepFlops(recomputed=again, attention=forward.attention))
    step = step.plus(own, work.own_forwards).plus(reference, work.reference_forwards)
    return StepFlops().plus(step, work.micro_steps)


def count_model_flops(work: Work) -> int | None:
    """Counts what the step needs at least, for MFU: nothing twice.

    Units: operations. Source: the step without checkpointing and with a plain loss; a fused attention kernel's second
    computation of the scores (one of its seven products) is left out too.
    """
    least = work._replace(checkpoint_every=0, loss="plain" if work.loss == "fused" else work.loss)
    step, alone = count_step_flops(least), count_step_flops(least._replace(own_forwards=0, reference_forwards=0))
    if step is None or alone is None:
        return None
    return step.total - (0 if work.attention == "eager" else alone.attention // 7)


def _as_extra(forward: StepFlops) -> StepFlops:
    return StepFlops(extra_forwards=forward.forward + forward.adapters, attention=forward.attention)


def _first_input_needs(work: Work, family: Family) -> bool:
    """Whether the input of the first layer with a backward pass needs a gradient.

    Source: transformers 5.23 makes the embeddings' output need one when checkpointing is switched on; Forge's frozen
    layers run without autograd, so nothing above them knows of it.
    """
    if work.skips_prefix:
        return False
    trains_positions = bool(family.positions) and work.lora_rank is None
    return work.trains_embeddings or trains_positions or work.checkpoint_every > 0


def _head_product(work: Work) -> int:
    """Counts one product of the output layer. Units: operations. Source: 2 x positions x hidden_size x outputs."""
    outputs = 1 if work.loss == "score" else work.facts.vocab_size
    positions = work.num_tokens if work.loss_tokens is None else work.loss_tokens
    return 2 * positions * work.facts.hidden_size * outputs


def _count_head(work: Work) -> int:
    """Counts the output layer with its loss.

    Units: operations. Source: forward, gradient of its input, gradient of its weights if they train; TRL's fused loss
    computes the logits a second time in the backward pass.
    """
    trains = work.trains_head or work.loss == "score"
    return (2 + trains + (work.loss == "fused")) * _head_product(work)
