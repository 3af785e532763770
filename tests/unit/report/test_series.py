"""Curves out of records: what counts, smoothing and thinning; and what is told of a run that has not ended."""

from __future__ import annotations

import pytest

from forge_cli.report.series import MOST_POINTS, Series, read_groups, read_marks, read_series
from forge_cli.report.unfinished import describe_progress, gather_report
from forge_cli.resolve.plan import resolve_plan


def test_the_last_line_of_a_step_counts():
    records = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 3.0}]
    records.append({"step": 3, "loss": 4.0, "skipped": True})
    assert read_series(records, "loss") == Series([1, 2], [1.0, 2.0])


@pytest.mark.parametrize("value", ["nan", "inf", None, float("nan"), True])
def test_what_is_no_number_is_left_out(value):
    assert not read_series([{"step": 1, "loss": value}], "loss")


def test_smoothing_keeps_a_constant_and_does_not_lag():
    assert Series([1, 2, 3], [5.0, 5.0, 5.0]).smooth().values == pytest.approx([5, 5, 5])
    line = Series(list(range(1000)), [float(value) for value in range(1000)])
    assert line.smooth().values[500] == pytest.approx(500)
    jagged = Series(list(range(100)), [float(value % 2) for value in range(100)]).smooth()
    assert max(jagged.values) - min(jagged.values) < 0.5


def test_thinning_keeps_ends_and_spikes():
    values = [0.0] * 10_000
    values[7777] = 50.0
    thin = Series(list(range(10_000)), values).thin()
    assert len(thin.steps) <= MOST_POINTS + 2
    assert thin.steps[0] == 0 and thin.steps[-1] == 9999 and thin.values[thin.steps.index(7777)] == 50


def test_groups_are_cut_to_the_most_norms():
    records = [{"step": step, "group_norms": {"a": 1.0, "b": "nan"}} for step in range(100)]
    steps, groups = read_groups(records, most=40)
    assert len(steps) <= 20 and steps[0] == 0
    assert groups == {"a": [1.0] * len(steps), "b": [None] * len(steps)}
    assert read_groups([]) == ([], {})


def test_marks_tell_bad_steps_from_alarms():
    records = [
        {"step": 1, "alarm": "spike", "message": "high"},
        {"step": 2, "skipped": True, "alarm": "skipped", "message": "nan"},
        {"step": 2, "skipped": True, "loss": "nan"},
        {"step": 3, "diverged": True},
    ]
    assert read_marks(records) == ({2: "nan", 3: "diverged"}, {1: "high"})


RUN_FILE = """\
model: {name: forge-tiny}
data: {train: "forge:quickstart/train", max_length: 128}
seed: 7  # run.yaml:9:7
training: {max_steps: 9}
"""


@pytest.mark.parametrize(
    ("last", "holder", "state"),
    [
        ({"loss": 1.0}, "", "stopped"),
        ({"loss": 1.0}, "process 1", "in use by process 1"),
        ({"loss": "nan", "diverged": True}, "", "it diverged"),
    ],
)
def test_an_unfinished_run_says_how_far_it_came(tmp_path, last, holder, state):
    (tmp_path / "plan.yaml").write_text(RUN_FILE)
    records = [{"step": 0, "eval_loss": 2.0}, {"step": 3, "loss": 1.25}, {"step": 4, **last}]
    report = gather_report("x", resolve_plan(tmp_path / "plan.yaml"), RUN_FILE, records)
    assert report["plan"]["seed"] == {"value": 7, "from": "run.yaml:9:7"}  # as the comment says
    assert report["plan"]["training.max_steps"]["from"].endswith("plan.yaml:4:12")
    lines = describe_progress(report, records, holder)
    assert lines[0] == f"not finished, step 4 of 9: {state}"
    assert lines[1].startswith("training loss 1.2500 at step 3") and lines[2] == "0 alarms"


def test_a_run_whose_plan_cannot_be_read_is_still_described():
    report = gather_report("x", None, "", [])
    assert describe_progress(report, [], "") == ["not finished, step 0: stopped", "0 alarms"]
