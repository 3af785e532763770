"""The mean loss of rows of many lengths: by hand, and padding counts for nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from forge_cli.parts.labels import IGNORED
from forge_cli.results.evaluate import Row, _cut_batches, measure_loss


class Bigrams(nn.Module):
    """Gives the next token's logits by the present one alone, and notes the masks that it saw."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 5)
        self.masks: list[list[list[int]]] = []

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def forward(self, input_ids, attention_mask, use_cache):
        self.masks.append(attention_mask.tolist())
        return SimpleNamespace(logits=self.table(input_ids))


def test_the_mean_is_over_tokens_and_padding_counts_for_nothing():
    model = Bigrams()
    rows = [Row([1, 2, 3], [IGNORED, 2, 3]), Row([4, 1], [IGNORED, 1])]
    steps = [(1, 2), (2, 3), (4, 1)]
    with torch.no_grad():
        by_hand = -sum(model.table.weight[now].log_softmax(0)[then].item() for now, then in steps) / 3
    assert measure_loss(model, rows, pad_id=0) == pytest.approx(by_hand, rel=1e-6)
    assert model.masks == [[[1, 1, 1], [1, 1, 0]]]


def test_a_batch_stays_below_its_tokens_and_a_row_is_never_cut():
    rows = [Row([1] * length, []) for length in (1500, 1500, 2, 1)]
    assert [len(batch) for batch in _cut_batches(rows, 2048)] == [1, 1, 2]
    assert [len(batch) for batch in _cut_batches(rows, 100)] == [1, 1, 2]
