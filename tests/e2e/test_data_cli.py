"""``forge data``: what it shows is what is trained."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from data_command import Desk, chat, list_chats, read_ids, write_rows

from forge_cli.build.data import prepare_data
from forge_cli.build.tokenizer import load_tokenizer
from forge_cli.data.report_text import list_notes
from forge_cli.resolve.plan import resolve_plan

CHATS = [chat(f"question {i} 😀 <|im_end|>", f"answer {i}\n\n  é", "more?", "much") for i in range(12)]
LONG = [*CHATS, chat("tell", "word " * 120)]
PAIRS = [{"prompt": f"count to {i}: ", "chosen": "1 2 3", "rejected": "1 2 " * i} for i in range(2, 8)]
CHAT_PAIRS = [
    {"chosen": [*one["messages"], {"role": "user", "content": "end"}, {"role": "assistant", "content": "e\u0301"}],
     "rejected": [*one["messages"], {"role": "user", "content": "end"}, {"role": "assistant", "content": "è"}]}
    for one in CHATS
]  # fmt: skip
SINGLE = [{"prompt": f"say {i}", "completion": f" {i}!", "label": i % 3 > 0} for i in range(6)]
TEXTS = [{"text": "once upon a time " * n} for n in (1, 4, 20)]
TOKENS = [{"input_ids": [40, 41, 42, 3], "labels": [-100, 41, -100, 3]}, {"input_ids": [50, 3]}]

SETTINGS = {
    "chats": (CHATS, {}),
    "last answers": (CHATS, {"train_on": "last_assistant"}),
    "whole chats": (CHATS, {"train_on": "all"}),
    "repeats": (CHATS, {"train": {"path": "rows.jsonl", "weight": 1.5}}),
    "held back": (CHATS, {"eval_fraction": 0.3}),
    "cut": (LONG, {"on_overlong": "truncate", "max_lost_ratio": 0.1}),
    "dropped": (LONG, {"on_overlong": "drop", "max_lost_ratio": 0.1}),
    "packed": (CHATS, {"packing": True}),
    "padding-free": (CHATS, {"padding_free": True}),
    "prompts": ([{"prompt": "2 + 2 =", "completion": " 4"}], {}),
    "instructions": ([{"instruction": "Add.", "input": "2 and 2", "output": "4"}], {}),
    "texts": (TEXTS, {"max_length": 32, "on_overlong": "split"}),
    "tokens": (TOKENS, {}),
    "dpo": (PAIRS, {"top": {"method": "dpo"}}),
    "dpo without prompts": ([{"chosen": "é!", "rejected": "è!"}], {"top": {"method": "dpo"}}),
    "dpo of chats": (CHAT_PAIRS, {"top": {"method": "dpo"}}),
    "dpo cut": (PAIRS, {"top": {"method": "dpo"}, "max_length": 16, "on_overlong": "truncate", "max_lost_ratio": 1.0}),
    "orpo": (PAIRS, {"top": {"method": "orpo"}}),
    "reward": (PAIRS, {"top": {"method": "reward"}}),
    "kto": (SINGLE, {"top": {"method": "kto"}}),
}


@pytest.fixture
def desk(tmp_path, monkeypatch, capsys) -> Desk:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return Desk(capsys)


def list_trained(dataset) -> list[tuple[int, list[int], list[int]]]:
    """Lists number, ids and trained ids of the rows that a trainer is handed."""
    rows = []
    for row in dataset:
        if "seq_lengths" in row:
            start = 0
            for number, length in zip(row["rows"], row["seq_lengths"], strict=True):
                ids, labels = (row[name][start : start + length] for name in ("input_ids", "labels"))
                rows.append((number, ids, [one for one in labels if one != -100]))
                start += length
            assert start == len(row["input_ids"]) == len(row["labels"])
        elif "input_ids" in row:
            rows.append((row["row"], row["input_ids"], [one for one in row["labels"] if one != -100]))
        else:
            for name in ("chosen_ids", "rejected_ids", "completion_ids"):
                if name in row:
                    rows.append((row["row"], row["prompt_ids"] + row[name], row[name]))
    return rows


@pytest.mark.parametrize("name", SETTINGS)
def test_what_preview_shows_is_what_is_trained(desk, name):
    rows, settings = SETTINGS[name]
    numbers = [f"--row={i}" for i in range(1, len(rows) + 1)]
    shown = desk.preview(rows, *numbers, **settings)
    spec = resolve_plan(Path("run.yaml")).spec
    tokenizer = load_tokenizer(spec)
    data = prepare_data(spec, tokenizer)
    for split, dataset in (("train", data.train), ("eval", data.eval)):
        seen = [(row["row"], *read_ids(row)) for row in shown if row["split"] == split]
        trained = [] if dataset is None else list_trained(dataset)
        # The order is that of the files; packed rows come in another, and the first token of each is not trained.
        if spec.data.packing:
            seen = [(number, ids, kept[1:] if kept[:1] == ids[:1] else kept) for number, ids, kept in seen]
            seen, trained = sorted(seen), sorted(trained)
        assert seen == trained
        assert dataset is None or seen
    for row in shown:
        text = "".join(stretch["text"] for stretch in row["stretches"])
        assert text == tokenizer.decode(read_ids(row)[0]), "and its text is the text of these tokens"
        kinds = [(stretch["is_trained"], stretch["is_special"]) for stretch in row["stretches"]]
        assert all(a != b or a[1] for a, b in pairwise(kinds)), "neighbours of a kind are joined"


def test_preview_for_people(desk):
    done = desk.data("preview", [chat("hi\tthere", "yo\nman"), *list_chats(5)])
    blocks = done.out.split("\n\n")
    assert len(blocks) == 4, "three rows and a line that explains"
    assert blocks[0] == (
        "train row 1, rows.jsonl:1: 18 tokens, 8 trained\n"
        "<|im_start|>user⏎\nhi\tthere<|im_end|>⏎\n<|im_start|>assistant⏎\n[[yo⏎\nman<|im_end|>]]⏎"
    ).replace("18 tokens, 8", re.search(r"\d+ tokens, \d+", blocks[0])[0])
    assert blocks[3] == "\ntrained text stands between [[ and ]]; ⏎ is a line break\n"
    (row,) = desk.preview(None, "--row", "1")
    every, trained = read_ids(row)
    assert f": {len(every)} tokens, {len(trained)} trained\n" in blocks[0]


def test_rows_are_chosen_by_number_in_both_splits(desk):
    write_rows("held.jsonl", list_chats(3))
    shown = desk.preview(CHATS, "--row", "2", "--row", "12", eval="held.jsonl")
    assert [row["place"] for row in shown] == ["rows.jsonl:2", "rows.jsonl:12", "held.jsonl:2"]
    asked = desk.data("preview", None, "--row", "2", "--row", "99", eval="held.jsonl")
    assert asked.code == 3 and "there is no row 99\n  fix: train has rows 1 to 12, eval has rows 1 to 3" in asked.err
    done = desk.data("preview", LONG, "--row", "13", on_overlong="drop", max_lost_ratio=0.1)
    assert done.code == 3 and "row 13 is not trained: it is bad, or was dropped or left out" in done.err
    some = desk.data("preview", None, "--row", "1", "--row", "13", on_overlong="drop", max_lost_ratio=0.1)
    assert some.code == 0 and "note: row 13 is not trained" in some.err and "train row 1, rows.jsonl:1: " in some.out
    held = desk.data("preview", CHATS, "--row", "13", eval_rows=4)
    assert held.code == 3 and held.err.endswith("there is no row 13\n  fix: train has rows 1 to 12\n")
    for number in ("0", "-1", "two"):
        assert desk.data("preview", None, "--row", number).code == 2


def test_rows_are_counted_and_not_their_lines(desk):
    """A header, a blank line and a line break inside a text are no rows; a row keeps the place that Forge names."""
    Path("a.csv").write_text('prompt,completion\n"a\nb",c\nd,e\n\nf,g\n')
    Path("b.csv").write_text("prompt,completion\nh,i\n")
    Path("c.jsonl").write_text('\n\n{"prompt": "j", "completion": "k"}\n')
    files = ["a.csv", "b.csv", "c.jsonl"]
    places = {1: "a.csv:2", 2: "a.csv:4", 3: "a.csv:6", 4: "b.csv:2", 5: "c.jsonl:3"}
    for row, place in places.items():
        (shown,) = desk.preview(None, "--row", str(row), train=files)
        assert (shown["row"], shown["place"]) == (row, place)
        assert "".join(one["text"] for one in shown["stretches"]).startswith("adfhj"[row - 1])
    assert [(one["row"], one["place"]) for one in desk.preview(None, train=files)] == list(places.items())[:3]
    assert "train has rows 1 to 5" in desk.data("preview", None, "--row", "6", train=files).err


class Page(HTMLParser):
    """The text of a page, and every address in it."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.texts, self.addresses = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action")]

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_its_own(desk):
    nasty = "<script>alert(1)</script> \"quoted\" & 'more' \x1b[31m"
    done = desk.data("preview", [chat(nasty, "<b>bold</b>")], "--html", "rows.html")
    assert (done.code, done.out) == (0, "rows.html\n")
    page = Page()
    text = Path("rows.html").read_text(encoding="utf-8")
    page.feed(text)
    assert not {"script", "link", "img", "b"} & set(page.tags) and page.addresses == []
    assert "http" not in text and "url(" not in text
    joined = "".join(page.texts)
    assert "<script>alert(1)</script> \"quoted\" & 'more' \\x1b[31m" in joined and "<b>bold</b>" in joined
    assert len(re.findall('class="trained"', text)) >= 1
    both = desk.data("preview", None, "--html", "both.html", "--json")
    assert (both.code, both.out) == (2, "") and "give one of them" in both.err and not Path("both.html").exists()
    done = desk.data("preview", None, "--html", "no/such/folder.html")
    assert done.code == 5 and "the page cannot be written" in done.err


