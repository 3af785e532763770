"""Rows as TRL documents them, and as widely used data sets have them: all load without a setting.

What has to come out is rendered by ``apply_chat_template`` alone; which characters are trained is said here by hand.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from row_files import prepare_rows, read_split, write_rows
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from transformers.utils import get_json_schema

from forge_cli.errors import DataError
from forge_cli.paths import assets_root

END = "<|im_end|>"
# Writes tools and calls, as forge-tiny's own does not.
TOOL_TEMPLATE = (
    "{%- if tools %}{{ '<|im_start|>system\\n' }}{% for one in tools %}{{ one | tojson + '\\n' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif -%}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') }}"
    "{%- for c in m.tool_calls or [] %}{{ 'call ' + c.function.name + c.function.arguments | tojson }}{% endfor -%}"
    "{{ '<|im_end|>\\n' }}{% endfor -%}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"
)


def control_light(room: str, state: str) -> str:
    """
    Switches a light.

    Args:
        room: The room.
        state: On or off.
    """


def read_clock(zone: str) -> str:
    """
    Reads a clock.

    Args:
        zone: The time zone.
    """


TOOLS = [get_json_schema(control_light)]
CLOCK = [get_json_schema(read_clock)]
USER = {"role": "user", "content": "What color is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}
TERSE = {"role": "system", "content": "Be terse."}
MORE = [{"role": "user", "content": "And at night?"}, {"role": "assistant", "content": "Black."}]


def call(name: str, **arguments: str) -> list[dict]:
    """A call of a tool as TRL's documentation writes it: the turn has no content."""
    function = {"name": name, "arguments": arguments}
    return [
        {"role": "user", "content": "Do it."},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "name": name, "content": "done"},
        {"role": "assistant", "content": "Done!"},
    ]


LIGHTS, TIME = call("control_light", room="hall", state="on"), call("read_clock", zone="UTC")
ALPACA = {"instruction": "Add.", "input": "2 and 2", "output": "4"}

