"""Batches with the numbers of their rows, and means of batches as means of rows."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import pytest
import torch

from forge_cli.backend.experimental import load_experimental
from forge_cli.backend.preference import ForgeKTOTrainer, ForgeRewardTrainer, drop_ties, mean_rewards
from forge_cli.backend.watching import RowCollator, WatchedTrainer
from forge_cli.resolve.rules_preference import LOSSES

PAIR = {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6]}


def collate_plainly(examples: list[dict]) -> dict:
    return {"examples": examples}


@pytest.mark.parametrize(
    ("rows", "numbers", "tokens"),
    [
        (
            [{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "row": 7}, {"input_ids": [1], "labels": [1], "row": 2}],
            [2, 7],
            4,
        ),
        ([{"input_ids": [1, 2, 3, 4], "rows": [5, 5, 9, 9]}], [5, 9], 4),
        ([{"input_ids": [1, 2]}], [], 2),
        ([{**PAIR, "row": 3}], [3], 2 * 2 + 3 + 1),
        ([{"prompt_ids": [1, 2], "completion_ids": [3], "label": True, "row": 4}], [4], 3),
    ],
    ids=["sft", "packed", "without numbers", "pair", "marked"],
)
def test_a_batch_knows_its_rows_and_its_real_tokens(rows, numbers, tokens):
    batch = RowCollator(collate_plainly)(rows)
    assert batch["rows"] == numbers
    assert batch["real_tokens"] == tokens
    assert all({"row", "rows"}.isdisjoint(example) for example in batch["examples"]), "not for TRL, not for the model"


def test_columns_take_the_form_of_each_trainer():
    rows = [{"prompt_ids": [n], "completion_ids": [10 * n], "label": True} for n in (1, 2, 3)]
    trainer = ForgeKTOTrainer.__new__(ForgeKTOTrainer)
    trainer.calculate_KL = True
    assert [row["KL_completion_ids"] for row in trainer.reshape_rows(rows)] == [[30], [10], [20]]
    trainer.train_dataset = [{"completion_ids": [7]}]
    assert [row["KL_completion_ids"] for row in trainer.reshape_rows(rows[:1])] == [[7]], "its own would be no KL"
    trainer.calculate_KL = False
    assert trainer.reshape_rows(rows) == rows

    assert ForgeRewardTrainer.reshape_rows(None, [PAIR]) == [{"chosen_ids": [1, 2, 3, 4, 5], "rejected_ids": [1, 2, 6]}]

    for method in ("orpo", "cpo"):
        [row] = load_experimental(method)[0].reshape_rows(None, [PAIR])
        assert row["chosen_input_ids"] == [1, 2, 3, 4, 5]
        assert row["chosen_labels"] == [-100, -100, 3, 4, 5]
        assert row["rejected_labels"] == [-100, -100, 6]
        assert row["rejected_attention_mask"] == [1, 1, 1]


def split_into_batches(values: list, sizes: list[int]) -> list[list]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [values[end - size : end] for end, size in zip(ends, sizes, strict=True)]


@pytest.mark.parametrize("sizes", [[12], [5, 5, 2], [1] * 12])
def test_rewards_of_pairs_are_means_over_all_pairs(sizes):
    generator = random.Random(1)
    chosen, rejected = ([generator.gauss(0, 1) for _ in range(12)] for _ in range(2))

    def mean(values) -> float:
        return sum(values) / len(values)

    names = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": [c - r for c, r in zip(chosen, rejected, strict=True)],
        "rewards/accuracies": [float(c > r) for c, r in zip(chosen, rejected, strict=True)],
        "logps/chosen": [10 * c for c in chosen],
    }
    batches = {name: [mean(part) for part in split_into_batches(values, sizes)] for name, values in names.items()}
    found = mean_rewards(batches, [(size, size) for size in sizes])
    assert found == pytest.approx({name: mean(values) for name, values in names.items()})


def test_rewards_of_marked_answers_leave_out_batches_without_the_kind():
    # Good: 1, 2, 3 in batches of 2, 0 and 1. Bad: 5, 7 in batches of 0, 2 and 0.
    batches = {"rewards/chosen": [1.5, 3.0], "rewards/rejected": [6.0], "rewards/margins": []}
    assert mean_rewards(batches, [(2, 0), (0, 2), (1, 0)]) == pytest.approx(
        {"rewards/chosen": 2.0, "rewards/rejected": 6.0, "rewards/margins": -4.0}
    )


def test_a_tie_is_no_defeat():
    names = ("rewards/chosen", "rewards/rejected", "rewards/margins")
    figures = {**{name: [0.0] for name in names}, "rewards/accuracies": [0.0]}
    drop_ties(figures)
    assert figures == {name: [0.0] for name in names}
    lost = {"rewards/chosen": [-0.1], "rewards/rejected": [0.1], "rewards/margins": [-0.2], "rewards/accuracies": [0.0]}
    expected = {name: [*values] for name, values in lost.items()}
    drop_ties(lost)
    assert lost == expected


def test_a_loss_of_two_means_adds_up():
    trainer = WatchedTrainer.__new__(WatchedTrainer)

    def terms(*pairs) -> list:
        return [(torch.tensor(value), torch.tensor(weight)) for value, weight in pairs]

    trainer._eval_means = [terms((1.0, 2), (0.5, 10)), terms((4.0, 1), (0.2, 30))]
    assert trainer._mean_of_batches() == pytest.approx((1 * 2 + 4 * 1) / 3 + (0.5 * 10 + 0.2 * 30) / 40)


def test_losses_of_dpo_are_those_of_the_installed_trl():
    """A new one is to be offered, a lost one to be refused."""
    source = Path(sys.modules["trl.trainer.dpo_trainer"].__file__).read_text(encoding="utf-8")
    assert set(re.findall(r'loss_type == "(\w+)"', source)) == set(LOSSES["dpo"])
