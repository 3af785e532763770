"""Whatever stands in a row, it is read, or it is a bad row that says why; nothing else may happen."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator

import pytest
from row_files import chat, prepare_rows, read_split, write_rows
from transformers import AutoTokenizer

from forge_cli.data.formats import COLUMNS, drop_nulls, find_kind, find_system, list_unused, read_example
from forge_cli.data.outcomes import Limits
from forge_cli.data.row_tokens import RowTokenizer
from forge_cli.errors import DataError
from forge_cli.parts.rendering import Renderer
from forge_cli.parts.turns import RowError
from forge_cli.paths import assets_root

TEMPLATE = (
    "{%- if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif -%}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.reasoning_content or '') + (m.content or '') }}"
    "{%- for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments | tojson }}{% endfor -%}"
    "{{ '<|im_end|>\\n' }}{% endfor -%}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"
)
SYSTEM = {"role": "system", "content": "be kind"}
USER, YES, NO = (
    {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "y"), ("assistant", "n"))
)
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
ROWS = [
    ("tokens", {"input_ids": [5, 6, 3], "labels": [-100, 6, 3], "attention_mask": [1, 1, 1]}),
    ("preference", {"prompt": "a ", "chosen": "b", "rejected": "c", "tools": TOOLS, "chat_template_kwargs": {"x": 1}}),
    ("preference", {"prompt": "q", "chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]}),
    ("preference", {"prompt": [USER], "chosen": [YES], "rejected": [NO]}),
    ("unpaired_preference", {"prompt": "a ", "completion": "b", "label": True}),
    (
        "messages",
        {
            "messages": [
                SYSTEM,
                USER,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "name": "look", "content": "seen"},
                {**YES, "weight": 1, "reasoning_content": "hm"},
            ],
            "tools": TOOLS,
        },
    ),
    (
        "conversations",
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    ),
    ("prompt_completion", {"prompt": [USER], "completion": [YES]}),
    ("instruction", {"instruction": "a", "input": "b", "output": "c", "system": "s"}),
    ("text", {"text": "a"}),
]
GONE = object()
VALUES = [None, 5, -1, 1.5, True, False, "", " ", "x", "\ud800", "\U0010ff00", "x" * 2000, 10**30, GONE]
VALUES += ["<think>", float("inf"), [], [None], ["a"], [[1]], [0, 0, 0], {}, {"role": "user"}, {"a": []}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(assets_root() / "forge-tiny")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def list_places(value: object, place: tuple = ()) -> Iterator[tuple]:
    if place:
        yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield from list_places(one, (*place, key))


def replace(row: dict, place: tuple, value: object) -> dict:
    """Returns a copy of a row with another value, or none, at one place."""
    row = copy.deepcopy(row)
    inner = row
    for key in place[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return row


@pytest.mark.parametrize(("kind", "row"), ROWS, ids=[f"{i}-{kind}" for i, (kind, _) in enumerate(ROWS)])
def test_any_value_at_any_place_is_read_or_refused(tokenizer, kind, row):
    rows = RowTokenizer(Renderer(tokenizer), Limits(kind, "assistant", 256, "truncate"))
    (whole,) = rows.tokenize([(1, row, True)])
    assert whole.status == "kept" and whole.trained and find_kind(list(row)) == kind
    tried = 0
    for place in list_places(row):
        for value in VALUES:
            changed = replace(row, place, value)
            if not all(column in changed for column in COLUMNS[kind]) or (
                place[-1] == "name" and not str(value).strip()
            ):
                continue
            tried += 1
            try:
                find_system(read_example(changed, kind))
                is_read = True
            except RowError as error:
                assert str(error)
                is_read = False
            (outcome,) = rows.tokenize([(1, changed, True)])
            assert is_read or outcome.status == "bad", "what the first pass refuses, the second refuses"
            assert (outcome.status == "bad") == bool(outcome.what)
            for columns in outcome.columns:
                assert all(
                    0 <= one < len(tokenizer) for name in columns if name.endswith("_ids") for one in columns[name]
                )
    assert tried > 20


@pytest.mark.parametrize(
    "turn",
    [
        {"content": "<think>"},
        {"content": "<think></think>"},
        {"content": "", "tool_calls": [{"function": {"name": " ", "arguments": {}}}]},
    ],
)
def test_an_answer_without_a_text_of_its_own_is_a_bad_row(tokenizer, turn):
    rows = RowTokenizer(Renderer(tokenizer), Limits("messages", "assistant", 128, "error"))
    (outcome,) = rows.tokenize([(1, {"messages": [USER, {"role": "assistant", **turn}]}, False)])
    assert outcome.status == "bad" and "turn 2" in outcome.what


def test_the_first_columns_that_fit_decide():
    assert find_kind(["messages", "prompt", "prompt_id"]) == "messages"
    assert find_kind(["prompt", "chosen", "rejected", "messages"]) == "preference"
    assert find_kind(["instruction", "input", "output", "text"]) == "instruction"
    assert find_kind(["prompt", "completion", "label"]) == "unpaired_preference"
    assert find_kind(["prompt"]) is None
    assert list_unused("messages", ["messages", "tools", "id", "chat_template_kwargs"]) == ["id"]


def test_nulls_of_columns_are_taken_out_where_a_template_would_write_them():
    turn = {"role": "assistant", "content": None, "name": None, "tool_calls": [{"arguments": {"a": 1, "b": None}}]}
    assert drop_nulls([turn]) == [{"role": "assistant", "content": None, "tool_calls": [{"arguments": {"a": 1}}]}]
    assert drop_nulls({"content": None, "x": {"y": None, "z": [None, 1]}}) == {"x": {"z": [None, 1]}}
    assert drop_nulls([1, None]) == [1, None] and drop_nulls("a") == "a" and drop_nulls(None) is None


def test_nulls_that_somebody_wrote_stay(tokenizer, tmp_path):
    """A line of JSON says what it says; only columns are filled up."""
    call = {"function": {"name": "look", "arguments": {"at": None}}}
    row = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    rows = RowTokenizer(Renderer(tokenizer), Limits("messages", "assistant", 128, "error"))
    (outcome,) = rows.tokenize([(1, row, False)])
    assert '{"at": null}' in tokenizer.decode(outcome.columns[0]["input_ids"])


@pytest.mark.parametrize(
    ("method", "row", "words"),
    [
        (
            "sft",
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "method sft needs rows with .*preference.*method: dpo",
        ),
        ("sft", {"prompt": "a", "completion": "b", "label": True}, "method sft needs .*unpaired.*method: kto"),
        ("dpo", {"prompt": "a", "completion": "b"}, r"method dpo needs rows with chosen\+rejected.*method: sft"),
        ("dpo", {"prompt": "a", "completion": "b", "label": True}, "method dpo .*method: kto"),
        ("kto", {"prompt": "a", "completion": "b"}, "method kto .*prompt.completion.label.*method: sft"),
        ("kto", {"prompt": "a", "chosen": "b", "rejected": "c"}, "method kto .*method: dpo"),
        ("reward", {"messages": chat("a", "b")["messages"]}, "method reward .*method: sft"),
    ],
)
def test_rows_that_another_method_takes(tokenizer, tmp_path, method, row, words):
    path = write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=rf"rows.jsonl:1: {words}"):
        prepare_rows(tokenizer, method=method, train=path)


def test_a_mixed_set_names_a_row_of_each_format(tokenizer, tmp_path):
    """The format is told from all rows, however late another one comes."""
    rows = [chat("a", f"b {i}") for i in range(300)]
    path = write_rows(tmp_path / "rows.jsonl", [*rows, {"text": "a"}, {"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError) as caught:
        prepare_rows(tokenizer, train=path)
    (problem,) = caught.value.problems
    assert problem.what == (
        f"rows of different formats: messages at {path}:1, text at {path}:301, prompt_completion at {path}:302"
    )
    assert "data.format" in problem.fix


def test_files_of_different_formats_are_named(tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    files = {"a.jsonl": {"conversations": turns}, "b.jsonl": chat("a", "c"), "c.jsonl": chat("a", "d")}
    files |= {"d.jsonl": {"prompt": "a", "completion": " b"}, "e.jsonl": {"instruction": "a", "output": "b"}}
    for name, row in files.items():
        write_rows(tmp_path / name, [row, row])

    def refuse(*names: str):
        with pytest.raises(DataError) as caught:
            prepare_rows(tokenizer, train=list(names))
        (problem,) = caught.value.problems
        return problem

    problem = refuse("a.jsonl", "b.jsonl", "c.jsonl")
    assert problem.what == "files of different formats: a.jsonl: conversations; b.jsonl and 1 more: messages"
    source = {"path": "a.jsonl", "columns": {"messages": "conversations"}}
    assert "data.train" in problem.fix and "{path: a.jsonl, columns: {messages: conversations}}" in problem.fix
    assert len(read_split(prepare_rows(tokenizer, train=[source, "b.jsonl", "c.jsonl"]))) == 6, "the fix is one"
    problem = refuse("d.jsonl", "e.jsonl")
    assert problem.what == "files of different formats: d.jsonl: prompt_completion; e.jsonl: instruction"
    assert "{path: e.jsonl, columns: {prompt: ..., completion: ...}}" in problem.fix
    source = {"path": "e.jsonl", "columns": {"prompt": "instruction", "completion": "output"}}
    assert len(read_split(prepare_rows(tokenizer, train=["d.jsonl", source]))) == 4


def test_a_named_format_decides_between_columns(tokenizer, tmp_path):
    row = {**chat("a", "b"), "text": "a story"}
    path = write_rows(tmp_path / "rows.jsonl", [row, {**row, "more": 1}])
    tokens = prepare_rows(tokenizer, train=path, format="text")
    assert tokens.report.splits[0].format == "text"
    assert tokens.report.unused_columns == ["messages", "more"]
    with pytest.raises(DataError, match=r"the columns are messages, text; prompt, completion is missing"):
        prepare_rows(tokenizer, train=path, format="prompt_completion")


def test_column_names_do_not_control_the_terminal(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"\x1b[31mtext": 1}])
    with pytest.raises(DataError) as caught:
        prepare_rows(tokenizer, train=path)
    assert "\x1b" not in str(caught.value) and json.dumps("\x1b[31mtext")[1:-1].replace("\\u001b", "\\x1b") in str(
        caught.value
    )