# Name: rows, and per row the conversation with the turns that are trained, or plain text and where training begins.
SFT: dict[str, tuple[list[dict], list[tuple]]] = {
    "language modeling": ([{"text": "The sky is blue."}], [("The sky is blue.", 0)]),
    "conversational language modeling": ([{"messages": [USER, BLUE, *MORE]}], [([USER, BLUE, *MORE], {1, 3})]),
    "prompt-completion": ([{"prompt": "The sky is", "completion": " blue."}], [("The sky is blue.", 10)]),
    "conversational prompt-completion": (
        [{"prompt": [TERSE, USER], "completion": [BLUE]}, {"prompt": [USER, BLUE, MORE[0]], "completion": [MORE[1]]}],
        [([TERSE, USER, BLUE], {2}), ([USER, BLUE, *MORE], {3})],
    ),
    "tools": (
        [{"messages": LIGHTS, "tools": TOOLS}, {"messages": TIME, "tools": CLOCK}],
        [(LIGHTS, {1, 3}, TOOLS), (TIME, {1, 3}, CLOCK)],
    ),
    "tools as JSON": ([{"messages": LIGHTS, "tools": json.dumps(TOOLS)}], [(LIGHTS, {1, 3}, TOOLS)]),
    "tools of a prompt": (
        [{"prompt": LIGHTS[:1], "completion": LIGHTS[1:], "tools": TOOLS}],
        [(LIGHTS, {1, 3}, TOOLS)],
    ),
    "ShareGPT": (
        [
            {
                "id": "a_0",
                "conversations": [
                    {"from": "system", "value": "Be terse."},
                    {"from": "human", "value": USER["content"]},
                    {"from": "gpt", "value": BLUE["content"]},
                ],
            }
        ],
        [([TERSE, USER, BLUE], {2})],
    ),
    "Alpaca": (
        [{**ALPACA, "text": "Below is ..."}, {**ALPACA, "input": "", "text": "Below is ..."}],
        [
            ([{"role": "user", "content": "Add.\n\n2 and 2"}, {"role": "assistant", "content": "4"}], {1}),
            ([{"role": "user", "content": "Add."}, {"role": "assistant", "content": "4"}], {1}),
        ],
    ),
    "UltraChat": (
        [{"prompt": USER["content"], "prompt_id": "a", "messages": [USER, BLUE, *MORE]}],
        [([USER, BLUE, *MORE], {1, 3})],
    ),
}
# Name: rows, and per row prompt, chosen and rejected, as turns or text.
PREFERENCE: dict[str, tuple[list[dict], list[tuple]]] = {
    "preference": (
        [{"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}],
        [("The sky is", " blue.", " green.")],
    ),
    "implicit preference": (
        [{"chosen": "The sky is blue.", "rejected": "The sky is green."}],
        [("The sky is", " blue.", " green.")],
    ),
    "conversational preference": (
        [{"prompt": [TERSE, USER], "chosen": [BLUE], "rejected": [GREEN]}],
        [([TERSE, USER], [BLUE], [GREEN])],
    ),
    "implicit conversational preference": (
        [
            {"chosen": [USER, BLUE], "rejected": [USER, GREEN]},
            {"chosen": [USER, BLUE, *MORE], "rejected": [USER, GREEN]},
        ],
        [([USER], [BLUE], [GREEN]), ([USER], [BLUE, *MORE], [GREEN])],
    ),
    "ultrafeedback_binarized": (
        [
            {
                "prompt": USER["content"],
                "prompt_id": "a",
                "chosen": [USER, BLUE],
                "rejected": [USER, GREEN],
                "messages": [USER, BLUE],
                "score_chosen": 8.5,
                "score_rejected": 3.0,
            }
        ],
        [([USER], [BLUE], [GREEN])],
    ),
    "preference with tools": (
        [{"prompt": LIGHTS[:1], "chosen": LIGHTS[1:], "rejected": [GREEN], "tools": TOOLS}],
        [(LIGHTS[:1], LIGHTS[1:], [GREEN], TOOLS)],
    ),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(assets_root() / "forge-tiny")
    tokenizer.chat_template = TOOL_TEMPLATE
    return tokenizer


def render(tokenizer, turns: list[dict], tools: list | None = None, **options) -> str:
    return tokenizer.apply_chat_template(turns, tools=tools, tokenize=False, **options)


def encode(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def label(tokenizer, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Tokenises a text; a token is trained if it begins inside a span."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = found["input_ids"]
    starts = [start for start, _ in found["offset_mapping"]]
    return ids, [one if any(a <= start < b for a, b in spans) else -100 for one, start in zip(ids, starts, strict=True)]


def expect_sft(tokenizer, what: list | str, trained: set[int] | int, tools: list | None = None):
    """Returns the ids and labels that a row has to get."""
    if isinstance(what, str):
        return label(tokenizer, what + END, [(trained, len(what + END))])
    spans = []
    for turn in trained:
        start = len(render(tokenizer, what[:turn], tools, add_generation_prompt=True))
        spans.append((start, len(render(tokenizer, what[: turn + 1], tools).removesuffix("\n"))))
    return label(tokenizer, render(tokenizer, what, tools), spans)


def prepare(tokenizer, path: Path, rows: list[dict], method: str) -> list[dict]:
    tokens = prepare_rows(tokenizer, method=method, train=write_rows(path, rows), max_length=2048)
    assert tokens.report.splits[0].rows_kept == len(rows)
    return read_split(tokens)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", SFT)
def test_rows_for_sft(tokenizer, tmp_path, name, suffix):
    rows, wanted = SFT[name]
    found = prepare(tokenizer, tmp_path / f"rows{suffix}", rows, "sft")
    for row, what in zip(found, wanted, strict=True):
        ids, labels = expect_sft(tokenizer, *what)
        assert tokenizer.decode(row["input_ids"]) == tokenizer.decode(ids)
        assert (row["input_ids"], row["labels"]) == (ids, labels)
        assert labels.count(-100) < len(labels) and tokenizer.eos_token_id in labels


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", PREFERENCE)
@pytest.mark.parametrize("method", ["dpo", "orpo", "reward"])
def test_rows_of_pairs(tokenizer, tmp_path, name, suffix, method):
    rows, wanted = PREFERENCE[name]
    found = prepare(tokenizer, tmp_path / f"rows{suffix}", rows, method)
    for row, what in zip(found, wanted, strict=True):
        prompt, chosen, rejected, *tools = what
        tools = tools[0] if tools else None
        if isinstance(prompt, str):
            texts = [prompt, prompt + chosen + END, prompt + rejected + END]
        else:
            asked = render(tokenizer, prompt, tools, add_generation_prompt=True)
            texts = [asked, *(render(tokenizer, prompt + one, tools).removesuffix("\n") for one in (chosen, rejected))]
        ids = [encode(tokenizer, text) for text in texts]
        assert row["prompt_ids"] == ids[0]
        assert row["prompt_ids"] + row["chosen_ids"] == ids[1]
        assert row["prompt_ids"] + row["rejected_ids"] == ids[2]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("is_chat", [False, True])
def test_rows_of_single_answers(tokenizer, tmp_path, suffix, is_chat):
    prompt, blue, green = ([USER], [BLUE], [GREEN]) if is_chat else ("The sky is", " blue.", " green.")
    rows = [
        {"prompt": prompt, "completion": blue, "label": True},
        {"prompt": prompt, "completion": green, "label": False},
    ]
    found = prepare(tokenizer, tmp_path / f"rows{suffix}", rows, "kto")
    assert [row["label"] for row in found] == [True, False]
    for row, answer in zip(found, (blue, green), strict=True):
        asked = render(tokenizer, prompt, add_generation_prompt=True) if is_chat else prompt
        text = render(tokenizer, prompt + answer).removesuffix("\n") if is_chat else prompt + answer + END
        assert row["prompt_ids"] == encode(tokenizer, asked)
        assert row["prompt_ids"] + row["completion_ids"] == encode(tokenizer, text)


def test_rows_that_are_tokens_already(tokenizer, tmp_path):
    rows = [{"input_ids": [40, 41, 3], "labels": [-100, 41, 3], "attention_mask": [1, 1, 1]}, {"input_ids": [42, 3]}]
    found = prepare(tokenizer, tmp_path / "rows.jsonl", rows, "sft")
    assert [(row["input_ids"], row["labels"]) for row in found] == [([40, 41, 3], [-100, 41, 3]), ([42, 3], [42, 3])]


def test_a_begin_token_is_written_once_and_belongs_to_the_prompt(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(assets_root() / "forge-tiny")
    begin = tokenizer.bos_token
    number = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, number)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + TOOL_TEMPLATE
    path = tmp_path / "rows.jsonl"
    (row,) = prepare(tokenizer, path, [{"prompt": "The sky is", "completion": " blue."}], "sft")
    assert row["input_ids"] == [number, *encode(tokenizer, "The sky is blue." + END)]
    assert row["labels"] == [-100, *label(tokenizer, "The sky is blue." + END, [(10, 99)])[1]]
    (row,) = prepare(tokenizer, path, [{"text": "The sky is blue."}], "sft")
    assert row["labels"][1:] == row["input_ids"][1:] == encode(tokenizer, "The sky is blue." + END)
    (row,) = prepare(tokenizer, path, [{"messages": [USER, BLUE]}], "sft")
    assert row["input_ids"] == encode(tokenizer, render(tokenizer, [USER, BLUE]))
    assert row["input_ids"].count(number) == 1 and row["labels"][0] == -100
    (row,) = prepare(tokenizer, path, [{"chosen": "blue", "rejected": "green"}], "dpo")
    assert row["prompt_ids"] == [number]
    assert [row["chosen_ids"], row["rejected_ids"]] == [encode(tokenizer, one + END) for one in ("blue", "green")]


@pytest.mark.parametrize("text", ["{", "[" * 20_000])
def test_what_is_to_be_json_and_is_not_is_a_bad_row(tokenizer, tmp_path, text):
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": text}]}
    rows = [
        {"prompt": "a", "completion": "b", "tools": text},
        {"messages": [{"role": "user", "content": "a"}, call]},
    ]
    for row, what in zip(rows, ("tools is not JSON", "arguments are not JSON"), strict=True):
        with pytest.raises(DataError, match=what):
            prepare(tokenizer, tmp_path / "rows.jsonl", [row], "sft")
