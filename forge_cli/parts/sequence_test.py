"""Do rows that share a sequence see each other? Asked of the model itself, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Collate = Callable[[list[dict]], dict]
MOST_TOKENS = 128  # of each row: the logits of the whole vocabulary are built
# Nats. A leak moves most tokens of a row by more than these, rounding by far less.
TOLERANCE_FLOAT32 = 1e-3
TOLERANCE_16_BIT = 0.2


@torch.no_grad()
def measure_leak(
    model: torch.nn.Module, rows: Sequence[list[int]], collate: Collate, autocast_dtype: torch.dtype = torch.float32
) -> float:
    """Measures how much rows change when they share a sequence.

    Args:
        model: A causal language model; it is put into evaluation mode and back.
        rows: Token ids of a few rows ``[T]``; their first 128 tokens are used.
        collate: Makes one joined batch of a sequence with ``input_ids``, ``labels`` and ``seq_lengths``.
        autocast_dtype: Format of mixed precision; float32 when there is none.

    Returns:
        The largest mean difference of a row's token log probabilities, joined and alone. Units: nats.
    """
    rows = [ids[:MOST_TOKENS] for ids in rows]
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(model.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not torch.float32):
            joined = [one for ids in rows for one in ids]
            batch = collate([{"input_ids": joined, "labels": joined, "seq_lengths": [len(ids) for ids in rows]}])
            together = _read_log_probs(
                model, {k: v for k, v in batch.items() if k not in ("labels", "rows", "real_tokens")}
            )
            start, worst = 0, 0.0
            for ids in rows:
                alone = _read_log_probs(model, {"input_ids": torch.tensor([ids])})
                difference = together[start : start + len(ids) - 1] - alone
                worst = max(worst, difference.abs().mean().item())
                start += len(ids)
    finally:
        model.train(was_training)
    return worst


def _read_log_probs(model: torch.nn.Module, batch: dict[str, object]) -> torch.Tensor:
    """Returns the log probability of every token but the first. Shapes: ``[1, T]`` to ``[T - 1]``."""
    batch = {name: one.to(model.device) if torch.is_tensor(one) else one for name, one in batch.items()}
    logits = model(**batch, use_cache=False).logits[0, :-1].float()
    wanted = batch["input_ids"][0, 1:]
    return torch.log_softmax(logits, dim=-1).gather(-1, wanted[:, None])[:, 0]
