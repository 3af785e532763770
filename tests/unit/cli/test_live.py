"""What the live view draws, at every width and height, and how plain lines stand beside it."""

from __future__ import annotations

import io
import sys

import pytest
from rich.cells import cell_len

from forge_cli.cli import live
from forge_cli.cli.live import LiveReporter, can_draw, choose_reporter, draw_rows, fit
from forge_cli.estimate import devices
from forge_cli.facts.gpus import find_gpu
from forge_cli.resolve.plan import resolve_mapping
from forge_cli.run.reporter import (
    PlainReporter,
    Progress,
    QuietReporter,
    format_event,
    gather_expectations,
    sparkline,
)
from forge_cli.units import GIB


def step(number: int, **figures: object) -> dict:
    base = {"loss": 2.0 - number / 100, "grad_norm": 0.5, "learning_rate": 1e-4, "seconds": 2.0, "tokens": 100}
    return {"step": number, **base, "tokens_per_second": 50.0, **figures}


def gather(*records: dict, num_steps: int = 100) -> Progress:
    progress = Progress(num_steps)
    for record in records:
        progress.take(record)
    return progress


@pytest.fixture
def full() -> Progress:
    """A run with everything that can be shown."""
    progress = gather(
        {"step": 0, "eval_loss": 2.5, "eval_ema_loss": None, "eval_seconds": 1.0},
        *[step(number) for number in range(1, 41)],
        {"step": 40, "eval_loss": 1.5, "eval_ema_loss": 1.4, "eval_seconds": 20.0},
        step(41, peak_memory_bytes=3 * GIB, **{"rewards/margins": 0.25, "rewards/accuracies": 0.75}),
        {"step": 41, "alarm": "spike", "message": "loss 9.1 in 日本語の行.jsonl row 3 \x1b[2J and more " + "x" * 200},
    )
    progress.expected = {"tokens_per_second": 100.0, "memory_bytes": 4 * GIB}
    return progress


class Screen(io.StringIO):
    """A terminal of one size that keeps what is written."""

    encoding = "utf-8"

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self.size = (width, height)

    def isatty(self) -> bool:
        return True


@pytest.fixture
def screen(monkeypatch):
    def make(width: int, height: int) -> Screen:
        made = Screen(width, height)
        monkeypatch.setattr(sys, "stderr", made)
        monkeypatch.setattr(live, "_terminal_size", lambda: made.size)
        return made

    return make


def test_everything_is_shown_where_there_is_room(full):
    rows = dict(draw_rows(full, 100, elapsed_seconds=83, left_seconds=3725, note="runs/a"))
    assert list(rows) == ["run", "step", "loss", "update", "speed", "memory", "reward", "eval", "alarm"]
    assert "41/100" in rows["step"] and "1:02:05 left, 1:23 so far" in rows["step"] and "━━" in rows["step"]
    assert rows["loss"].startswith("1.5900  █") and rows["loss"].endswith("▁  falling")
    assert rows["update"] == "lr 1.00e-04  gradient norm 0.5"
    assert rows["speed"] == "50 real tokens/s  50% of the roofline"
    assert rows["memory"] == "peak 3.00 GiB  estimated 4.00 GiB"
    assert rows["reward"] == "margin 0.250  better wins 75%"
    assert rows["eval"] == "1.5000  EMA 1.4000  at step 40  2.5000 before"
    assert rows["alarm"].startswith("step 41: loss 9.1 in 日本語") and "\\x1b[2J" in rows["alarm"]


@pytest.mark.parametrize("width", [1, 2, 10, 20, 35, 36, 40, 51, 60, 80, 200])
def test_no_row_is_wider_than_the_terminal(full, width):
    for label, text in draw_rows(full, width, elapsed_seconds=83, left_seconds=3725, note="runs/" + "a" * 90):
        written = live.style_row(label, text, width)
        for code in (live._DIM, live._YELLOW, live._PLAIN):
            written = written.replace(code, "")
        # The last column stays free: after a character there, "erase to the end" would erase that character.
        assert cell_len(written) <= max(width - 1, 1), written


def test_wide_characters_are_not_cut_in_half():
    assert [fit(["日本語日本語"], room) for room in (12, 7, 6)] == ["日本語日本語", "日本語…", "日本 …"]


def test_narrow_terminals_lose_columns_and_low_ones_rows(full, screen):
    narrow = dict(draw_rows(full, 40, elapsed_seconds=83, left_seconds=3725))
    assert narrow["step"] == "41/100  1:02:05 left" or "so far" not in narrow["step"]
    assert narrow["eval"] == "1.5000  EMA 1.4000  at step 40"
    out = screen(80, 6)
    view = LiveReporter()
    view.progress = full
    view._ended = object()
    view._paint()
    drawn = out.getvalue()
    assert [label for label in ("step", "loss", "alarm", "eval", "speed", "memory") if f"{label}  " in drawn] == [
        "step",
        "loss",
        "alarm",
        "eval",
    ]
    # Below an empty line, on which the cursor comes back to rest.
    assert drawn.count("\n") == 4 and drawn.endswith("\x1b[J\r\x1b[4A\x1b[?25h")


def test_a_block_is_redrawn_only_when_it_changed_and_lines_go_above_it(screen):
    out = screen(80, 24)
    view = LiveReporter()
    view.start(100)
    view._ended.set()  # the thread that redraws, stopped: this test redraws
    view._thread.join()
    view.record(step(1))
    view._paint()
    size = len(out.getvalue())
    view._paint()
    assert len(out.getvalue()) == size
    view.say("a line\twith \x1b[31mcodes")
    added = out.getvalue()[size:]
    assert added.startswith("\x1b[?25l\r\x1b[Ja line    with \\x1b[31mcodes\n") and "1/100" in added
    view.record({"step": 2, "alarm": "spike", "message": "too high"})
    assert "alarm at step 2: too high\n" in out.getvalue()
    view.finish()
    view.finish()
    assert out.getvalue().endswith("\x1b[J\n\x1b[?25h") and out.getvalue().count("\x1b[?25h") == 4
    view.say("after it")
    assert out.getvalue().endswith("\x1b[?25hafter it\n")