def test_the_report_is_the_same_as_json(desk):
    rows = [*CHATS, CHATS[0], {**chat("a", "b"), "id": 7}]
    report = desk.report(rows, eval_rows=2, top={"seed": 5})
    text = desk.check(None, eval_rows=2, top={"seed": 5}).out
    train, held = report["splits"]
    for label, name in (("rows read", "rows_read"), ("rows kept", "rows_kept"), ("tokens", "tokens")):
        counts = re.search(rf"^{label} +([\d,]+) +([\d,]+)$", text, re.MULTILINE).groups()
        assert [int(one.replace(",", "")) for one in counts] == [train[name], held[name]]
    assert report["notes"] and all(note in text for note in report["notes"])
    assert "note: columns that nothing reads: id" in report["notes"]
    assert f"optimizer steps per epoch: {report['steps_per_epoch']}" in text
    assert f"tokens of an earlier run are used ({report['fingerprint'][:12]})" in text
    spec = resolve_plan(Path("run.yaml")).spec
    assert list_notes(prepare_data(spec, load_tokenizer(spec)).report) == report["notes"], "a run says the same"


def test_settings_are_read_like_those_of_a_run(desk):
    write_rows("rows.jsonl", CHATS)
    assert desk.report(None)["splits"][0]["rows_kept"] == 12
    done = desk.check(None, "--json", "--set", "data.eval_rows=4")
    assert [split["rows_kept"] for split in done.read_json()["splits"]] == [8, 4]
    done = desk.check(None, "--set", "data.max_lenght=4")
    assert done.code == 2 and "max_length" in done.err
    done = desk.forge("data", "check", "nowhere.yaml")
    assert done.code == 2 and "nowhere.yaml" in done.err
    assert not Path("runs").exists(), "looking at data leaves no run folder"


