"""Rows of which only the beginning is tokenised: the same comes of them as if they had been tokenised whole."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from forge_cli.data import long_rows
from forge_cli.data.outcomes import Limits, Outcome
from forge_cli.data.row_tokens import RowTokenizer
from forge_cli.parts.rendering import Renderer
from forge_cli.paths import assets_root

LONG = "the otter of the river eats 1723 clams; " * 8000  # 320,000 characters
SHORT = "the otter"
END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(assets_root() / "forge-tiny")


@pytest.fixture
def sizes(monkeypatch):
    """Notes how many characters are tokenised at once."""
    seen, encode = [], Renderer._encode

    def note(self, rows):
        seen.append(max(len(row.text) for row in rows))
        return encode(self, rows)

    monkeypatch.setattr(Renderer, "_encode", note)
    return seen


def judge(tokenizer, row: dict, kind: str, on_overlong: str, max_length: int = 64) -> Outcome:
    rows = RowTokenizer(Renderer(tokenizer), Limits(kind, "assistant", max_length, on_overlong))
    (outcome,) = rows.tokenize([(1, row, False)])
    return outcome


def judge_both_ways(monkeypatch, tokenizer, row: dict, kind: str, on_overlong: str) -> tuple[Outcome, Outcome]:
    short = judge(tokenizer, row, kind, on_overlong)
    monkeypatch.setattr(long_rows, "shorten", lambda rows, limits: rows)
    return short, judge(tokenizer, row, kind, on_overlong)


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = {
    "text": ({"text": LONG}, "text"),
    "a long completion": ({"prompt": SHORT, "completion": LONG}, "prompt_completion"),
    "a long prompt": ({"prompt": LONG, "completion": SHORT}, "prompt_completion"),
    "a long answer": (chat(SHORT, LONG), "messages"),
    "a long question": (chat(LONG, SHORT), "messages"),
    "one long answer of two": ({"prompt": SHORT, "chosen": " " + LONG, "rejected": " no"}, "preference"),
    "answers that differ at their end": ({"prompt": SHORT, "chosen": LONG + "a", "rejected": LONG + "b"}, "preference"),
    "a long prompt of two": ({"prompt": LONG, "chosen": "yes", "rejected": "no"}, "preference"),
    "an unwanted answer": ({"prompt": SHORT, "completion": " " + LONG, "label": False}, "unpaired_preference"),
}


@pytest.mark.parametrize("on_overlong", ["drop", "truncate"])
@pytest.mark.parametrize("name", ROWS)
def test_the_same_comes_of_the_beginning_as_of_the_whole(monkeypatch, tokenizer, name, on_overlong):
    row, kind = ROWS[name]
    begun, whole = judge_both_ways(monkeypatch, tokenizer, row, kind, on_overlong)
    # Of a row that is left out nobody asks how it would have been tokenised.
    other = {"length": 0} if begun.columns else {"length": 0, "is_parted": False}
    assert begun._replace(**other) == whole._replace(**other)
    assert whole.length <= begun.length <= whole.length + 20, "pieces meet 19 times"
    assert begun.status == ("cut" if on_overlong == "truncate" and begun.columns else "dropped")


def test_only_beginnings_are_tokenised(tokenizer, sizes):
    outcome = judge(tokenizer, {"text": LONG}, "text", "drop")
    assert 0 <= outcome.length - len(tokenizer(LONG + END)["input_ids"]) <= 20, "pieces meet 18 times, and one end"
    assert max(sizes) == long_rows.PIECE_CHARACTERS


def test_the_longest_row_that_is_allowed_decides_how_much_is_looked_at(tokenizer, sizes):
    outcome = judge(tokenizer, {"text": LONG}, "text", "truncate", max_length=8192)
    assert max(sizes) == 16 * 8192 and outcome.status == "cut"
    assert list(outcome.columns[0]["input_ids"]) == tokenizer(LONG)["input_ids"][:8192]


def test_a_text_that_is_to_be_split_has_the_same_tokens_in_pieces(tokenizer, sizes):
    outcome = judge(tokenizer, {"text": LONG}, "text", "split")
    assert max(sizes) <= long_rows.PIECE_CHARACTERS
    for name in ("input_ids", "labels"):
        ids = [one for part in outcome.columns for one in part[name]]
        assert ids == tokenizer(LONG + END)["input_ids"]
    assert outcome.trained == outcome.length == len(ids) and outcome.has_end


def test_a_begin_token_stands_before_the_first_piece_only(tokenizer):
    begins = AutoTokenizer.from_pretrained(assets_root() / "forge-tiny", bos_token="<|im_start|>")
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 2)]
    )
    outcome = judge(begins, {"text": LONG}, "text", "split")
    ids = [one for part in outcome.columns for one in part["input_ids"]]
    assert ids == begins(LONG + END)["input_ids"] and ids.count(2) == 1


def test_a_text_without_spaces_loses_nothing(tokenizer):
    outcome = judge(tokenizer, {"text": "x<|im_end|>9é" * 8000}, "text", "split")
    ids = [one for part in outcome.columns for one in part["input_ids"]]
    assert tokenizer.decode(ids) == "x<|im_end|>9é" * 8000 + END and ids.count(3) == 1
    assert outcome.escaped == 8000


def test_characters_that_give_no_tokens_are_not_taken_for_many():
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<end>": 2}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    outcome = judge(tokenizer, {"text": "a" + " " * 300_000 + "b"}, "text", "drop")
    assert outcome.status == "kept" and list(outcome.columns[0]["input_ids"]) == [0, 1, 2]
