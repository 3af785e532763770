"""What the memory of a training step depends on, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from forge_cli.facts.shape import ModelFacts
from forge_cli.facts.weights import is_named


class Adapters(NamedTuple):
    """LoRA adapters.

    Attributes:
        rank: Rank.
        targets: Names of the linear layers that have one: whole dotted names or their ends, as PEFT takes them.
        dropout: Dropout on their input (0 to 1).
        dora: Weight-decomposed adapters.
        embeddings: The input embeddings have one too.
    """

    rank: int
    targets: tuple[str, ...]
    dropout: float = 0.0
    dora: bool = False
    embeddings: bool = False

    def reach(self, module: str) -> bool:
        """Whether a linear layer has an adapter, by its dotted name in the model."""
        return is_named(module, self.targets)


class Setting(NamedTuple):
    """One training step on one device.

    Attributes:
        facts: Shape of the model.
        batch_size: Sequences of one micro step.
        sequence_length: Tokens of one sequence, padding included.
        weights_bytes: All weights as they are held, without adapters.
        trained: Sizes of the trained tensors, and how many of each there are.
        trained_embeddings: Those of them that are embeddings.
        adapters: LoRA adapters; ``None`` trains the weights themselves.
        quantized_bits: 4 or 8 for quantised linear layers; ``None`` for none.
        double_quant: The scales of 4-bit weights are quantised too.
        weight_bytes: Bytes per weight that is not quantised.
        trained_bytes: Bytes per trained weight.
        compute_bytes: Bytes per number in multiplications.
        autocast: Whether torch casts the inputs of multiplications (mixed precision).
        cuda: The step runs on a GPU; ``False`` for the CPU.
        num_frozen_layers: First decoder layers that run without autograd.
        frozen: Dotted names of what autograd passes through and does not train: decoder layers, and modules in them.
        num_idle_parameters: Weights that ask for a gradient and get none (a model's eyes).
        embeddings_train: The input embeddings are trained, or their adapter is.
        head_trains: The output layer is trained.
        activation_checkpointing: Layers keep their input only and run again in the backward pass.
        accumulation_steps: Micro steps per optimizer step; the batches of all of them are on the device, and from the
            second on gradients exist already.
        optim: A value of ``training.optim``.
        ema: Where averaged weights are: ``device``, ``cpu`` or ``""`` for none.
        pairs: A row is two sequences (preference methods).
        reference_forward: A second forward pass without gradients runs while activations are alive.
        attention: ``flash``, ``sdpa`` or ``eager``.
        padded: Rows are padded to one length, so attention takes a mask.
        packed: Several rows share a sequence, told apart by their positions: without flash attention that takes a mask.
        reference_bytes: Weights of a second model, or of a second adapter.
        loading_bytes: What loading needs beside the weights.
        loss: ``fused`` (the logits of the whole vocabulary never exist at once), ``plain`` (they do) or ``score``
            (one number per sequence).
        eval_batch_size: Sequences of one evaluation step.
    """

    facts: ModelFacts
    batch_size: int
    sequence_length: int
    weights_bytes: int
    trained: Mapping[int, int] = MappingProxyType({})
    trained_embeddings: Mapping[int, int] = MappingProxyType({})
    adapters: Adapters | None = None
    quantized_bits: int | None = None
    double_quant: bool = True
    weight_bytes: int = 2
    trained_bytes: int = 4
    compute_bytes: int = 2
    autocast: bool = True
    cuda: bool = True
    num_frozen_layers: int = 0
    frozen: frozenset[str] = frozenset()
    num_idle_parameters: int = 0
    embeddings_train: bool = False
    head_trains: bool = False
    activation_checkpointing: bool = True
    accumulation_steps: int = 1
    optim: str = "adamw_torch_fused"
    ema: str = ""
    pairs: bool = False
    reference_forward: bool = False
    attention: str = "sdpa"
    padded: bool = False
    packed: bool = False
    reference_bytes: int = 0
    loading_bytes: int = 0
    loss: str = "fused"
    eval_batch_size: int = 0

    @property
    def num_sequences(self) -> int:
        """Sequences of one micro step, both answers of a pair counted."""
        return self.batch_size * (2 if self.pairs else 1)

    def as_the_model_sees_it(self) -> Setting:
        """Returns the step with the rows of a packed batch in one sequence, as TRL's collator joins them."""
        if not self.packed or self.num_sequences == 1:
            return self
        return self._replace(batch_size=1, pairs=False, sequence_length=self.num_sequences * self.sequence_length)