def test_no_color_leaves_no_colours(full, screen, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    out = screen(80, 24)
    view = LiveReporter()
    view.progress = full
    view._ended = object()
    view._paint()
    assert "1.5900" in out.getvalue() and "m" not in {code[-1] for code in _codes(out.getvalue())}


def _codes(text: str) -> list[str]:
    import re

    return re.findall(r"\x1b\[[?0-9;]*[a-zA-Z]", text)


@pytest.mark.parametrize(
    ("changes", "drawn"),
    [
        ({}, True),
        ({"CI": "true"}, False),
        ({"CI": "false"}, True),
        ({"TERM": "dumb"}, False),
        ({"TERM": None}, False),
        ({"NO_COLOR": "1"}, True),
    ],
)
def test_blocks_are_for_terminals_with_people_before_them(screen, monkeypatch, changes, drawn):
    screen(80, 24)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in changes.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    assert can_draw() is drawn
    assert isinstance(choose_reporter(False, 5), LiveReporter if drawn else PlainReporter)
    assert isinstance(choose_reporter(True, 5), QuietReporter)


def test_pipes_and_other_encodings_get_lines(screen, monkeypatch):
    out = screen(80, 24)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(out, "isatty", lambda: False)
    assert not can_draw()
    monkeypatch.setattr(out, "isatty", lambda: True)
    monkeypatch.setattr(Screen, "encoding", "iso-8859-1")
    assert not can_draw()


def test_the_time_left_is_that_of_the_last_steps():
    # Slow steps long ago count no more, and a resumed run has only its own.
    assert (
        gather(*[step(n, seconds=9.0) for n in range(1, 21)], *[step(n) for n in range(21, 41)]).seconds_left() == 120
    )
    assert gather(*[step(n, seconds=1.0) for n in range(91, 96)]).seconds_left() == 5
    # The first step warms up; evaluations count with their share.
    assert gather(step(1, seconds=30.0), *[step(n) for n in range(2, 6)]).seconds_left() == 190
    half = gather(step(1), step(2), {"step": 2, "eval_loss": 1.0, "eval_seconds": 1.0})
    assert half.seconds_left() == 98 * 2.5 and half.training_seconds == 5
    assert gather(step(1), num_steps=0).seconds_left() is None and gather().seconds_left() is None


def test_a_run_that_goes_back_forgets_the_losses_it_makes_again():
    progress = gather(*[step(n) for n in range(1, 11)], step(6, loss=7.0))
    assert [number for number, _ in progress.losses] == [1, 2, 3, 4, 5, 6] and progress.step == 6


def test_lost_numbers_are_shown_and_never_drawn(screen):
    progress = gather(
        step(1),
        step(2),
        {"step": 3, "loss": "nan", "grad_norm": "inf", "skipped": True, "seconds": 2.0},
        step(4, loss=float("nan"), grad_norm="nan", tokens_per_second=None),
    )
    rows = dict(draw_rows(progress, 80))
    assert (
        rows["loss"].startswith("nan  █▁") and "gradient norm nan" in rows["update"] and rows["step"].startswith("4/")
    )
    assert (
        format_event({"step": 0, "eval_loss": "nan", "eval_ema_loss": "inf"})
        == "before training  eval loss nan, EMA inf"
    )


def test_how_many_steps_may_be_unknown():
    rows = dict(draw_rows(gather(step(7), num_steps=0), 80, elapsed_seconds=5))
    assert rows["step"] == "7  0:05 so far"


def test_lines_of_losses():
    assert sparkline([1.0]) == "" and sparkline([1.0, 1.0]) == "▁▁" and sparkline([3, 2, 1]) == "█▅▁"
    assert len(sparkline(list(range(1000)), 30)) <= 30


def test_plain_lines(capsys):
    reporter = PlainReporter(2)
    reporter.expect(first_step=2, tokens_per_second=5.0, memory_bytes=None)
    assert reporter.progress.step == 2
    reporter.start(6)
    for record in (step(3), step(4), {"step": 4, "eval_loss": 1.0, "eval_ema_loss": 0.9}, step(6)):
        reporter.record(record)
    reporter.record({"step": 6, "alarm": "spike", "message": "a\x1b[2Jb"})
    assert capsys.readouterr().err.splitlines() == [
        "step 4/6  loss 1.9600  lr 1.00e-04  grad 0.5  50 tokens/s  0:04 left",
        "step 4/6  eval loss 1.0000, EMA 0.9000",
        "step 6/6  loss 1.9400  lr 1.00e-04  grad 0.5  50 tokens/s",
        "alarm at step 6: a\\x1b[2Jb",
    ]


def test_what_is_expected_of_a_gpu(tiny_settings, monkeypatch):
    plan = resolve_mapping(tiny_settings(lora={"r": 4}))
    assert gather_expectations(plan, on_gpu=False) == {"tokens_per_second": None, "memory_bytes": None}
    monkeypatch.setattr(devices, "find_visible", lambda: devices.from_gpu(find_gpu("h100")))
    found = gather_expectations(plan, on_gpu=True)
    assert found["tokens_per_second"] > 100 and found["memory_bytes"] > 1e6
    monkeypatch.setattr(devices, "find_visible", lambda: None)
    assert gather_expectations(plan, on_gpu=True) == {"tokens_per_second": None, "memory_bytes": found["memory_bytes"]}
