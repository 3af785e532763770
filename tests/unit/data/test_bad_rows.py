"""Bad rows: one line per kind of fault, and a hint that works when it is followed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from row_files import chat, list_chats, prepare_rows, write_rows
from transformers import AutoTokenizer

from forge_cli.data.bad_rows import LISTED_KINDS, BadRows
from forge_cli.data.report_text import list_notes
from forge_cli.errors import DataError
from forge_cli.paths import assets_root
from forge_cli.schema.data import DataSection


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(assets_root() / "forge-tiny")


def empty_answer(turns: int) -> dict:
    """A conversation whose last turn is an empty answer; the fault names the number of the turn."""
    return chat(*["a"] * (turns - 1), "")


def refuse(tokenizer, rows: list, **data) -> list[str]:
    write_rows(Path("rows.jsonl"), rows)
    with pytest.raises(DataError) as caught:
        prepare_rows(tokenizer, train="rows.jsonl", **data)
    return [str(problem) for problem in caught.value.problems]


def test_a_kind_of_fault_has_one_line(tokenizer):
    rows = [*list_chats(5), *[empty_answer(2 + 2 * (i % 3)) for i in range(30)], chat("a", "\ud800"), empty_answer(2)]
    first, second, last = refuse(tokenizer, rows)
    assert re.fullmatch(r"rows.jsonl:6: turn 2 is an empty answer \(and 30 more rows like this\).*", first), first
    assert second.startswith("rows.jsonl:36: ") and "more row" not in second
    assert last.startswith("32 of 37 rows are bad")


def test_one_row_is_not_rows(tokenizer):
    first, last = refuse(tokenizer, [*list_chats(2), empty_answer(2), empty_answer(4)])
    assert "(and 1 more row like this)" in first
    *_, last = refuse(tokenizer, [*list_chats(200), empty_answer(2)])
    assert last == "1 of 201 rows is bad; mend them, or set data.on_bad_row: skip"
    assert refuse(tokenizer, [empty_answer(2)])[-1] == "1 of 1 row is bad; mend them"


def test_kinds_beyond_the_list_are_counted():
    bad = BadRows(DataSection(train="rows.jsonl"))
    for i in range(LISTED_KINDS + 3):
        bad.add(f"rows.jsonl:{i + 1}", f"the columns are {'x' * (i + 1)}")
    with pytest.raises(DataError) as caught:
        bad.settle(100)
    *listed, more, _ = map(str, caught.value.problems)
    assert len(listed) == LISTED_KINDS and more == "and 3 more rows have other faults"


@pytest.mark.parametrize(
    ("bad", "good", "data"),
    [
        (1, 199, {}),
        (1, 4, {}),
        (29, 71, {}),
        (7, 93, {"on_bad_row": "skip"}),
        (2, 1, {"on_bad_row": "skip", "max_bad_ratio": 0.5}),
        (1, 999, {"max_bad_ratio": 0.0001}),
        (199, 1, {}),
    ],
)
def test_what_the_hint_says_works(tokenizer, bad, good, data):
    rows = [*list_chats(good), *[{"messages": 5}] * bad]
    last = refuse(tokenizer, rows, **{**data, **({} if "on_bad_row" in data else {"on_bad_row": "error"})})[-1]
    hint = last.rpartition("mend them, or set ")[2]
    settings = {}
    for setting in hint.split(" and "):
        settings |= yaml.safe_load(setting.removeprefix("data."))
    report = prepare_rows(tokenizer, train="rows.jsonl", **{**data, **settings}).report.splits[0]
    assert (report.rows_bad, report.rows_kept) == (bad, good)
    assert ("max_bad_ratio" in settings) == (bad / (bad + good) > data.get("max_bad_ratio", 0.01)), "only where needed"


@pytest.mark.parametrize("data", [{}, {"on_bad_row": "skip"}])
def test_nothing_is_offered_where_no_row_would_be_left(tokenizer, data):
    assert refuse(tokenizer, [{"messages": 5}] * 3, **data)[-1].endswith("; mend them")


def test_skipped_rows_of_both_passes_are_in_the_note(tokenizer):
    """Half a character comes to light when rows are rendered, in the second pass."""
    rows = [*list_chats(6), *[{"messages": 5}] * 3, chat("a", "b \ud800")]
    write_rows(Path("rows.jsonl"), rows)
    report = prepare_rows(tokenizer, train="rows.jsonl", on_bad_row="skip", max_bad_ratio=0.4).report
    (note,) = list_notes(report)
    assert note.startswith("note: 4 rows of train were skipped (rows.jsonl:7: messages is not a list of turns")
    assert "(and 2 more rows like this); rows.jsonl:10: the text contains half a character" in note
    json.dumps(report.as_dict())
