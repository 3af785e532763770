"""The guard: which steps are skipped, when a run goes back, when it ends, and what is left out from then on."""

from __future__ import annotations

import copy
import math
from typing import get_args

import pytest
import torch
from torch import distributed, multiprocessing
from transformers import Trainer, TrainingArguments

from forge_cli.backend.guarding import ExcludingCollator
from forge_cli.backend.watching import RowCollator
from forge_cli.parts.guard import CLEAN_STEPS, Guard, Verdict, agree
from forge_cli.schema.training import TrainingSection

ACCEPT, OVERFLOW, SKIP, ROLL_BACK, STOP = Verdict
NAN = math.nan


def judge_all(guard: Guard, losses: list[float], *, norm: float = 1.0, **options) -> list[Verdict]:
    return [guard.judge(loss, norm, [row], **options)[0] for row, loss in enumerate(losses)]


@pytest.mark.parametrize("bad", [{"loss": NAN}, {"loss": math.inf}, {"norm": NAN}, {"norm": math.inf}])
def test_three_skips_go_back_twice_and_then_end_the_run(bad):
    guard = Guard(most_skips=3, most_rollbacks=2)
    verdicts = [guard.judge(**{"loss": 1.0, "norm": 1.0, **bad})[0] for _ in range(9)]
    assert verdicts == [SKIP, SKIP, ROLL_BACK] * 2 + [SKIP, SKIP, STOP]


def test_without_checkpoints_the_third_skip_ends_the_run():
    assert judge_all(Guard(most_skips=3), [NAN] * 3) == [SKIP, SKIP, STOP]


def test_a_plain_trainer_stops_at_once():
    assert judge_all(Guard(), [1.0, NAN]) == [ACCEPT, STOP]


def test_skips_are_forgiven_after_enough_good_steps_in_a_row():
    for good, last in ((CLEAN_STEPS - 1, ROLL_BACK), (CLEAN_STEPS, SKIP)):
        guard = Guard(most_skips=3, most_rollbacks=1)
        assert judge_all(guard, [NAN, NAN, *[1.0] * good, NAN])[-1] is last
    assert guard.suspects == {CLEAN_STEPS + 2}  # the rows of forgiven steps are forgiven, too


def test_an_overflow_is_the_scalers_and_twenty_in_a_row_are_not():
    guard = Guard(most_skips=3, most_rollbacks=2)
    overflow = {"norm": math.inf, "has_scaler": True}
    assert judge_all(guard, [1.0] * 20, **overflow) == [OVERFLOW] * 20
    assert judge_all(guard, [1.0]) == [ACCEPT]
    assert judge_all(guard, [1.0] * 21, **overflow) == [OVERFLOW] * 20 + [STOP]
    assert judge_all(Guard(most_skips=3), [NAN], **overflow) == [SKIP]


@pytest.mark.parametrize(
    ("on_spike", "verdicts"),
    [
        ("warn", [ACCEPT] * 4),
        ("skip", [SKIP, SKIP, ROLL_BACK, ACCEPT]),
        ("rollback", [ROLL_BACK, ROLL_BACK, STOP, ACCEPT]),
        ("stop", [STOP, STOP, STOP, ACCEPT]),
    ],
)
def test_spikes_are_judged_as_configured(on_spike, verdicts):
    guard = Guard(on_spike, 3.0, 5, most_skips=3, most_rollbacks=2)
    assert judge_all(guard, [9.0, 1.0, 1.0, 1.0, 1.0]) == [ACCEPT] * 5  # not before the window is full
    assert judge_all(guard, [3.1, 3.1, 3.1, 2.9]) == verdicts


def test_an_exploding_gradient_is_a_spike():
    guard = Guard("skip", 3.0, 5, most_skips=3)
    assert judge_all(guard, [1.0] * 5) == [ACCEPT] * 5
    verdict, reason = guard.judge(1.0, 1e6)
    assert verdict is SKIP and "gradient norm 1e+06 is 1000000 times" in reason
    assert guard.judge(1.0, 900.0)[0] is ACCEPT


def test_neither_nan_nor_spikes_enter_the_window():
    guard = Guard("skip", 3.0, 5, most_skips=9)
    judge_all(guard, [1.0, 1.1, NAN, 0.9, 1.0, 1.2, 50.0, math.inf])
    guard.judge(2.0, math.inf, has_scaler=True)
    assert list(guard.losses) == [1.0, 1.1, 0.9, 1.0, 1.2] and list(guard.norms) == [1.0] * 5


