"""What a training step keeps in device memory, as a sum of terms with a formula and a source each.

Symbols: T tokens of one micro step, h hidden size, a and b widths of all query and key heads, i feed-forward width,
n heads, r rank, V vocabulary, L layers. All results are bytes as torch counts them (allocated); the CUDA context
(0.3 to 0.6 GB) and fragmentation (2 to 20 %) come on top.

Source of the formulas, unless a function names another: tensors that autograd keeps, counted by running transformers
5.23, PEFT 0.21 and TRL 1.16 on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

# Adam keeps two states per weight; the 8-bit ones hold a byte each and one fp32 scale per 256 weights.
_STATE_BYTES = {
    "adamw_torch_fused": 8.0,
    "adamw_torch": 8.0,
    "adamw_bnb_8bit": 2.03125,
    "paged_adamw_8bit": 2.03125,
    "paged_adamw_32bit": 8.0,
    "sgd": 0.0,
}
_LOSS_TILE_TOKENS = 4096
_LOSS_TILE_VOCABULARY = 32768


@dataclass(frozen=True)
class LayerShape:
    """The shape of one decoder layer, as far as activations depend on it.

    Attributes:
        hidden_size: Width of the residual stream.
        query_size: Width of all query heads.
        key_size: Width of all key heads.
        intermediate_size: Width of the feed-forward layer (of all the experts that a token visits).
        num_attention_heads: Query heads.
    """

    hidden_size: int
    query_size: int
    key_size: int
    intermediate_size: int
    num_attention_heads: int


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by component at the highest point of a training step.

    Attributes:
        weights_bytes: All weights as they are held.
        gradients_bytes: Gradients of the trained weights.
        optimizer_bytes: Optimizer states.
        ema_bytes: Averaged weights on the device.
        activations_bytes: Kept between forward and backward pass.
        working_bytes: The larger of the loss and one layer's backward pass.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    ema_bytes: int
    activations_bytes: int
    working_bytes: int

    @property
    def total_bytes(self) -> int:
        """The sum of all components."""
        return sum(getattr(self, field.name) for field in fields(self))


def estimate_weights_bytes(
    num_parameters: int,
    bytes_per_parameter: float,
    num_quantized_parameters: int = 0,
    quantized_bits: int = 4,
    double_quantization: bool = True,
) -> int:
    """Estimates the weights.

    Units: bytes. Source: bitsandbytes 0.50: 4 bit with an fp32 scale per 64 weights is 0.5625 bytes per weight, with
    double quantisation 0.51587; 8 bit is 1 (the scales, 4 bytes per row, are left out).
    """
    per_quantized = 1.0 if quantized_bits == 8 else 0.51587 if double_quantization else 0.5625
    return round(
        (num_parameters - num_quantized_parameters) * bytes_per_parameter + num_quantized_parameters * per_quantized
    )


def estimate_optimizer_bytes(num_trainable_parameters: int, optim: str, smallest_dimension: int = 1) -> int:
    """Estimates the optimizer states of fp32 weights.

    Paged states may leave the device when memory is short; they are counted as if they stayed.

    Args:
        num_trainable_parameters: Trained weights.
        optim: A value of ``training.optim``.
        smallest_dimension: Smaller side of the trained matrices; only adafactor, which keeps sums of rows and
            columns, depends on it.

    Units: bytes. Source: torch's and bitsandbytes' optimizers; Adam 2 x 4, 8 bit 2 x (1 + 4/256), adafactor
    4 x (rows + columns) <= 8 / smallest_dimension per weight.
    """
    if optim == "adafactor":
        return round(8 * num_trainable_parameters / max(smallest_dimension, 1))
    return round(_STATE_BYTES[optim] * num_trainable_parameters)


def estimate_layer_bytes_per_token(
    layer: LayerShape, lora_rank: int | None = None, trainable_bytes: int = 4, compute_bytes: int = 2
) -> int:
    """Estimates what the backward pass of one decoder layer needs, per token.

    Units: bytes per token and layer. Source: per-tensor counts for the Llama family with sdpa and no padding mask,
    16-bit compute; other families differ by up to a half. fp32 compute is counted as twice 16 bit.

    ========================================  =================================
    all weights, fp32 under autocast          26h + 4a + 4b + 8i + 4n + 8
    all weights, 16 bit                       16h + 4a + 4b + 8i + 4n + 8
    LoRA in fp32 under autocast               18h + 6a + 4b + 8i + 4n + 8 + 14r
    LoRA in 16 bit                            12h + 4a + 4b + 8i + 4n + 8 + 14r
    ========================================  =================================
    """
    mixed = trainable_bytes > compute_bytes
    rank = lora_rank or 0
    if lora_rank is None:
        of_hidden, of_queries = (26 if mixed else 16), 4
    else:
        of_hidden, of_queries = (18, 6) if mixed else (12, 4)
    count = of_hidden * layer.hidden_size + of_queries * layer.query_size + 4 * layer.key_size
    count += 8 * layer.intermediate_size + 4 * layer.num_attention_heads + 8 + 14 * rank
    return count * compute_bytes // 2


def estimate_loss_bytes(
    num_tokens: int, hidden_size: int, vocab_size: int, head_trains: bool, fused: bool = True
) -> int:
    """Estimates the output layer and its loss.

    Args:
        num_tokens: Tokens of one micro step.
        hidden_size: Width of the residual stream.
        vocab_size: Size of the vocabulary.
        head_trains: Whether the output layer is trained.
        fused: TRL's loss in tiles; otherwise all logits exist at once.

    Units: bytes. Source: TRL 1.16: a 16-bit tile of at most 4096 tokens x 32768 words and 8h per token, with a
    trained head an fp32 and a 16-bit gradient of it; transformers 5.23 under its Trainer: 12V per token.
    """
    head = 6 * vocab_size * hidden_size if head_trains else 0
    if not fused:
        return 12 * vocab_size * num_tokens + head // 3
    tile = 2 * min(num_tokens, _LOSS_TILE_TOKENS) * min(vocab_size, _LOSS_TILE_VOCABULARY)
    return tile + 8 * hidden_size * num_tokens + head


def estimate_memory(
    *,
    weights_bytes: int,
    num_trainable_parameters: int,
    layer: LayerShape,
    num_layers: int,
    vocab_size: int,
    batch_size: int,
    sequence_length: int,
    num_frozen_prefix_layers: int = 0,
    activation_checkpointing: bool = True,
    optim: str = "adamw_torch_fused",
    lora_rank: int | None = None,
    trainable_bytes: int = 4,
    compute_bytes: int = 2,
    quantized: bool = False,
    head_trains: bool = False,
    fused_loss: bool = True,
    ema_on_device: bool = False,
) -> MemoryEstimate:
    """Estimates the peak of one training step on one device.

    Args:
        weights_bytes: All weights as they are held (``estimate_weights_bytes``, or counted on a live model).
        num_trainable_parameters: Trained weights.
        layer: Shape of one decoder layer.
        num_layers: Decoder layers.
        vocab_size: Size of the vocabulary.
        batch_size: Rows of one micro step.
        sequence_length: Tokens of one row, padding included.
        num_frozen_prefix_layers: First layers that run without autograd; they keep nothing.
        activation_checkpointing: Layers keep their input only and are run again in the backward pass.
        optim: A value of ``training.optim``.
        lora_rank: Rank of the adapters; None for full fine-tuning.
        trainable_bytes: Bytes per trained weight.
        compute_bytes: Bytes per number in the multiplications (2, or 4 for fp32).
        quantized: The frozen weights are unpacked for every multiplication.
        head_trains: The output layer is trained.
        fused_loss: See ``estimate_loss_bytes``.
        ema_on_device: An fp32 average of the trained weights is kept beside them.

    Returns:
        Bytes by component.

    Units: bytes. Source: the peak is the larger of two instants, loss and backward pass of one layer, on top of what
    is kept; a layer's backward pass adds 4i + 4h per token and, if quantised, one unpacked matrix (compute x h x i).
    """
    num_tokens = batch_size * sequence_length
    hidden, inner = layer.hidden_size, layer.intermediate_size
    open_layers = max(num_layers - num_frozen_prefix_layers, 0)
    whole_layer = num_tokens * estimate_layer_bytes_per_token(layer, lora_rank, trainable_bytes, compute_bytes)
    backward = num_tokens * (4 * inner + 4 * hidden) * compute_bytes // 2
    if quantized:
        backward += compute_bytes * hidden * inner
    if activation_checkpointing:
        kept = compute_bytes * hidden * num_tokens * open_layers
        backward += whole_layer
    else:
        kept = whole_layer * open_layers
    loss = estimate_loss_bytes(num_tokens, hidden, vocab_size, head_trains, fused_loss)
    if lora_rank is None and trainable_bytes > compute_bytes:
        kept += compute_bytes * num_trainable_parameters  # autocast's copies live until the end of the backward pass
    return MemoryEstimate(
        weights_bytes=weights_bytes,
        gradients_bytes=num_trainable_parameters * trainable_bytes,
        optimizer_bytes=estimate_optimizer_bytes(num_trainable_parameters, optim, lora_rank or hidden),
        ema_bytes=4 * num_trainable_parameters if ema_on_device else 0,
        activations_bytes=kept,
        working_bytes=max(loss, backward if open_layers else 0),
    )
