"""Where a prompt given as text ends and its answer begins: the model is trained as it will be asked."""

from __future__ import annotations

import pytest
from golden_families import FAMILIES, build_tokenizer, spell
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from forge_cli.parts.rendering import IGNORED, Renderer, RowError

# Prompt and answer. Some share a token in all families, some in a few, some in none.
BORDERS = [
    ("What is the weather?", " The weather is clear."),
    ("What is ", "the answer"),
    ("Look:\n", "\n    def f(x):"),
    ("two spaces  ", "and two more"),
    ("The weath", "er is clear"),
    ("The weath", "er <eos> is </s> clear"),
    ("The weather <|im_end|> is ", "the answer"),
    ("12", "34"),
    ("it ", "'s"),
    ("a \U0001f41f", "\u200d\U0001f41f b"),
]


@pytest.mark.parametrize("train_on", ["assistant", "all"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_is_what_will_be_asked_and_the_answer_is_trained_to_the_letter(name, train_on):
    tokenizer = build_tokenizer(name)
    renderer = Renderer(tokenizer)
    rows = [renderer.render_completion(*border, train_on=train_on) for border in BORDERS]
    parted = []
    for (prompt, answer), tokens in zip(BORDERS, renderer.tokenize(rows), strict=True):
        asked = renderer.encode_prompt(prompt)
        if "<" not in prompt + answer:  # Forge alone keeps the text of special tokens as text
            assert asked == tokenizer(prompt)["input_ids"]
            joined = tokenizer(prompt + answer)["input_ids"]
            is_clean = joined[: len(asked)] == asked
            assert tokens.is_parted == (not is_clean)
            assert not is_clean or tokens.input_ids == [*joined, tokenizer.eos_token_id]
        assert tokens.input_ids[: len(asked)] == asked
        pieces = spell(name, tokenizer, tokens.input_ids)
        assert b"".join(pieces[len(asked) : -1]) == answer.encode()
        assert tokens.input_ids[-1] == tokenizer.eos_token_id
        bare = asked[1:] if tokenizer(prompt)["input_ids"][0] == tokenizer.bos_token_id else asked
        trained = [*(bare if train_on == "all" else []), *tokens.input_ids[len(asked) :]]
        assert [label for label in tokens.labels if label != IGNORED] == trained
        parted.append(tokens.is_parted)
    assert not parted[0] and any(parted)


def test_text_without_a_prompt_has_no_border():
    renderer = Renderer(build_tokenizer("chatml"))
    rows = [renderer.render_text("the answer"), renderer.render_completion("", "the answer", train_on="assistant")]
    assert [tokens.is_parted for tokens in renderer.tokenize(rows)] == [False, False]


def test_a_token_that_cannot_be_parted_is_a_bad_row():
    """A tokenizer whose vocabulary joins everything it does not know, such as a break and what stands behind it."""
    vocabulary = [("<unk>", 0.0), ("a", -1.0), ("b", -1.0), ("ab", -0.5), ("a\u00e9", -0.5)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.Unigram(vocabulary, unk_id=0)), eos_token="<eos>", unk_token="<unk>"
    )
    renderer = Renderer(tokenizer)
    (whole,) = renderer.tokenize([renderer.render_completion("a", "b", train_on="assistant")])
    assert tokenizer.convert_ids_to_tokens(whole.input_ids) == ["a", "b", "<eos>"] and whole.is_parted
    # One token stands for both unknown letters, and the prompt has it already.
    (known,) = renderer.tokenize([renderer.render_completion("b\u00e9", "\u00e9b", train_on="assistant")])
    assert known.labels == [IGNORED, IGNORED, *known.input_ids[2:]] and len(known.labels) == 4
    with pytest.raises(RowError, match=r"prompt and answer share a token .* begin the answer with"):
        list(renderer.tokenize([renderer.render_completion("a", "\u00e9b", train_on="assistant")]))