def test_a_stream_is_looked_at_whole(desk):
    report = desk.report(CHATS, streaming=True)
    assert report["splits"][0]["rows_kept"] == 12
    (row, *_), whole = desk.preview(None, streaming=True), desk.preview(None)
    assert read_ids(row) == read_ids(whole[0])


def test_a_process_of_its_own_needs_no_torch(desk):
    write_rows("rows.jsonl", CHATS)
    assert desk.report(None)["from_cache"] is False
    code = (
        "import sys; from forge_cli.cli.app import run_app\n"
        "try: run_app(sys.argv[1:])\n"
        "finally: assert not {'torch', 'datasets', 'trl'} & set(sys.modules)"
    )
    for command in ("check", "preview"):
        done = subprocess.run(
            [sys.executable, "-c", code, "data", command, "run.yaml", "--json"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert json.loads(done.stdout) == desk.preview(None), "both processes make the same tokens"


# What a run trained and what its saved template writes.

RUN = {"top": {"training": {"max_steps": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}}}
RUN["top"] |= {"lora": {"r": 2}, "report": None, "checkpoint": None, "monitor": None}


@pytest.mark.slow
def test_parity_of_a_run_with_its_saved_template(desk):
    assert desk.check(CHATS, eval_rows=2, **RUN).code == 0
    done = subprocess.run(
        [sys.executable, "-m", "forge_cli", "train", "run.yaml"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    done = desk.forge("data", "parity", "runs/run")
    assert done.code == 0, done.err
    assert done.out == "10 of 10 conversations are equal byte by byte (runs/run/adapter)\n"
    found = desk.forge("data", "parity", "runs/run", "--json").read_json()
    assert (found["compared"], found["equal"], found["different"]) == (10, 10, [])

    template = Path("runs/run/adapter/chat_template.jinja")
    template.write_text(template.read_text().replace("message['role'] + '\\n'", "message['role'] + '\\n '"))
    done = desk.forge("data", "parity", "runs/run")
    assert done.code == 3 and "10 conversations are served in another form than they are trained" in done.err
    assert "0 of 10 conversations are equal" in done.out
    found = re.search(r"rows.jsonl:\d+\n  trained  (.*)\n  served   (.*)\n", done.out)
    assert found[1].startswith("'<|im_start|>user\\nquestion") and found[2].startswith("'<|im_start|>user\\n question")

    shutil.rmtree("runs/run/adapter")
    done = desk.forge("data", "parity", "runs/run")
    assert done.code == 5 and "no adapter and no model" in done.err
    done = desk.forge("data", "parity", "runs")
    assert done.code == 5 and "no plan.yaml" in done.err


TOOL_TEMPLATE = (
    "{%- if tools %}{{ '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' }}{% endif -%}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') }}"
    "{%- for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments | tojson }}{% endfor -%}"
    "{{ '<|im_end|>\\n' }}{% endfor -%}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}"
)


def compare_rows(desk: Desk, rows: list[dict], **settings) -> dict:
    """Makes the folder that a run of these rows leaves, without the training, and compares."""
    Path("tools.jinja").write_text(TOOL_TEMPLATE)
    top = {"model": {"name": "forge-tiny", "chat_template": "tools.jinja"}, **settings.pop("top", {})}
    assert desk.check(rows, top=top, **settings).code == 0
    load_tokenizer(resolve_plan(Path("run.yaml")).spec).save_pretrained("runs/x/adapter")
    shutil.copy("run.yaml", "runs/x/plan.yaml")
    return desk.forge("data", "parity", "runs/x", "--json").read_json()


def test_parity_of_every_kind_of_conversation(desk):
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
    as_text = {"type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    asked, told = CHATS[0]["messages"][0], {"role": "tool", "name": "look", "content": "seen"}
    calls = [{"role": "assistant", "tool_calls": [one], "content": None} for one in (call, as_text)]
    del calls[1]["content"]
    last = {"role": "assistant", "content": "It is.", "weight": 1}
    rows = [{"messages": [asked, answer, told, last], "tools": tools} for answer in calls]
    rows.append({"messages": [asked, {**last, "weight": 0}, asked, {**last, "name": None}]})
    found = compare_rows(desk, rows, max_length=256)
    assert (found["compared"], found["equal"], found["different"]) == (3, 3, [])
    found = compare_rows(desk, [{"prompt": one["messages"][:1], "completion": one["messages"][1:]} for one in CHATS])
    assert (found["compared"], found["equal"]) == (12, 12)
    template = Path("runs/x/adapter/chat_template.jinja")
    template.write_text("{{ raise_exception('never') }}")
    done = desk.forge("data", "parity", "runs/x")
    assert (done.code, done.err) == (3, "error: rows.jsonl:1: the chat template refuses this conversation: never\n")
    found = compare_rows(desk, CHAT_PAIRS, top={"method": "dpo"})
    assert (found["compared"], found["equal"]) == (12, 12)


def test_parity_of_what_was_trained_alone(desk):
    """Repeats are compared once, held back and dropped rows not at all, cut ones up to the cut."""
    rows = [*CHATS, chat("tell", "word " * 120), {"messages": [{"role": "boss", "content": "a"}]}]
    settings = {"on_bad_row": "skip", "max_bad_ratio": 0.1, "max_lost_ratio": 0.5, "eval_rows": 3}
    source = {"path": "rows.jsonl", "weight": 2}
    found = compare_rows(desk, rows, train=source, on_overlong="truncate", **settings)
    assert (found["compared"], found["equal"]) == (10, 10)
    found = compare_rows(desk, rows, train=source, on_overlong="drop", **settings)
    assert found["compared"] == found["equal"] in (9, 10)
    done = desk.check([{"prompt": "a", "completion": "b"}])
    shutil.copy("run.yaml", "runs/x/plan.yaml")
    done = desk.forge("data", "parity", "runs/x")
    assert done.code == 3 and "the rows are no conversations" in done.err