def test_what_was_decided_by_going_back_survives_it():
    guard = Guard("skip", 3.0, 5, most_skips=2, most_rollbacks=2)
    guard.judge(1.0, 1.0)
    guard.judge(NAN, 1.0, [3, 4])
    saved = copy.deepcopy(guard.state_dict())  # a checkpoint between two skipped steps
    excluded = guard.excluded
    assert guard.judge(NAN, 1.0, [7])[0] is ROLL_BACK
    guard.load_state_dict(saved)
    assert guard.num_rollbacks == 1 and guard.num_skips == 0 and not guard.suspects
    assert guard.excluded is excluded and excluded == {3, 4, 7}  # the collator looks at this very set

    fresh = Guard("skip", 3.0, 5, most_skips=2, most_rollbacks=2)
    fresh.load_state_dict(guard.state_dict())
    assert fresh.state_dict() == guard.state_dict()
    assert [fresh.judge(NAN, 1.0)[0] for _ in range(4)] == [SKIP, ROLL_BACK, SKIP, STOP]
    resumed = Guard("skip", 3.0, 5, most_skips=2, most_rollbacks=2)
    resumed.load_state_dict(saved)  # in a new process the count goes on
    assert resumed.suspects == {3, 4} and resumed.judge(NAN, 1.0)[0] is ROLL_BACK


def _answer(rank: int, path: str, queue) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    guard = Guard(most_skips=9)
    queue.put((rank, [int(guard.judge(loss, 1.0)[0]) for loss in ((NAN, 1.0) if rank else (1.0, 1.0))]))
    distributed.destroy_process_group()


def test_one_process_makes_all_of_them_skip(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_answer, args=(rank, tmp_path / "meet", queue)) for rank in range(2)]
    for process in processes:
        process.start()
    answers = dict(queue.get() for _ in processes)
    for process in processes:
        process.join(20)
    assert answers == {0: [SKIP, ACCEPT], 1: [SKIP, ACCEPT]}
    assert agree(SKIP) is SKIP


# bitsandbytes' optimizers begin with 4096 elements to use 8 bits.
@pytest.mark.parametrize("optim", get_args(TrainingSection.model_fields["optim"].annotation))
def test_a_step_without_gradients_leaves_every_bit(optim, tmp_path):
    args = TrainingArguments(output_dir=tmp_path, optim=optim, learning_rate=1e-2, weight_decay=0.1, use_cpu=True)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 128))
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    optimizer = kind(model.parameters(), **{"lr": 1e-2, **options})

    def read() -> list[bytes]:
        state = [v for one in optimizer.state_dict()["state"].values() for v in one.values()]
        tensors = [*model.parameters(), *(one for one in state if isinstance(one, torch.Tensor))]
        return [t.detach().contiguous().view(torch.uint8).numpy().tobytes() if t.dim() else t.item() for t in tensors]

    def step() -> bool:
        before = read()
        optimizer.step()
        return read() == before

    for _ in range(2):
        model(torch.randn(4, 128)).square().sum().backward()
        assert not step()
    optimizer.zero_grad(set_to_none=True)
    assert step()


def collate(rows: list[dict]) -> dict:
    return {"seen": rows}


def make(excluded: set[int]) -> ExcludingCollator:
    return ExcludingCollator(RowCollator(collate), excluded)


def test_nothing_is_learned_of_an_excluded_row():
    rows = [{"row": n, "input_ids": [n, 5, 6], "labels": [-100, 5, 6]} for n in (1, 2)]
    batch = make({2, 9})(rows)
    assert [one["labels"] for one in batch["seen"]] == [[-100, 5, 6], [-100] * 3]
    assert [one["input_ids"] for one in batch["seen"]] == [[1, 5, 6], [2, 5, 6]]
    assert batch["rows"] == [1] and batch["real_tokens"] == 6
    assert make({1, 2})(rows)["real_tokens"] == 0 and make({1, 2})(rows)["rows"] == []
    assert make({9})(rows) == make(set())(rows) == RowCollator(collate)(rows)
    assert rows[1]["labels"] == [-100, 5, 6]  # the data set's own row


def test_of_a_packed_sequence_only_the_excluded_part_is_masked():
    sequence = {"rows": [4, 7, 8], "seq_lengths": [2, 3, 1], "input_ids": [*range(6)], "labels": [*range(6)]}
    batch = make({7})([sequence])
    assert batch["seen"][0]["labels"] == [0, 1, -100, -100, -100, 5]
    assert batch["rows"] == [4, 8] and batch["real_tokens"] == 6
    assert make({4, 7, 8})([sequence])["real_tokens"] == 0


def test_a_pairs_place_is_taken_by_a_good_one():
    rows = [{"row": n, "prompt_ids": [n], "chosen_ids": [1], "rejected_ids": [2]} for n in range(4)]
    batch = make({1, 3})(rows)
    assert [one["prompt_ids"] for one in batch["seen"]] == [[0], [2], [2], [2]] and batch["rows"] == [0, 2]
    assert make({0, 1, 2, 3})(rows)["real_tokens"] == 0 and len(make({0, 1, 2, 3})(rows)["seen"]) == 4
