"""The page of a run: what stands in it, that it loads nothing, and that no text of a run becomes markup."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from forge_cli.report.document import MOST_CHARACTERS, escape
from forge_cli.report.page import list_commands, write_comparison, write_page, write_value

ATTACK = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
SECRET = "hf_" + "a1" * 12
VOID = {"meta", "input", "img", "br", "link"}
SPLIT = {"name": "train", "format": "messages", "rows_read": 1280, "rows_kept": 1279, "rows_bad": 1, "tokens": 500}
REPORT = {
    "run": "mine",
    "created": "2026-01-02T03:04:05",
    "method": {"name": "sft", "model": "forge-tiny", "lora": True, "ema": True},
    "losses": {},
    "alarms": [{"step": 2, "alarm": "spike", "message": ATTACK}],
    "samples": [{"shown": ATTACK, "wanted": None, "before": f"token {SECRET}", "after": "one\ntwo\x1b[31m"}],
    "data": {"splits": [SPLIT | {"histogram": [[8, 3], [16, 1]]}]},
    "memory": {"phases": {"load": {"predicted_bytes": 2 << 30, "measured_bytes": None}, ATTACK: {}}},
    "trainable": {
        "num_parameters": 1000,
        "num_trainable_parameters": 10,
        "freeze": {"num_frozen_layers": 3, "num_layers": 8, "prefix_without_grad": True},
    },
    "plan": {
        "seed": {"value": 42, "from": "schema default"},
        "lora": {"value": {}, "from": "run.yaml:1:1"},
        "lora.r": {"value": 1, "from": "run.yaml:2:3"},
        "name": {"value": ATTACK, "from": "--set"},
    },
    "environment": {"torch": "2.9"},
    "next": "forge recipes list",
}
RECORDS = [
    {"step": 0, "eval_loss": 2.5, "eval_ema_loss": None},
    {"step": 1, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-4, "tokens_per_second": 10.0},
    {"step": 2, "loss": "nan", "grad_norm": "nan", "skipped": True, "learning_rate": 1e-4},
    {"step": 2, "skipped": True, "alarm": "skipped", "message": ATTACK},
    {"step": 3, "loss": 1.5, "grad_norm": 0.5, "group_norms": {ATTACK: 0.1, "layer 1": "inf"}},
    {"step": 3, "eval_loss": 1.6, "eval_ema_loss": 1.7, "eval_rewards/margins": 0.2, "eval_rewards/accuracies": 0.9},
]


class Page(HTMLParser):
    """Collects what a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.headings: list[str] = []
        self.text = ""
        self.figures = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        where = self.open[-1] if self.open else ""
        if where == "h2":
            self.headings.append(data)
        if where == "script":
            self.figures += data if self.tags[-1][1].get("id") == "figure-data" else ""
        elif where != "style":
            self.text += data + "\n"

    def titles(self) -> list[str]:
        return [attributes["aria-label"].removeprefix("Plot: ") for _, attributes in self.tags if "role" in attributes]


@pytest.fixture(scope="module")
def written() -> str:
    return write_page(REPORT, RECORDS, ["held-out loss 2.5 before", ATTACK], Path("runs/my run"))


@pytest.fixture(scope="module")
def page(written) -> Page:
    return Page(written)


def test_every_section_is_there(page):
    sections = ["Curves", "Answers", "Alarms", "Data", "Model", "Plan", "Environment", "Next"]
    assert page.headings == sections
    ids = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert [attributes["href"] for tag, attributes in page.tags if tag == "a"] == [f"#{one}" for one in ids]
    assert page.titles() == [
        "Loss",
        "Learning rate",
        "Gradient norm, before clipping",
        "Gradient norm of each layer",
        "Throughput, real tokens per second",
        "Peak GPU memory of each phase",
        "Rewards",
        "Share of pairs whose better answer wins",
        "Row length",
    ]
    for text in (
        "held-out loss 2.5 before",
        "1,280",
        "3 of 8 decoder layers, run forward only",
        "forge chat 'runs/my run'",
    ):
        assert text in page.text


