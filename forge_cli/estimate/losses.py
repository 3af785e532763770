"""The output layer and the loss, as TRL's trainers and transformers compute them, in sizes only."""

from __future__ import annotations

from forge_cli.estimate.operations import FP32, Operations
from forge_cli.estimate.setting import Setting
from forge_cli.estimate.tape import Tensor

# Source: TRL 1.16, ``kernels/chunked_logprob.py`` and ``trainer/utils.py``.
TILE_TOKENS = 4096
TILE_VOCABULARY = 32768


def fused_loss(ops: Operations, setting: Setting, hidden: Tensor, head: Tensor) -> Tensor:
    """TRL's loss: logits exist in tiles of at most 4096 tokens x 32768 words, and are computed again backwards.

    Source: TRL 1.16, ``ChunkedLogProbFunction`` and ``add_fused_lm_head``; every token but the last of a sequence is
    taken as trained.
    """
    width, vocabulary = setting.facts.hidden_size, setting.facts.vocab_size
    tokens = setting.num_sequences * (setting.sequence_length - 1)
    hidden = ops.slice(hidden, tokens * width)
    if ops.formats.cuda:
        hidden = _gather(ops, hidden)
    elif setting.num_sequences > 1:
        hidden = ops.copy(hidden)
    size, head_size, head_trains = hidden.itemsize, head.itemsize, head.needs_grad
    compute = ops.formats.compute_bytes if ops.formats.autocast else size
    tile = (min(tokens, TILE_TOKENS), min(vocabulary, TILE_VOCABULARY))
    capped = setting.facts.model_type == "gemma2"  # tanh bounds its logits, and is kept for its gradient

    rounds = -(-tokens // TILE_TOKENS) * -(-vocabulary // TILE_VOCABULARY)

    def run_tiles(copies: float, keeps_cast: bool) -> None:
        """What tiles need beside the buffer: casts, and on the CPU the arithmetic that Triton does in place."""
        held = [ops.new(tile[0] * width, compute)] if compute != size else []
        if compute != head_size:
            held.append(ops.new(tile[1] * width, compute))
            if keeps_cast and rounds > 1:
                del held[-1]
                ops.new(
                    _widest_pair(vocabulary) * width, compute
                )  # the last round's cast is held while the next is made
                held.append(ops.new(tile[1] * width, compute))
            elif not keeps_cast:
                held.pop()
        if not ops.formats.cuda:
            held.append(ops.new(round(tile[0] * tile[1] * copies), FP32))

    def backward(g):
        of_hidden = ops.new(tokens * width, FP32)
        of_head = ops.new(vocabulary * width, FP32) if head_trains else None
        buffer = ops.new(tile[0] * TILE_VOCABULARY, compute)
        run_tiles(7.25 + capped, keeps_cast=True)
        if size != FP32:
            of_hidden = ops.new(tokens * width, size)
        if of_head is not None and head_size != FP32:
            of_head = ops.new(vocabulary * width, head_size)
        del buffer
        return [of_hidden, of_head]

    statistics = [ops.new(tokens, FP32) for _ in range(7)]
    buffer = ops.new(tile[0] * TILE_VOCABULARY, compute)
    run_tiles(3.25, keeps_cast=False)
    kept = [ops.new(tokens, FP32) for _ in range(3)]
    (log_probs,) = ops.tape.apply((hidden, head), [(tokens, FP32)], backward, (hidden, head, *kept))
    del buffer, statistics
    return _sum(ops, ops.scale(log_probs))


def _widest_pair(vocabulary: int) -> int:
    """Returns the words of two rounds in a row; the last chunk of the vocabulary may be narrower."""
    if vocabulary <= TILE_VOCABULARY:
        return 2 * vocabulary
    return 2 * TILE_VOCABULARY if vocabulary >= 2 * TILE_VOCABULARY else vocabulary


def plain_loss(ops: Operations, setting: Setting, hidden: Tensor, head: Tensor) -> Tensor:
    """All logits at once: 16-bit logits, an fp32 copy, its log-softmax, and the gradients of the three.

    Source: transformers 5.23, ``ForCausalLMLoss`` under its Trainer.
    """
    width, vocabulary = setting.facts.hidden_size, setting.facts.vocab_size
    logits = ops.linear(hidden, head, None, width, vocabulary)
    wide = ops.cast(logits, FP32)
    del logits
    return _sum(ops, ops.unary(wide, saves_output=True))


def score_loss(ops: Operations, setting: Setting, hidden: Tensor, head: Tensor) -> Tensor:
    """A reward model's loss: one score per sequence.

    Source: transformers 5.23, ``GenericForSequenceClassification``.
    """
    return _sum(ops, ops.linear(hidden, head, None, setting.facts.hidden_size, 1))


def _gather(ops: Operations, x: Tensor) -> Tensor:
    """``hidden[mask]``: a copy; its gradient is written into zeros."""
    (y,) = ops.tape.apply((x,), [(x.numel, x.itemsize)], lambda g: [ops.new(g[0].numel, g[0].itemsize)])
    return y


def _sum(ops: Operations, x: Tensor) -> Tensor:
    numel = x.numel
    (y,) = ops.tape.apply((x,), [(1, FP32)], lambda g: [ops.new(numel, FP32)])
    return y
