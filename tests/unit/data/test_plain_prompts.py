"""Prompts and answers that are text: what is asked, where answers begin, and what is said about it."""

from __future__ import annotations

import pytest
from row_files import prepare_rows, read_split, write_rows
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from forge_cli.data.conversation import split_texts
from forge_cli.data.outcomes import Limits
from forge_cli.data.report_text import list_notes
from forge_cli.data.row_tokens import RowTokenizer
from forge_cli.errors import DataError
from forge_cli.parts.rendering import Renderer
from forge_cli.paths import assets_root

END = "<|im_end|>"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tokenizer():
    """The embedded one joins ``h`` and ``e``, and a space with the word behind it."""
    tokenizer = AutoTokenizer.from_pretrained(assets_root() / "forge-tiny")
    assert tokenizer.tokenize("he") == ["he"] and tokenizer.tokenize("what is the") == ["w", "hat", "Ġis", "Ġthe"]
    return tokenizer


def prepare(tokenizer, tmp_path, rows: list[dict], method: str) -> tuple[list[dict], list[str]]:
    tokens = prepare_rows(tokenizer, method=method, train=write_rows(tmp_path / "rows.jsonl", rows))
    return read_split(tokens), list_notes(tokens.report)


def find_note(notes: list[str], words: str) -> str:
    (note,) = (one for one in notes if words in one)
    return note


# Answers that a token would join to their prompt.


def test_an_answer_that_its_prompt_would_swallow_is_trained_as_the_model_is_asked(tokenizer, tmp_path):
    pairs = [("h", "e"), ("what is ", "the"), ("what is", " the")]
    rows, notes = prepare(tokenizer, tmp_path, [{"prompt": p, "completion": a} for p, a in pairs], "sft")
    for row, (prompt, answer) in zip(rows, pairs, strict=True):
        asked = tokenizer(prompt)["input_ids"]
        assert row["input_ids"][: len(asked)] == asked
        assert row["labels"][: len(asked)] == [-100] * len(asked)
        assert row["labels"][len(asked) :] == row["input_ids"][len(asked) :]
        assert tokenizer.decode(row["input_ids"][len(asked) :]) == answer + END
    assert rows[2]["input_ids"] == tokenizer("what is the" + END)["input_ids"], "no reason to part these"
    note = find_note(notes, "tokenised apart")
    assert note.startswith("note: in 2 rows of train ") and "begin answers with the space" in note


def test_no_row_is_counted_where_borders_are_clean(tokenizer, tmp_path):
    rows = [{"prompt": "what is", "completion": " the"}, {"prompt": "Q\n", "completion": "the"}, {"text": "he"}]
    _, notes = prepare(tokenizer, tmp_path, rows[:2], "sft")
    assert not any("tokenised apart" in one for one in notes)
    _, notes = prepare(tokenizer, tmp_path, rows[2:], "sft")
    assert notes == []


def test_one_answer_of_a_pair_that_its_prompt_would_swallow(tokenizer, tmp_path):
    """Both answers have to follow the same prompt, whichever of them a token would join to it."""
    pair = {"prompt": "h", "chosen": "e", "rejected": " it"}
    for turned in (pair, {**pair, "chosen": " it", "rejected": "e"}):
        ((row,), notes) = prepare(tokenizer, tmp_path, [turned], "dpo")
        assert row["prompt_ids"] == tokenizer("h")["input_ids"]
        for side in ("chosen", "rejected"):
            assert tokenizer.decode(row[f"{side}_ids"]) == turned[side] + END
        assert find_note(notes, "tokenised apart").startswith("note: in 1 row of train ")


def test_a_rated_answer_that_its_whole_prompt_would_swallow(tokenizer, tmp_path):
    rated = [{"prompt": "h", "completion": "e", "label": True}, {"prompt": "h", "completion": " it", "label": False}]
    rows, notes = prepare(tokenizer, tmp_path, rated, "kto")
    assert [row["prompt_ids"] for row in rows] == [tokenizer("h")["input_ids"]] * 2
    assert [tokenizer.decode(row["completion_ids"]) for row in rows] == [f"e{END}", f" it{END}"]
    assert find_note(notes, "tokenised apart").startswith("note: in 1 row of train ")