def test_it_is_one_small_file_that_loads_nothing(written, page):
    assert len(written.encode()) < 6e6
    loading = ("src", "href", "srcset", "data", "action", "poster")
    places = [attributes[name] for _, attributes in page.tags for name in loading if name in attributes]
    assert all(place.startswith("#") for place in places)
    assert not {"link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    policy = next(one["content"] for _, one in page.tags if one.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe-eval" not in policy
    assert "@import" not in written.partition("</style>")[0] and "url(" not in written.partition("</style>")[0]


def test_no_text_of_a_run_becomes_markup_or_leaks_a_secret(written, page):
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "figure-data"}, {}, {}]
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert ATTACK in page.text  # shown as what it is
    assert SECRET not in written and "token ***" in page.text
    assert "one\ntwo\\x1b[31m" in page.text and "\x1b" not in written
    assert "<" not in page.figures
    label = json.loads(page.figures)[3]["traces"][0]["y"][0]
    assert label.startswith("&lt;/script&gt;")  # plotly.js reads tags in labels


def test_the_loss_leaves_skipped_steps_out_and_marks_them(page):
    loss = {trace["name"]: trace for trace in json.loads(page.figures)[0]["traces"]}
    assert (loss["training"]["x"], loss["training"]["y"]) == ([1, 3], [2.0, 1.5])
    assert (loss["held out"]["x"], loss["held out"]["y"]) == ([0, 3], [2.5, 1.6])
    assert loss["held out, EMA"]["y"] == [1.7]
    assert loss["skipped or bad step"]["x"] == [2]
    assert "alarm" not in loss  # step 2 is marked once


def test_the_plan_tells_what_was_chosen_from_defaults(page):
    chosen, _, every = page.text.partition("All 3 settings")
    assert "lora.r" in chosen and "seed" not in chosen.partition("Plan\n")[2]
    assert "seed" in every and "schema default" in every


@pytest.mark.parametrize("records", [[], [{"step": 1, "loss": 3.0}], [{"step": 1, "loss": "inf", "diverged": True}]])
def test_a_run_of_which_little_is_known_has_a_sound_page(records):
    page = Page(write_page({}, records, ["not finished, step 0: stopped"], Path("runs/x")))
    assert page.titles() == (["Loss"] if records else [])
    assert "Run x" in page.text and "forge resume runs/x" in page.text
    assert "Answers" not in page.headings and "Data" not in page.headings


def test_a_long_run_stays_small():
    labels = [f"layer {number}" for number in range(128)]
    records = [
        {
            "step": step,
            **dict.fromkeys(("loss", "grad_norm", "learning_rate", "tokens_per_second"), 1 + math.sin(step) / 3),
            **({"group_norms": dict.fromkeys(labels, 0.123456)} if step % 10 == 0 else {}),
        }
        for step in range(1, 20001)
    ]
    samples = [{"shown": "q" * 10**5, "wanted": "w", "before": "b" * 10**5, "after": "a"}] * 60
    assert len(write_page({"samples": samples}, records, ["x"], Path("runs/x")).encode()) < 6e6


def test_a_comparison_names_its_runs():
    page = Page(
        write_comparison({"one": RECORDS, ATTACK: RECORDS}, [["lora.r", "4", "8"]], [["held-out loss", "1.0", ATTACK]])
    )
    assert "1 setting differs" in page.text and "lora.r" in page.text
    assert "Training loss, smoothed" in page.titles() and "Held-out reward margin" in page.titles()
    assert sum(tag == "script" for tag, _ in page.tags) == 3


@pytest.mark.parametrize("packing", [True, False])
def test_packing_is_told_only_of_a_run_that_packed(packing):
    data = {"steps_per_epoch": 140, "packed_sequences": 70, "packed_ratio": 0.92}
    plan = {"data.packing": {"value": packing, "from": "--set"}}
    text = Page(write_page({"data": data, "plan": plan}, [], [], Path("x"))).text
    assert "140 steps per epoch." in text and ("Packed into 70 sequences, 92 % filled." in text) is packing


def test_a_reward_model_is_not_asked_and_a_whole_model_not_merged():
    report = {"losses": {}, "method": {"name": "reward", "lora": False}}
    assert list_commands(report, Path("runs/x")) == ["forge eval runs/x"]


def test_a_run_that_goes_on_is_watched():
    assert list_commands({"holder": "process 1"}, Path("runs/x")) == ["forge watch runs/x"]


def test_values_that_are_equal_look_equal():
    assert [write_value(one) for one in (1, 1.0, True, 0, False, None, [], [1, "b"], {}, 2e-4)] == [
        *("1", "1", "yes", "0", "no", "none", "none", "1, b", "on", "0.0002")
    ]


def test_a_long_text_is_cut_and_says_so():
    assert escape("x" * (MOST_CHARACTERS + 5)).endswith("x ... (5 more characters)")
