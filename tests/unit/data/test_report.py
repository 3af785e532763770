"""The report says what the tokens on disk say: counted here by hand."""

from __future__ import annotations

import random
import re

import pytest
from row_files import chat, list_chats, prepare_rows, read_split, write_rows
from transformers import AutoTokenizer

from forge_cli.data.judging import render_histogram
from forge_cli.data.prepare import prepare_tokens
from forge_cli.data.report import DataReport
from forge_cli.data.report_text import list_notes, render_report, render_table
from forge_cli.paths import assets_root
from forge_cli.schema.runspec import RunSpec

END = 3


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(assets_root() / "forge-tiny")


def write_tokens(tmp_path, lengths: list[int]) -> str:
    """Rows of tokens of these lengths; all but the first token are trained."""
    draw = random.Random(0)
    rows = []
    for length in lengths:
        ids = [*(draw.randrange(10, 500) for _ in range(length - 1)), END]
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return write_rows(tmp_path / "rows.jsonl", rows)


def test_lengths(tokenizer, tmp_path):
    lengths = list(range(101, 201))
    random.Random(1).shuffle(lengths)
    tokens = prepare_rows(tokenizer, train=write_tokens(tmp_path, lengths))
    split = tokens.report.splits[0]
    # Of 100 rows, the 5 % mark is the fifth in order.
    assert split.percentiles == {"5": 105, "25": 125, "50": 150, "75": 175, "95": 195, "99": 199}
    assert (split.median_tokens, split.longest_tokens) == (150, 200)
    assert (split.tokens, split.trained_tokens) == (sum(lengths), sum(lengths) - 100)
    edges = [edge for edge, _ in split.histogram]
    assert edges == sorted(edges) and edges[-1] == 200
    below = 0
    for edge, count in split.histogram:
        assert count == sum(below < length <= edge for length in lengths)
        below = edge


@pytest.mark.parametrize("on_overlong", ["drop", "truncate", "split"])
def test_the_histogram_is_of_rows_before_cutting(tokenizer, tmp_path, on_overlong):
    """The choice of max_length is made by looking at what it would cut."""
    lengths = [20, 30, 40, 50, 50, 51, 90, 130]
    settings = {"max_length": 50, "on_overlong": on_overlong, "max_lost_ratio": 1.0}
    source = {"path": write_tokens(tmp_path, lengths), "weight": 2}
    report = prepare_rows(tokenizer, train=source, **settings).report
    histogram = report.splits[0].histogram
    assert sum(count for end, count in histogram if end <= 50) == 5 and 50 in [end for end, _ in histogram]
    assert (sum(count for end, count in histogram if end > 50), histogram[-1][0]) == (3, 130)
    text = render_report(report, with_histogram=True)
    below, above = text.partition("row length of train, before cutting\n")[2].split("  -- data.max_length 50 --\n")
    ends = [[int(end) for end in re.findall(r"up to +(\d+) tokens", text)] for text in (below, above)]
    assert ends[0][-1] == 50 and min(ends[1]) > 50


def test_the_mark_stands_at_the_end_where_every_row_fits(tokenizer, tmp_path):
    (split,) = prepare_rows(tokenizer, train=write_tokens(tmp_path, [10, 12]), max_length=64).report.splits
    assert [end for end, _ in split.histogram] == [10, 11, 12]
    assert render_histogram(split).splitlines()[-1] == "  -- data.max_length 64 --"


def test_steps_with_and_without_packing(tokenizer, tmp_path):
    # Best-fit decreasing into 100: 90 | 60+40 | 60+40 | 50+50, which no other order beats: 390 tokens need four.
    path = write_tokens(tmp_path, [60, 40, 90, 50, 50, 60, 40])
    report = prepare_rows(tokenizer, train=path, max_length=100).report
    assert (report.packed_sequences, report.packed_ratio) == (4, pytest.approx(390 / 400))
    assert prepare_steps(tokenizer, path, batch=2, accumulation=2) == (2, 2, 1)
    assert prepare_steps(tokenizer, path, batch=1, accumulation=1) == (7, 7, 4)
    assert prepare_steps(tokenizer, path, batch=1, accumulation=1, packing=True) == (4, 7, 4)