@pytest.mark.parametrize(
    ("method", "row"),
    [
        ("kto", {"prompt": "", "completion": "blue", "label": True}),
        ("dpo", {"prompt": "", "chosen": "blue", "rejected": "a"}),
    ],
)
def test_an_answer_to_nothing_is_refused(tokenizer, tmp_path, method, row):
    with pytest.raises(DataError, match=r"rows.jsonl:1: no token stands before the answer.*give the row a prompt"):
        prepare(tokenizer, tmp_path, [row], method)


# Pairs of text without a prompt.


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The cat sat.", "The cat ran.", "The cat"),
        ("The cats", "The cat", "The"),
        ("The cat", "The cat sat", "The"),
        ("The cat sat", "The cat ", "The"),
        ("It is blue", "It is\nblue", "It is"),
        ("Human: hi\n\nAssistant: I love it", "Human: hi\n\nAssistant: I hate it", "Human: hi\n\nAssistant: I"),
        ("Q: why?\n\nYes", "Q: why?\n\nNo", "Q: why?\n\n"),
        ("Q: why?\n  Yes", "Q: why?\n  No", "Q: why?\n"),
        ("\n\nYes", "\n\nNo", "\n\n"),
        ("Paris is", "Parma is", ""),
        ("blue", "green", ""),
        ("猫は座った。", "猫は走った。", ""),
    ],
)
def test_the_prompt_that_two_texts_share_ends_with_a_word(chosen, rejected, prompt):
    found, *answers = split_texts(chosen, rejected)
    assert found == prompt
    assert [found + answer for answer in answers] == [chosen, rejected]
    assert all(answer.strip() for answer in answers)


