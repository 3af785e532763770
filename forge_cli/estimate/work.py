"""What one optimizer step computes, as plain values, and the operations that it takes, by cause."""

from __future__ import annotations

from typing import Literal, NamedTuple

from forge_cli.facts.shape import ModelFacts
from forge_cli.facts.weights import is_named


class Work(NamedTuple):
    """What is computed in one optimizer step on one device.

    Attributes:
        facts: Shape of the model.
        batch_size: Sequences of one micro step; both answers of a pair count.
        sequence_length: Tokens of one sequence, padding included.
        micro_steps: Micro steps of one optimizer step.
        lora_rank: Rank of the adapters; None trains the weights themselves.
        lora_targets: Names of the linear layers with an adapter; None for all.
        dora: Weight-decomposed adapters.
        num_frozen_layers: First decoder layers in which nothing is trained.
        trains_embeddings: The input embeddings are trained.
        trains_head: The output layer is trained.
        checkpoint_every: Every how many layers one runs again in the backward pass; 0 for none.
        quantized_bits: 4 or 8 for quantised linear layers; None for none.
        attention: ``flash``, ``sdpa`` or ``eager``.
        masked: Attention takes a mask (padding, or packed rows without flash attention).
        loss: ``fused`` (TRL's, in tiles), ``plain`` (all logits) or ``score`` (one score in place of the vocabulary).
        loss_tokens: Positions of one micro step that the output layer sees; None for all. TRL's fused loss sees
            those with a label on a GPU, and all but the last of each sequence on a CPU.
        own_forwards: Further passes of the trained model without gradients.
        reference_forwards: Passes of the reference, without adapters and gradients.
    """

    facts: ModelFacts
    batch_size: int
    sequence_length: int
    micro_steps: int = 1
    lora_rank: int | None = None
    lora_targets: tuple[str, ...] | None = None
    dora: bool = False
    num_frozen_layers: int = 0
    trains_embeddings: bool = False
    trains_head: bool = False
    checkpoint_every: int = 0
    quantized_bits: int | None = None
    attention: Literal["flash", "sdpa", "eager"] = "sdpa"
    masked: bool = False
    loss: Literal["fused", "plain", "score"] = "fused"
    loss_tokens: int | None = None
    own_forwards: int = 0
    reference_forwards: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of one micro step, padding included."""
        return self.batch_size * self.sequence_length

    @property
    def skips_prefix(self) -> bool:
        """Whether the frozen layers run without autograd: nothing below them is trained."""
        return self.num_frozen_layers > 0 and not self.trains_embeddings

    @property
    def num_open_layers(self) -> int:
        """Decoder layers that the backward pass goes through."""
        return self.facts.num_hidden_layers - (self.num_frozen_layers if self.skips_prefix else 0)

    def has_adapter(self, path: str) -> bool:
        """Whether a linear layer has an adapter, by its dotted name in the decoder layer."""
        if self.lora_rank is None or self.lora_targets is None:
            return self.lora_rank is not None
        return is_named(path, self.lora_targets)


class StepFlops(NamedTuple):
    """Operations by cause.

    Attributes:
        forward: The model's own matrices, forward.
        recomputed: What activation checkpointing computes once more, attention apart.
        input_gradients: Gradients that pass through the model's matrices.
        weight_gradients: Gradients of the model's matrices.
        adapters: Adapters, forward and backward.
        attention: Scores and values of all passes.
        head: Output layer, forward, backward and what its loss computes again.
        extra_forwards: Passes without gradients (reference, KTO's KL term), attention apart.
    """

    forward: int = 0
    recomputed: int = 0
    input_gradients: int = 0
    weight_gradients: int = 0
    adapters: int = 0
    attention: int = 0
    head: int = 0
    extra_forwards: int = 0

    @property
    def total(self) -> int:
        """All operations."""
        return sum(self)

    def plus(self, other: StepFlops, times: int = 1) -> StepFlops:
        """Returns the sum with a multiple of another."""
        return StepFlops(*(mine + times * its for mine, its in zip(self, other, strict=True)))


def count_extra_forwards(method: str, *, precomputed: bool = False, kl_term: bool = True) -> tuple[int, int]:
    """Counts the passes without gradients of a micro step as (own, reference).

    Args:
        method: A value of ``method``.
        precomputed: The reference's log probabilities are computed before training.
        kl_term: The loss of kto compares mismatched answers too.

    Units: passes. Source: TRL 1.16: dpo runs the reference once; kto runs the policy once more on mismatched answers
    and the reference on both; the other methods have no reference.
    """
    if method == "dpo":
        return 0, 0 if precomputed else 1
    if method == "kto":
        return int(kl_term), 0 if precomputed else 1 + kl_term
    return 0, 0