def prepare_steps(tokenizer, path: str, *, batch: int, accumulation: int, packing: bool = False) -> tuple[int, ...]:
    spec = RunSpec(
        model={"name": "forge-tiny"},
        data={"train": path, "max_length": 100, "packing": packing},
        training={"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation},
    )
    report = prepare_tokens(spec, tokenizer).report
    return report.steps_per_epoch, report.steps_unpacked, report.steps_packed


def test_duplicates_are_told_from_their_tokens(tokenizer, tmp_path):
    """White space that a template keeps makes another row; a column that nothing reads does not."""
    rows = [chat("a", "b"), chat("a", "b "), {**chat("a", "b"), "id": 2}, chat("c", "d"), {**chat("a", "b"), "id": 3}]
    tokens = prepare_rows(tokenizer, train=write_rows(tmp_path / "rows.jsonl", rows))
    (split,) = tokens.report.splits
    assert split.rows_duplicate == 2
    assert len(split.duplicate_places) >= 1
    first = re.compile(r"rows.jsonl:1$")
    assert all(first.search(other) and re.search(r"rows.jsonl:[35]$", one) for one, other in split.duplicate_places)


def test_what_ends_and_what_does_not(tokenizer, tmp_path):
    rows = [
        {"input_ids": [10, 11, END]},
        {"input_ids": [10, 12, END], "labels": [10, 12, -100]},
        {"input_ids": [10, 13, END, 14], "labels": [-100, 13, END, -100]},
        {"input_ids": [10, 15], "labels": [-100, -100]},
    ]
    (split,) = prepare_rows(tokenizer, train=write_rows(tmp_path / "rows.jsonl", rows)).report.splits
    assert (split.rows_without_end, split.rows_untrained, split.trained_tokens) == (2, 1, 3 + 2 + 2)


def test_the_page_of_a_run_has_a_table_of_its_rows(tokenizer, tmp_path):
    rows = [*list_chats(9), {"messages": 5}, {"messages": 6}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    report = prepare_rows(tokenizer, train=path, eval_rows=2, on_bad_row="skip", max_bad_ratio=0.2).report
    head, rule, *lines = [line.strip("| ").split(" | ") for line in render_table(report.as_dict()["splits"])]
    assert len(rule) == len(head) and {*rule} == {"---"}, "without a cell for every column it is no table"
    train, held = (dict(zip(head, line, strict=True)) for line in lines)
    counts = ("split", "format", "rows read", "bad", "kept")
    assert [train[name] for name in counts] == ["train", "messages", "11", "2", "7"]
    assert [held[name] for name in counts] == ["eval", "messages", "2", "0", "2"]


def test_the_text_has_every_count_and_notes_say_what_is_odd(tokenizer, tmp_path):
    rows = [*[chat(f"q{i}", "a") for i in range(5)], chat("<|im_end|>", "b"), chat("q1", "a"), chat("long", "a " * 99)]
    tokens = prepare_rows(
        tokenizer,
        train=write_rows(tmp_path / "rows.jsonl", rows),
        eval=write_rows(tmp_path / "held.jsonl", [{**rows[2], "extra": 1}]),
        max_length=64,
        on_overlong="truncate",
        max_lost_ratio=0.2,
    )
    report = tokens.report
    assert DataReport.from_dict(report.as_dict()) == report
    train, held = report.splits
    text = render_report(report, with_histogram=True)
    for label, name in (("cut, too long", "rows_truncated"), ("duplicates of an earlier row", "rows_duplicate")):
        assert re.search(rf"{label} +{getattr(train, name)} +{getattr(held, name)}\n", text), text
    assert (train.rows_truncated, train.rows_lost, train.rows_duplicate, train.rows_escaped) == (1, 1, 1, 1)
    bars = re.findall(r"up to +\d+ tokens +(\d+)", text)
    assert sum(map(int, bars)) == train.rows_kept == 8
    notes = list_notes(report)
    assert len(notes) == 4 and all(note in text for note in notes)
    assert "note: columns that nothing reads: extra" in notes
    assert "held.jsonl:1" in next(note for note in notes if "trained on as well" in note)
    again = prepare_rows(
        tokenizer,
        train=str(tmp_path / "rows.jsonl"),
        eval=str(tmp_path / "held.jsonl"),
        max_length=64,
        on_overlong="truncate",
        max_lost_ratio=0.2,
    )
    assert again.report.from_cache and list_notes(again.report) == notes
    assert read_split(again) == read_split(tokens)