@pytest.mark.parametrize("given", [{}, {"prompt": None}, {"prompt": ""}])
def test_pairs_without_a_prompt_are_split_and_counted(tokenizer, tmp_path, given):
    """What both say counts for neither: methods that weigh answers by their length would weigh it."""
    pairs = [("The sky is blue.", "The sky is green."), ("Q: h\n\nhe is", "Q: h\n\nit was")]
    rows = [{"chosen": chosen, "rejected": rejected, **given} for chosen, rejected in pairs]
    rows.append({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."})
    found, notes = prepare(tokenizer, tmp_path, rows, "orpo")
    for row, texts, prompt in zip(found, pairs, ["The sky is", "Q: h\n\n"], strict=False):
        assert tokenizer.decode(row["prompt_ids"]) == prompt
        whole = [row["prompt_ids"] + row[f"{side}_ids"] for side in ("chosen", "rejected")]
        assert whole == [tokenizer(text + END)["input_ids"] for text in texts]
    assert {**found[2], "row": 1} == found[0], "as if the prompt had been given"
    note = find_note(notes, "without a prompt")
    assert note.startswith("note: 2 pairs of train ") and "end of a word" in note


def test_texts_without_a_prompt_are_tokenised_whole():
    """Two line breaks are one token at the end of a text, and two before a word: nobody asks with what was found."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, "\u010a\u010a", END]
    bare = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, [("\u010a", "\u010a")]))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token=END)
    assert tokenizer.tokenize("Q\n\n") == ["Q", "\u010a\u010a"] != tokenizer.tokenize("Q\n\nY")[:2]
    rows = RowTokenizer(Renderer(tokenizer), Limits("preference", "assistant", 128, "error"))
    (outcome,) = rows.tokenize([(1, {"chosen": "Q\n\nY", "rejected": "Q\n\nN"}, False)])
    assert tokenizer.convert_ids_to_tokens(outcome.columns[0]["prompt_ids"]) == ["Q", "\u010a", "\u010a"]
    assert not outcome.is_parted and outcome.is_prompt_found


def test_a_prompt_that_was_found_is_no_question(tokenizer):
    """Where the question ends and both answers begin alike is not known."""
    rows = RowTokenizer(Renderer(tokenizer), Limits("preference", "assistant", 128, "error"))
    pair = {"chosen": "Q: he?\nA: it is so", "rejected": "Q: he?\nA: it is not"}
    (found,) = rows.tokenize([(1, pair, True)])
    (given,) = rows.tokenize([(1, {"prompt": "Q: he?\n", "chosen": "A: so", "rejected": "A: no"}, True)])
    assert (found.status, found.question) == ("kept", None)
    assert given.question.shown == "Q: he?"


def test_plain_prompts_are_told_where_a_template_is_left_out(tokenizer, tmp_path):
    pair = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    told = {}
    for name, method, row in (
        ("pair", "dpo", pair),
        ("completion", "sft", {"prompt": "what is", "completion": " the"}),
        ("nothing asked", "sft", {"prompt": "", "completion": "the"}),
        ("text", "sft", {"text": "the"}),
    ):
        told[name] = any("without the chat template" in one for one in prepare(tokenizer, tmp_path, [row], method)[1])
    assert told == {"pair": True, "completion": True, "nothing asked": False, "text": False}


# Values that are no text.

TURN = {"role": "user", "content": "a"}
NO = {"role": "assistant", "content": "no"}
ANSWERED = [TURN, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("method", "row", "what"),
    [
        ("sft", {"prompt": None, "completion": "b"}, "prompt is null, not text or a list of turns; fill it in"),
        ("sft", {"prompt": "a", "completion": 4}, 'completion is the number 4, not text or a list of turns; write "4"'),
        ("sft", {"prompt": 1.5, "completion": "b"}, 'prompt is the number 1.5, not text or a list .* write "1.5"'),
        ("sft", {"prompt": "a", "completion": True}, 'completion is true, not text or a list of turns; write "true"'),
        ("sft", {"prompt": "a", "completion": {"text": "b"}}, "completion is a mapping, not text or a list of turns"),
        ("sft", {"prompt": [], "completion": "b"}, "prompt is a list and completion is text; write both as text or"),
        ("sft", {"prompt": [TURN], "completion": [{"role": "assistant", "content": 3}]}, "turn 1 of completion has"),
        ("sft", {"instruction": "a", "output": None}, "output is null, not text; fill it in"),
        ("sft", {"text": 7}, 'text is the number 7, not text; write "7"'),
        ("sft", {"messages": None}, "messages is not a list of turns, but null"),
        ("kto", {"prompt": "a", "completion": None, "label": True}, "completion is null, not text or a list of turns"),
        ("kto", {"prompt": "a ", "completion": "b", "label": None}, "label is null; an answer is wanted"),
        ("kto", {"prompt": "a ", "completion": "b", "label": "yes"}, "label is 'yes'; an answer is wanted"),
        ("dpo", {"chosen": None, "rejected": None}, "chosen is null, not text or a list of turns; fill it in"),
        ("dpo", {"chosen": "a", "rejected": 0}, 'rejected is the number 0, not text or a list of turns; write "0"'),
        ("dpo", {"prompt": 0, "chosen": "a", "rejected": "b"}, 'prompt is the number 0, not text; write "0"'),
        ("dpo", {"prompt": [TURN], "chosen": "a", "rejected": "b"}, "prompt is a list, not text"),
        (
            "dpo",
            {"prompt": 5, "chosen": ANSWERED, "rejected": [TURN, NO]},
            "prompt is the number 5, not text or a list",
        ),
        (
            "dpo",
            {"chosen": ANSWERED, "rejected": [TURN, {**NO, "content": 2}]},
            "turn 2 of rejected has .* the number 2",
        ),
        ("dpo", {"chosen": ANSWERED, "rejected": "b"}, "chosen is a list and rejected is text"),
    ],
)
def test_a_value_that_is_no_text_is_named_with_its_row_and_column(tokenizer, tmp_path, method, row, what):
    with pytest.raises(DataError, match=f"rows.jsonl:1: {what}"):
        prepare(tokenizer, tmp_path, [row], method)


def test_a_column_of_numbers_is_named(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.parquet", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    with pytest.raises(DataError, match=r"rows.parquet row 2: completion is null, not text"):
        prepare_rows(tokenizer, train=path)
    path = write_rows(tmp_path / "rows.parquet", [{"prompt": "a", "completion": 0.5}])
    with pytest.raises(DataError, match=r'rows.parquet row 1: completion is the number 0.5, .* write "0.5"'):
        prepare_rows(tokenizer, train=path)
