"""Rows become what a trainer takes: nothing is lost, cut or made up without being counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from forge_cli.build.data import PreparedData, pack_data, prepare_data
from forge_cli.data.tokenizing import BATCH_ROWS
from forge_cli.errors import DataError
from forge_cli.paths import assets_root
from forge_cli.schema.data import DataSection
from forge_cli.schema.runspec import RunSpec

END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(assets_root() / "forge-tiny")


@pytest.fixture
def prepare(tmp_path: Path, tokenizer) -> Callable[..., PreparedData]:
    """Writes rows to a file and prepares them."""

    def prepare(rows: list[dict | str], *, seed: int = 0, eval_rows: list | None = None, **data) -> PreparedData:
        (tmp_path / "rows.jsonl").write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
        if eval_rows is not None:
            (tmp_path / "eval.jsonl").write_text("\n".join(json.dumps(row) for row in eval_rows))
            data["eval"] = str(tmp_path / "eval.jsonl")
        section = {"train": str(tmp_path / "rows.jsonl"), "max_length": 256, **data}
        return prepare_data(RunSpec(model={"name": "forge-tiny"}, data=section, seed=seed), tokenizer)

    return prepare


def chat(question: str, answer: str, *more: str) -> dict:
    texts = [question, answer, *more]
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def rendered(tokenizer, messages: list[dict]) -> list[int]:
    return tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]


def trained_texts(tokenizer, dataset) -> list[str]:
    return [tokenizer.decode([label for label in labels if label != -100]) for labels in dataset["labels"]]


def test_conversations_train_their_answers(prepare, tokenizer):
    rows = [chat("what is a mola?", "a fish"), chat("hi", "yo", "and you?", "fine")]
    data = prepare(rows)
    assert data.train["input_ids"] == [rendered(tokenizer, row["messages"]) for row in rows]
    assert trained_texts(tokenizer, data.train) == [f"a fish{END}", f"yo{END}fine{END}"]
    assert trained_texts(tokenizer, prepare(rows, train_on="last_assistant").train) == [f"a fish{END}", f"fine{END}"]
    everything = prepare(rows, train_on="all").train
    assert everything["labels"] == everything["input_ids"]


def test_a_prompt_and_completion_as_text_stay_text(prepare, tokenizer):
    data = prepare([{"prompt": "2 + 2 =", "completion": " 4"}])
    assert tokenizer.decode(data.train[0]["input_ids"]) == f"2 + 2 = 4{END}"
    assert trained_texts(tokenizer, data.train) == [f" 4{END}"]


def test_only_the_completion_of_a_conversation_is_trained(prepare, tokenizer):
    turns = chat("hi", "yo", "and you?", "fine")["messages"]
    data = prepare([{"prompt": turns[:3], "completion": turns[3:]}])
    assert data.train[0]["input_ids"] == rendered(tokenizer, turns)
    assert trained_texts(tokenizer, data.train) == [f"fine{END}"]


def test_an_instruction_is_asked_by_a_user(prepare, tokenizer):
    rows = [
        {"instruction": "Add.", "input": "2 and 2", "output": "4"},
        {"instruction": "Say hi.", "input": "", "output": "hi"},
        {"instruction": "Say ho.", "output": "ho"},
    ]
    data = prepare(rows)
    questions = ["Add.\n\n2 and 2", "Say hi.", "Say ho."]
    wanted = [chat(q, row["output"])["messages"] for q, row in zip(questions, rows, strict=True)]
    assert data.train["input_ids"] == [rendered(tokenizer, messages) for messages in wanted]
    assert trained_texts(tokenizer, data.train) == [f"4{END}", f"hi{END}", f"ho{END}"]


def test_an_instruction_without_a_chat_template_is_plain_text(prepare, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    data = prepare([{"instruction": "Add.", "input": "2 and 2", "output": "4"}])
    assert tokenizer.decode(data.train[0]["input_ids"]) == f"Add.\n\n2 and 2\n\n4{END}"
    assert trained_texts(tokenizer, data.train) == [f"4{END}"]


def test_text_rows_end_with_one_end_token(prepare, tokenizer):
    data = prepare([{"text": "once upon a time"}])
    assert tokenizer.decode(data.train[0]["input_ids"]) == f"once upon a time{END}"
    assert data.train["labels"] == data.train["input_ids"]
    assert data.reports[0].format == "text"


def test_the_report_counts(prepare):
    data = prepare([chat("a", "b"), chat("c d e f", "g h"), chat("i", "j")], eval_rows=[chat("k", "l")])
    report, eval_report = data.reports
    lengths = sorted(len(ids) for ids in data.train["input_ids"])
    trained = sum(label != -100 for labels in data.train["labels"] for label in labels)
    assert (report.name, report.format, report.rows_read, report.rows_kept) == ("train", "messages", 3, 3)
    assert (report.tokens, report.trained_tokens) == (sum(lengths), trained)
    assert (report.longest_tokens, report.median_tokens) == (lengths[-1], lengths[1])
    assert (report.rows_dropped, report.rows_truncated, report.overlong_places) == (0, 0, [])
    assert data.report.as_dict()["splits"][0]["rows_kept"] == 3
    assert (eval_report.name, eval_report.rows_read, eval_report.rows_kept) == ("eval", 1, 1)
    assert report.line() == (
        f"train: 3 of 3 rows (messages), {sum(lengths)} tokens, {100 * trained / sum(lengths):.0f} % trained, "
        f"median {lengths[1]}, longest {lengths[-1]}"
    )


# Overlong rows.


def overlong_rows(tokenizer) -> tuple[list[dict], list[int]]:
    """Rows of which the second loses the end of its answer at 32 tokens, and the fourth its whole answer."""
    rows = [chat("a", "b"), chat("a", "x y " * 30), chat("c", "d"), chat("x y " * 60, "b")]
    return rows, [len(rendered(tokenizer, row["messages"])) for row in rows]


def test_overlong_rows_are_an_error_unless_said_otherwise(prepare, tokenizer, tmp_path):
    assert DataSection.model_fields["on_overlong"].default == "error"
    rows, lengths = overlong_rows(tokenizer)
    with pytest.raises(DataError) as caught:
        prepare(rows, max_length=32)
    (problem,) = caught.value.problems
    path = tmp_path / "rows.jsonl"
    assert problem.what == (
        f"2 of 4 rows are longer than data.max_length 32; the longest has {lengths[3]} tokens ({path}:2, {path}:4)"
    )
    assert problem.fix == f"raise data.max_length to {lengths[3]}, or set data.on_overlong: drop or truncate"
    assert prepare(rows, max_length=lengths[3]).reports[0].rows_kept == 4


def test_dropped_rows_are_counted(prepare, tokenizer):
    rows, lengths = overlong_rows(tokenizer)
    data = prepare(rows, max_length=32, on_overlong="drop", max_lost_ratio=1.0)
    report = data.reports[0]
    assert data.train["row"][:] == [1, 3]
    assert (report.rows_read, report.rows_kept, report.rows_dropped, report.rows_truncated) == (4, 2, 2, 0)
    assert [place.rpartition(":")[2] for place in report.overlong_places] == ["2", "4"]
    assert report.tokens == lengths[0] + lengths[2]
    assert "2 of 4 rows (messages, 2 dropped)" in report.line()


def test_cut_rows_get_no_end_token_and_rows_without_an_answer_go(prepare, tokenizer):
    rows, lengths = overlong_rows(tokenizer)
    data = prepare(rows, max_length=32, on_overlong="truncate", max_lost_ratio=1.0)
    report = data.reports[0]
    assert data.train["row"][:] == [1, 2, 3]
    assert (report.rows_kept, report.rows_dropped, report.rows_truncated) == (3, 1, 1)
    assert "3 of 4 rows (messages, 1 dropped, 1 cut)" in report.line()
    assert report.tokens == lengths[0] + 32 + lengths[2]
    cut = data.train[1]
    assert cut["input_ids"] == rendered(tokenizer, rows[1]["messages"])[:32]
    assert trained_texts(tokenizer, data.train)[1] in "x y " * 30
    assert cut["labels"][-1] == cut["input_ids"][-1] != tokenizer.eos_token_id


def test_many_overlong_rows_are_counted_and_the_first_named(prepare):
    data = prepare(
        [chat("a", "b"), *[chat("a", "x " * 60)] * 50], max_length=32, on_overlong="drop", max_lost_ratio=1.0
    )
    assert data.reports[0].rows_dropped == 50
    assert [place.rpartition(":")[2] for place in data.reports[0].overlong_places] == [str(n) for n in range(2, 22)]


def test_a_split_without_rows_is_an_error(prepare):
    with pytest.raises(DataError, match=r"no row is left for train.*1 row is longer"):
        prepare([chat("a", "x " * 60)], max_length=32, on_overlong="drop", max_lost_ratio=1.0)


# Where rows come from.


def test_tokens_carry_the_line_of_their_row(prepare):
    data = prepare([chat("a", "b"), "", chat("c", "d"), " ", chat("e", "f")])
    assert data.train["row"][:] == [1, 3, 5]
    assert data.train["length"][:] == [len(ids) for ids in data.train["input_ids"]]
    assert [name.rpartition("/")[2] for name in data.name_rows([3, 5])] == ["rows.jsonl:3", "rows.jsonl:5"]
    packed = pack_data(data.train, 256)
    assert [sorted(one["rows"]) for one in packed] == [[1, 3, 5]]


def test_a_share_is_held_back_by_the_seed(prepare, tokenizer):
    rows = [chat(f"question {i}", f"answer {i}") for i in range(40)]
    first, again, other = (prepare(rows, eval_fraction=0.25, seed=seed) for seed in (0, 0, 1))
    held = [int(text.removeprefix("answer ").removesuffix(END)) for text in trained_texts(tokenizer, first.eval)]
    lines = first.train["row"][:]
    assert len(held) == 10
    assert held == sorted(held) and lines == sorted(lines)
    assert sorted([*(i + 1 for i in held), *lines]) == list(range(1, 41))
    trained = trained_texts(tokenizer, first.train)
    assert trained == [f"answer {line - 1}{END}" for line in lines]
    assert again.train["row"][:] == first.train["row"][:] and again.eval["input_ids"] == first.eval["input_ids"]
    assert other.eval["input_ids"] != first.eval["input_ids"]


def test_a_share_that_leaves_nothing_is_an_error(prepare):
    with pytest.raises(DataError, match=r"eval_fraction 0.9 of 2 rows leaves nothing to train on"):
        prepare([chat("a", "b")] * 2, eval_fraction=0.9)


def test_all_bad_rows_are_named(prepare):
    rows = [
        chat("a", "b"),
        {"messages": "a"},
        {"messages": [{"role": "gpt", "content": "a"}]},
        {"messages": [{"role": "user", "content": "a"}]},
        chat("a", "half \ud83d"),
    ]
    with pytest.raises(DataError) as caught:
        prepare(rows)
    problems = [str(problem).rpartition("rows.jsonl")[2] for problem in caught.value.problems]
    assert problems == [
        ":2: messages is not a list of turns, but text",
        "1 of 5 rows is bad; mend them, or set data.on_bad_row: skip and data.max_bad_ratio: 0.2",
    ]
    with pytest.raises(DataError) as caught:
        prepare([rows[0], *rows[2:]])
    problems = [str(problem).rpartition("rows.jsonl")[2] for problem in caught.value.problems]
    assert problems == [
        ":2: turn 1 has the unknown role 'gpt'; use system, user, assistant, tool",
        ":3: no assistant turn to train on",
        ":4: the text contains half a character, '\\ud83d'",
        "3 of 4 rows are bad; mend them, or set data.on_bad_row: skip and data.max_bad_ratio: 0.75",
    ]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "a", "completion": 4}, "completion is the number 4, not text or a list of turns"),
        ({"prompt": [], "completion": "a"}, "prompt is a list and completion is text"),
        ({"instruction": "a", "output": None}, "output is null, not text"),
        ({"instruction": "a", "input": ["b"], "output": "c"}, "input is a list, not text"),
        ({"text": None}, "text is null, not text; fill it in"),
        ({"messages": [{"role": "assistant", "content": "nobody asked"}]}, "turn 1 answers before anybody asked"),
        ({"text": "half \ud83d"}, "half a character"),
    ],
)
def test_columns_of_the_wrong_kind_are_refused(prepare, row, why):
    with pytest.raises(DataError, match=f"rows.jsonl:1: .*{why}"):
        prepare([row])


def test_batches_keep_the_order(prepare, tokenizer):
    rows = [chat(f"{i}", f"answer {i}") for i in range(BATCH_ROWS + 5)]
    data = prepare(rows)
    assert trained_texts(tokenizer, data.train) == [f"answer {i}{END}" for i in range(len(rows))]
    rows[3], rows[BATCH_ROWS + 2] = chat("half \ud83d", "a"), chat("a", "")
    with pytest.raises(DataError) as caught:
        prepare(rows)
    places = [problem.where.rpartition(":")[2] for problem in caught.value.problems]
    assert places == ["4", f"{BATCH_ROWS + 3}", ""]


# Questions for the report.


def test_evaluation_rows_become_questions(prepare, tokenizer):
    turns = chat("hi", "yo", "and you?", " fine ")["messages"]
    data = prepare([chat("a", "b")], eval_rows=[{"messages": turns}, chat("c", "d")])
    first, second = data.questions
    prompt = tokenizer.apply_chat_template(turns[:3], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(first.prompt) == prompt
    assert (first.shown, first.wanted) == ("and you?", "fine")
    assert (second.shown, second.wanted) == ("c", "d")
    assert prepare([chat("a", "b")]).questions == ()


def test_plain_prompts_become_plain_questions(prepare, tokenizer):
    """A chat template of the tokenizer does not matter to rows that do not use it."""
    data = prepare([{"prompt": "2 + 2 =", "completion": " 4"}], eval_rows=[{"prompt": "1 + 1 =", "completion": " 2"}])
    (question,) = data.questions
    assert question.prompt == tokenizer("1 + 1 =")["input_ids"]
    assert (question.shown, question.wanted) == ("1 + 1 =", "2")


def test_rows_without_an_answer_or_cut_are_no_questions(prepare):
    rows = [
        {"messages": [{"role": "user", "content": "no answer"}]},
        chat("too long", "x " * 100),
        chat("asked", "answered"),
    ]
    data = prepare(
        [chat("a", "b")], eval_rows=rows, train_on="all", max_length=64, on_overlong="truncate", max_lost_ratio=1.0
    )
    assert data.reports[1].rows_kept == 3
    assert [question.shown for question in data.questions] == ["asked"]
    assert prepare([{"text": "a"}], eval_rows=[{"text": "b"}]).questions == ()


# Streams.


def test_a_stream_gives_the_rows_of_the_file_mixed_and_counts_them(prepare, tokenizer):
    rows = [chat(f"q {i}", f"a {i}") for i in range(5)] + [chat("long", "x " * 100)]
    settings = {"max_length": 64, "on_overlong": "drop", "max_lost_ratio": 1.0}
    whole = {row["row"]: row for row in prepare(rows, **settings).train}
    data = prepare(rows, **settings, streaming=True)
    first = [row for row, _ in zip(data.train, range(12), strict=False)]
    assert all(row[name] == whole[row["row"]][name] for row in first for name in ("input_ids", "labels"))
    epochs = [[row["row"] for row in first[start : start + 5]] for start in (0, 5)]
    assert [sorted(epoch) for epoch in epochs] == [[1, 2, 3, 4, 5]] * 2
    assert (data.report.splits[0].rows_kept, data.report.splits[0].rows_dropped) == (5, 1)
    next(iter(data.train))  # a trainer starts a stream more than once
    assert data.report.splits[0].rows_kept == 1
    strict = prepare(rows, max_length=64, on_overlong="drop", streaming=True)
    with pytest.raises(DataError, match="1 of 6 rows lose"):
        [row for row, _ in zip(strict.train, range(7), strict=False)]


def test_a_stream_has_the_order_of_its_seed_and_epoch(prepare):
    rows = [chat(f"q {i}", f"a {i}") for i in range(40)]

    def list_orders(seed: int) -> list[list[int]]:
        stream = prepare(rows, seed=seed, streaming=True).train
        numbers = [row["row"] for row, _ in zip(stream, range(80), strict=False)]
        return [numbers[:40], numbers[40:]]

    orders = list_orders(1)
    assert orders == list_orders(1)
    different = {tuple(order) for order in [*orders, *list_orders(2), list(range(1, 41))]}
    assert len(different) == 5, "no epoch is like another, nor like the file"


@pytest.mark.parametrize(
    ("on_overlong", "why"), [("error", "tokens, more than data.max_length 16"), ("drop", "no row is left to train on")]
)
def test_a_stream_never_runs_dry_in_silence(prepare, on_overlong, why):
    data = prepare(
        [chat("long", "x " * 100)], max_length=16, on_overlong=on_overlong, max_lost_ratio=1.0, streaming=True
    )
    with pytest.raises(DataError, match=why):
        next(iter(data.train))


@pytest.mark.parametrize("streaming", [False, True])
def test_what_decides_the_rows_is_named_so_that_a_change_can_be(prepare, tmp_path, streaming):
    rows = [chat("q", str(number)) for number in range(8)]
    more = {"eval_rows": [chat("e", "f")], "streaming": streaming}
    first, again = prepare(rows, **more), prepare(rows, **more)
    assert first.identity == again.identity
    assert first.fingerprint == again.fingerprint and len(first.fingerprint) == 40
    train, held_back = f"data.train {tmp_path}/rows.jsonl", f"data.eval {tmp_path}/eval.jsonl"
    swapped = prepare([*rows[1:], rows[0]], **more)  # as long as before, and with as many rows
    assert {key for key, value in first.identity.items() if swapped.identity[key] != value} == {train}
    other = prepare(rows, **more | {"eval_rows": [chat("e", "g")]}, seed=1)
    assert {key for key, value in first.identity.items() if other.identity[key] != value} == {held_back, "settings"}
    assert len({first.fingerprint, swapped.fingerprint, other.fingerprint}) == 3
