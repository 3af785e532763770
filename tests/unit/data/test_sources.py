"""Several sources, patterns, packed files and renamed columns become one set, and every row keeps its place."""

from __future__ import annotations

import json

import pytest
from row_files import chat, list_chats, prepare_rows, read_split, write_rows
from transformers import AutoTokenizer

from forge_cli.data import tokenizing
from forge_cli.data.outcomes import Limits
from forge_cli.data.row_tokens import RowTokenizer
from forge_cli.errors import DataError, MemoryExceeded
from forge_cli.parts.rendering import Renderer
from forge_cli.parts.turns import RowError
from forge_cli.paths import assets_root

KINDS = ["jsonl", "json", "jsonl.gz", "jsonl.zst", "parquet", "arrow"]
BAD = {"messages": [{"role": "boss", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(assets_root() / "forge-tiny")


def render(tokenizer, row: dict) -> list[int]:
    return tokenizer(tokenizer.apply_chat_template(row["messages"], tokenize=False))["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_tokens(tokenizer, tmp_path, kind):
    rows = [*list_chats(5), chat("😀 <|im_end|>", "line\nbreak", "more", "\ttabs and \u2028")]
    lines = read_split(prepare_rows(tokenizer, train=write_rows(tmp_path / "plain.jsonl", rows)))
    tokens = prepare_rows(tokenizer, train=write_rows(tmp_path / f"rows.{kind}", rows))
    assert read_split(tokens) == lines and len(lines) == 6
    place = f"rows.{kind}:6" if "jsonl" in kind else f"rows.{kind} row 6"
    assert tokens.name_row("train", 6).endswith(place)


def test_tables_of_text(tokenizer, tmp_path):
    rows = [{"instruction": f"say, {i}", "input": "", "output": 'a "b"\nc'} for i in range(3)]
    found = read_split(prepare_rows(tokenizer, train=write_rows(tmp_path / "rows.csv", rows)))
    wanted = [chat(row["instruction"], row["output"]) for row in rows]
    assert [row["input_ids"] for row in found] == [render(tokenizer, one) for one in wanted]
    assert [row["row"] for row in found] == [2, 4, 6], "the lines they begin in"


def test_a_text_file_is_a_row(tokenizer, tmp_path):
    (tmp_path / "story.txt").write_text("Once upon\na time.\n")
    (row,) = read_split(prepare_rows(tokenizer, train="story.txt"))
    assert tokenizer.decode(row["input_ids"]) == "Once upon\na time.\n<|im_end|>"
    assert row["labels"] == row["input_ids"]


def test_sources_are_read_in_order_and_places_tell_them_apart(tokenizer, tmp_path):
    """Numbers go on over files; a blank line, an empty file and a bad row have theirs."""
    write_rows(tmp_path / "part2.jsonl", list_chats(2, "two"))
    (tmp_path / "part3.jsonl").write_text("")
    write_rows(tmp_path / "part10.jsonl", [BAD, *list_chats(2, "ten")])
    lines = (tmp_path / "part2.jsonl").read_text().splitlines()
    (tmp_path / "part2.jsonl").write_text(f"{lines[0]}\n\n{lines[1]}\n")
    write_rows(tmp_path / "table.parquet", list_chats(2, "table"))
    questions = [{"q": f"asked {i}", "a": f"told {i}"} for i in range(2)]
    write_rows(tmp_path / "asked.jsonl", [{"instruction": one["q"], "output": one["a"]} for one in questions])
    tokens = prepare_rows(tokenizer, train=["table.parquet", "part*.jsonl"], on_bad_row="skip", max_bad_ratio=0.2)
    rows = read_split(tokens)
    wanted = [*list_chats(2, "table"), *list_chats(2, "two"), *list_chats(2, "ten")]
    assert [row["input_ids"] for row in rows] == [render(tokenizer, one) for one in wanted]
    assert [tokens.name_row("train", row["row"]) for row in rows] == [
        "table.parquet row 1",
        "table.parquet row 2",
        "part2.jsonl:1",
        "part2.jsonl:3",
        "part10.jsonl:2",
        "part10.jsonl:3",
    ]
    again = prepare_rows(tokenizer, train=["table.parquet", "part*.jsonl"], on_bad_row="skip", max_bad_ratio=0.2)
    assert again.report.from_cache
    assert [again.name_row("train", row["row"]) for row in rows] == [
        tokens.name_row("train", row["row"]) for row in rows
    ]
    with pytest.raises(DataError) as caught:
        prepare_rows(tokenizer, train=["table.parquet", "part*.jsonl"])
    assert caught.value.problems[0].where == "part10.jsonl:1"
    with pytest.raises(DataError, match=r"table.parquet: messages; asked.jsonl: instruction"):
        prepare_rows(tokenizer, train=["table.parquet", "asked.jsonl"])


def test_columns_are_renamed_per_source(tokenizer, tmp_path):
    write_rows(tmp_path / "ours.jsonl", [{"prompt": "2 + 2 =", "completion": " 4"}])
    write_rows(tmp_path / "theirs.jsonl", [{"question": "2 + 3 =", "answer": " 5", "prompt": "unused"}])
    theirs = {"path": "theirs.jsonl", "columns": {"prompt": "question", "completion": "answer"}}
    tokens = prepare_rows(tokenizer, train=["ours.jsonl", theirs])
    texts = [tokenizer.decode(row["input_ids"]) for row in read_split(tokens)]
    assert texts == ["2 + 2 = 4<|im_end|>", "2 + 3 = 5<|im_end|>"]
    swapped = {"path": "theirs.jsonl", "columns": {"prompt": "answer", "completion": "question"}}
    (row,) = read_split(prepare_rows(tokenizer, train=swapped))
    assert tokenizer.decode(row["input_ids"]) == " 52 + 3 =<|im_end|>"
    with pytest.raises(
        DataError, match=r"ours.jsonl:1: has no column question for prompt; its columns are prompt, com"
    ):
        prepare_rows(tokenizer, train={**theirs, "path": "ours.jsonl"})


def test_bad_rows_of_both_passes_count_against_the_cap(tokenizer, tmp_path):
    rows = [*list_chats(16), BAD, {"messages": 5}, {"messages": "a"}, BAD]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"4 of 20 rows are bad, more than data.max_bad_ratio 0.19"):
        prepare_rows(tokenizer, train=path, on_bad_row="skip", max_bad_ratio=0.19)


@pytest.mark.parametrize(("count", "total"), [(29, 100), (7, 100), (57, 100), (1, 3)])
def test_a_cap_is_met_exactly(tokenizer, tmp_path, count, total):
    """0.29 of 100 rows are 29 rows, although 0.29 x 100 is less than 29 in floating point."""
    path = write_rows(tmp_path / "rows.jsonl", [*list_chats(total - count), *[{"messages": 5}] * count])
    tokens = prepare_rows(tokenizer, train=path, on_bad_row="skip", max_bad_ratio=count / total)
    assert tokens.report.splits[0].rows_bad == count
    with pytest.raises(DataError, match=r"(is|are) bad, more than"):
        prepare_rows(tokenizer, train=path, on_bad_row="skip", max_bad_ratio=count / total - 1e-9)


# Rows that are too long.


def test_split_text_loses_no_token(tokenizer, tmp_path):
    texts = ["once upon a time there was a mola " * n for n in (1, 5, 9)]
    path = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    tokens = prepare_rows(tokenizer, train={"path": path, "weight": 2}, max_length=32, on_overlong="split")
    rows = read_split(tokens)
    assert all(len(row["input_ids"]) <= 32 and row["labels"] == row["input_ids"] for row in rows)
    for number, text in enumerate(texts, 1):
        parts = [row["input_ids"] for row in rows if row["row"] == number]
        half = [one for i, one in enumerate(parts) if i % 2 == 0] if number > 1 else parts[:1]
        assert [token for part in half for token in part] == tokenizer(text + "<|im_end|>")["input_ids"]
    report = tokens.report.splits[0]
    assert (report.rows_split, report.rows_lost, report.rows_dropped, report.rows_used) == (2, 0, 0, 3)
    assert (report.rows_kept, report.tokens) == (len(rows), sum(len(row["input_ids"]) for row in rows))


def test_answers_cannot_be_split(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [chat("q", "word " * 100), chat("a", "b")])
    with pytest.raises(DataError, match=r"1 of 2 rows is longer than data.max_length 64 and cannot be split"):
        prepare_rows(tokenizer, train=path, max_length=64, on_overlong="split")


def test_a_pair_that_is_cut_keeps_its_prompt_and_gets_no_end(tokenizer, tmp_path):
    rows = [
        {"prompt": "say:", "chosen": "word " * 60, "rejected": "no"},
        {"prompt": "a " * 70, "chosen": "b", "rejected": "c"},
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    tokens = prepare_rows(
        tokenizer, method="dpo", train=path, max_length=64, on_overlong="truncate", max_lost_ratio=1.0
    )
    (row,) = read_split(tokens)
    prompt = tokenizer("say:")["input_ids"]
    assert row["prompt_ids"] == prompt
    assert row["prompt_ids"] + row["chosen_ids"] == tokenizer("say:" + "word " * 60)["input_ids"][:64]
    assert row["rejected_ids"] == tokenizer("no<|im_end|>")["input_ids"], "only what is too long is cut"
    report = tokens.report.splits[0]
    assert (report.rows_truncated, report.rows_dropped, report.rows_lost) == (1, 1, 2)


# All cores.


def test_all_cores_give_the_same_files(tokenizer, tmp_path, monkeypatch):
    rows = [*list_chats(700), chat("too", "long " * 100), BAD, *list_chats(900, "more")]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    settings = {"on_bad_row": "skip", "on_overlong": "truncate", "eval_fraction": 0.1, "max_length": 128}
    settings["train"] = {"path": path, "weight": 1.5}
    found = {}
    started = []
    start = tokenizing.ProcessPoolExecutor
    monkeypatch.setattr(tokenizing, "ProcessPoolExecutor", lambda *a: started.append(a) or start(*a))
    for least in (10**9, 0):
        monkeypatch.setattr(tokenizing, "PARALLEL_ROWS", least)
        monkeypatch.setattr(tokenizing, "count_cores", lambda: 3)
        monkeypatch.setenv("FORGE_CACHE", str(tmp_path / f"cache{least}"))
        tokens = prepare_rows(tokenizer, **settings)
        files = {one.name: one.read_bytes() for one in tokens.folder.iterdir() if one.name != "manifest.json"}
        splits = json.loads((tokens.folder / "manifest.json").read_text())["report"]["splits"]
        found[least] = (files, splits, tokens.questions, tokens.places)
    assert len(started) == 1 and sorted(found[0][0]) == ["eval.arrow", "questions.jsonl", "train.arrow"]
    assert found[0] == found[10**9]


def kill_worker(rows):
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_out_of_memory(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizing, "PARALLEL_ROWS", 0)
    monkeypatch.setattr(tokenizing, "count_cores", lambda: 2)
    monkeypatch.setattr(tokenizing, "_tokenize_batch", kill_worker)
    with pytest.raises(MemoryExceeded, match="a process that tokenises rows was killed"):
        prepare_rows(tokenizer, train=write_rows(tmp_path / "rows.jsonl", list_chats(3)))
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


# Questions.


def test_a_template_that_does_not_ask_leaves_the_row_without_a_question(tokenizer, monkeypatch):
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        "{%- if add_generation_prompt and messages[-1].role != 'user' %}{{ raise_exception('no') }}{% endif -%}"
        + tokenizer.chat_template,
    )
    turns = [*chat("a", "b")["messages"], {"role": "assistant", "content": "c"}]
    rows = RowTokenizer(Renderer(tokenizer), Limits("messages", "all", 64, "error"))
    (outcome,) = rows.tokenize([(1, {"messages": turns}, True)])
    assert (outcome.status, outcome.question) == ("kept", None)
    with pytest.raises(RowError):
        rows.renderer.encode_prompt(turns[:2])


def test_a_template_that_refuses_a_plain_question_takes_others(tokenizer, monkeypatch):
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        "{%- if messages and messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif -%}"
        + tokenizer.chat_template,
    )
    rows = RowTokenizer(Renderer(tokenizer), Limits("messages", "assistant", 64, "error"))
    row = chat("a", "b")
    good = {"messages": [{"role": "system", "content": "c"}, *row["messages"]]}
    first, second = rows.tokenize([(1, row, False), (2, good, False)])
    assert first.status == "bad" and "the chat template refuses this conversation: no system" in first.what
    assert (second.status, second.has_end) == ("kept", True)
