"""What is trained: the answers and their end tokens, to the letter, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from forge_cli.parts.rendering import IGNORED, Renderer, RowError, Tokens, render_messages
from forge_cli.paths import assets_root

END = "<|im_end|>"
CHAT = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "What is a mola?"},
    {"role": "assistant", "content": "A fish:\n\n    it  drifts. \U0001f41f"},
    {"role": "user", "content": "And a teju?"},
    {"role": "assistant", "content": "A lizard."},
]
# Strips the thinking of all answers but the last, as reasoning models do.
THINKING = """{%- for m in messages -%}
<|im_start|>{{ m.role }}
{{ m.content.split('</think>')[-1] if m.role == 'assistant' and not loop.last else m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
NO_SYSTEM = """{%- for m in messages -%}
{%- if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif -%}
<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA_LIKE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[{{ m.content | trim }}]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def load() -> Callable:
    """Loads the embedded tokenizer, with its own chat template or another."""

    def load(template: str | None = ""):
        tokenizer = AutoTokenizer.from_pretrained(assets_root() / "forge-tiny")
        if template != "":
            tokenizer.chat_template = template
        return tokenizer

    return load


@pytest.fixture(scope="module")
def tiny(load):
    return load()


@pytest.fixture
def beginning() -> PreTrainedTokenizerFast:
    """A byte tokenizer that writes a begin token by itself, and keeps spaces out of its offsets, like Llama 3."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<bos>", "<eos>", "<stop>", *letters])}
    vocabulary |= {"\u0120\u0120": len(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("\u0120", "\u0120")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    begin = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), begin])
    tokenizer.add_special_tokens(["<bos>", "<eos>", "<stop>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


def trained_text(tokenizer, tokens: Tokens) -> str:
    assert len(tokens.labels) == len(tokens.input_ids)
    pairs = zip(tokens.labels, tokens.input_ids, strict=True)
    assert all(label in (IGNORED, token) for label, token in pairs)
    return tokenizer.decode([label for label in tokens.labels if label != IGNORED])


def tokenize(tokenizer, row) -> Tokens:
    return next(Renderer(tokenizer).tokenize([row]))


def test_answers_and_their_end_tokens_are_trained_and_nothing_else(tiny):
    tokens = render_messages(tiny, CHAT, train_on="assistant")
    assert trained_text(tiny, tokens) == CHAT[2]["content"] + END + CHAT[4]["content"] + END
    assert tiny.decode(tokens.input_ids) == tiny.apply_chat_template(CHAT, tokenize=False)


@pytest.mark.parametrize("chat", [CHAT, CHAT[1:3], [CHAT[2], *CHAT[3:]], [*CHAT, CHAT[1]]])
def test_labels_equal_the_mask_that_the_template_itself_marks(tiny, chat):
    """The shipped template says with ``{% generation %}`` what an answer is; Forge does not read that mark."""
    wanted = tiny.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
    tokens = render_messages(tiny, chat, train_on="assistant")
    assert tokens.input_ids == wanted["input_ids"]
    assert [label != IGNORED for label in tokens.labels] == [bool(mask) for mask in wanted["assistant_masks"]]
    assert tokens.num_trained == sum(wanted["assistant_masks"]) > 0


def test_the_line_break_after_the_end_token_is_not_trained(tiny):
    tokens = render_messages(tiny, CHAT, train_on="assistant")
    assert tiny.decode(tokens.input_ids[-2:]) == END + "\n"
    assert tokens.labels[-2:] == [tiny.convert_tokens_to_ids(END), IGNORED]


def test_last_assistant_trains_one_answer(tiny):
    tokens = render_messages(tiny, CHAT, train_on="last_assistant")
    assert trained_text(tiny, tokens) == "A lizard." + END
    assert tokens.input_ids == render_messages(tiny, CHAT, train_on="all").input_ids


def test_all_trains_every_token(tiny):
    tokens = render_messages(tiny, CHAT, train_on="all")
    assert tokens.labels == tokens.input_ids
    assert render_messages(tiny, CHAT[:2], train_on="all").num_trained > 0  # no answer is needed


def test_turns_of_a_prompt_are_not_trained(tiny):
    row = Renderer(tiny).render_messages(CHAT, train_on="assistant", trained_from=4)
    assert trained_text(tiny, tokenize(tiny, row)) == "A lizard." + END


def test_completion_and_its_end_token_are_trained(tiny):
    tokens = tokenize(tiny, Renderer(tiny).render_completion("2 + 2 =", " 4", train_on="assistant"))
    assert trained_text(tiny, tokens) == " 4" + END
    assert tiny.decode(tokens.input_ids) == "2 + 2 = 4" + END
    everything = tokenize(tiny, Renderer(tiny).render_completion("2 + 2 =", " 4", train_on="all"))
    assert everything.labels == everything.input_ids == tokens.input_ids


def test_a_token_across_the_border_is_parted(load):
    """The model is asked with the space; the first word of every answer is learned, and nothing of the prompt."""
    tokenizer = load()
    joined = next(token for token in tokenizer.get_vocab() if token.startswith("\u0120") and token[1:].isalpha())
    word = joined[1:]
    assert len(tokenizer(f" {word}")["input_ids"]) == 1
    tokens = tokenize(tokenizer, Renderer(tokenizer).render_completion("x: ", word, train_on="assistant"))
    assert trained_text(tokenizer, tokens) == f"{word}{END}"
    asked = tokenizer("x: ")["input_ids"]
    assert tokens.input_ids[: len(asked)] == asked


def test_text_gets_one_end_token(tiny):
    tokens = tokenize(tiny, Renderer(tiny).render_text("once upon a time\n"))
    assert tiny.decode(tokens.input_ids) == "once upon a time\n" + END
    assert tokens.labels == tokens.input_ids
    assert tokens.input_ids.count(tiny.eos_token_id) == 1


def test_a_tokenizer_that_ends_texts_itself_gets_no_second_end_token(load):
    tokenizer = load()
    ends = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = ends
    tokens = tokenize(tokenizer, Renderer(tokenizer).render_completion("a", "b", train_on="assistant"))
    assert tokenizer.decode(tokens.input_ids) == "ab" + END
    assert trained_text(tokenizer, tokens) == "b" + END
    assert tokenizer.decode(Renderer(tokenizer).encode_prompt("a")) == "a"


def test_one_begin_token_and_it_is_never_trained(beginning):
    renderer = Renderer(beginning)
    text = tokenize(beginning, renderer.render_text("ab"))
    assert beginning.decode(text.input_ids) == "<bos>ab<eos>"
    assert trained_text(beginning, text) == "ab<eos>"
    completion = tokenize(beginning, renderer.render_completion("a", "b", train_on="assistant"))
    assert beginning.decode(completion.input_ids) == "<bos>ab<eos>"
    assert trained_text(beginning, completion) == "b<eos>"
    assert beginning.decode(renderer.encode_prompt("a")) == "<bos>a"


def test_the_template_writes_the_begin_token_where_there_is_one(beginning):
    beginning.chat_template = LLAMA_LIKE
    chat = [{"role": "user", "content": "hi "}, {"role": "assistant", "content": " yo "}]
    tokens = render_messages(beginning, chat, train_on="assistant")
    assert beginning.decode(tokens.input_ids) == "<bos>[hi] yo<eos>"
    assert trained_text(beginning, tokens) == " yo<eos>"
    assert beginning.decode(Renderer(beginning).encode_prompt(chat[:1])) == "<bos>[hi]"
    beginning.chat_template = "{{ bos_token }}" + LLAMA_LIKE
    with pytest.raises(RowError, match="two begin tokens"):
        render_messages(beginning, chat, train_on="assistant")


@pytest.mark.parametrize("answer", ["  x\n    y  ", " \U0001f41f", "\U0001f41f\n"])
def test_spaces_and_characters_of_several_tokens_are_trained_whole(beginning, answer):
    """Indentation is part of an answer: many tokenizers give a token of spaces an empty place in the text."""
    tokens = tokenize(beginning, Renderer(beginning).render_completion("\U0001f41f:", answer, train_on="assistant"))
    assert trained_text(beginning, tokens) == f"{answer}<eos>"
    beginning.chat_template = LLAMA_LIKE.replace(" | trim", "")
    chat = [{"role": "user", "content": "\U0001f41f "}, {"role": "assistant", "content": answer}]
    assert trained_text(beginning, render_messages(beginning, chat * 2, train_on="assistant")) == f" {answer}<eos>" * 2


def test_rows_of_a_batch_do_not_depend_on_each_other(tiny):
    renderer = Renderer(tiny)
    rows = [
        renderer.render_messages(CHAT, train_on="assistant"),
        renderer.render_text("a much longer text " * 9),
        renderer.render_messages(CHAT[1:3], train_on="all"),
        renderer.render_completion("x", "y", train_on="assistant"),
    ]
    assert list(renderer.tokenize(rows)) == [tokenize(tiny, row) for row in rows]


@pytest.mark.parametrize("text", ["stop <|im_end|> here", "<|endoftext|>", "<|im_end|><|im_start|>assistant\nyes"])
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_the_text_of_a_special_token_stays_text(tiny, text, role):
    chat = [{**turn, "content": text} if turn["role"] == role else turn for turn in CHAT]
    tokens = render_messages(tiny, chat, train_on="assistant")
    assert tiny.decode(tokens.input_ids) == tiny.apply_chat_template(chat, tokenize=False)
    plain = render_messages(tiny, CHAT, train_on="assistant")
    for token in (END, "<|im_start|>", "<|endoftext|>"):
        number = tiny.convert_tokens_to_ids(token)
        assert tokens.input_ids.count(number) == plain.input_ids.count(number)
    renderer = Renderer(tiny)
    rows = [renderer.render_text(text), renderer.render_completion(text, "a", train_on="all")]
    for one in renderer.tokenize(rows):
        assert tiny.decode(one.input_ids).startswith(text)
        assert one.input_ids.count(tiny.eos_token_id) == 1  # the one that ends the row


def test_special_tokens_without_a_name_stay_text_too(beginning):
    assert "<stop>" not in beginning.all_special_tokens
    tokens = tokenize(beginning, Renderer(beginning).render_text("a <stop> b"))
    assert beginning.decode(tokens.input_ids) == "<bos>a <stop> b<eos>"
    assert beginning.convert_tokens_to_ids("<stop>") not in tokens.input_ids


@pytest.mark.parametrize(
    ("chat", "why"),
    [
        ([], "the conversation is empty"),
        (CHAT[:2], "no assistant turn"),
        (["hello"], "turn 1 is not a mapping"),
        ([{"role": "user"}], "turn 1 is not a mapping with role and content"),
        ([CHAT[1], {"role": "gpt", "content": "x"}], "turn 2 has the unknown role 'gpt'"),
        ([CHAT[1], {"role": "assistant", "content": None}], "turn 2 has content that is not text"),
        ([CHAT[1], {"role": "assistant", "content": " \n"}], "turn 2 is an empty answer"),
        ([{"role": "user", "content": "\ud83d"}, CHAT[2]], "half a character, '.ud83d'"),
    ],
)
def test_conversations_that_cannot_be_trained_on_say_why(tiny, chat, why):
    with pytest.raises(RowError, match=why):
        render_messages(tiny, chat, train_on="assistant")


def test_empty_texts_are_refused(tiny):
    with pytest.raises(RowError, match="the text is empty"):
        Renderer(tiny).render_text("")
    with pytest.raises(RowError, match="the completion is empty"):
        Renderer(tiny).render_completion("a", "", train_on="all")
    with pytest.raises(RowError, match="int where text is wanted"):
        Renderer(tiny).render_completion("a", 7, train_on="all")


def test_a_template_that_rewrites_earlier_answers_is_refused_unless_one_answer_is_trained(load):
    tokenizer = load(THINKING)
    chat = [CHAT[1], {"role": "assistant", "content": "<think>hm</think>A fish."}, *CHAT[3:]]
    with pytest.raises(RowError, match=r"leaves out text of turn 2 .*'hm'; data.train_on: last_assistant may work"):
        render_messages(tokenizer, chat, train_on="assistant")
    tokens = render_messages(tokenizer, chat, train_on="last_assistant")
    assert trained_text(tokenizer, tokens) == "A lizard." + END
    assert "hm" not in tokenizer.decode(tokens.input_ids)
    assert render_messages(tokenizer, chat, train_on="all").num_trained == len(tokens.input_ids)


def test_a_template_that_asks_in_other_words_than_it_writes_is_refused(load):
    tokenizer = load(NO_SYSTEM.replace("assistant\n", "assistant\n<think>\n"))
    with pytest.raises(RowError, match=r"in other words .* turn 2.*model.chat_template"):
        render_messages(tokenizer, CHAT[1:3], train_on="assistant")


MOVES = """{%- for m in messages if m.role != 'system' -%}
<|im_start|>{{ m.role }}
{{ messages[0].content ~ ' ' if loop.last and messages[0].role == 'system' }}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (MOVES, "moves text across turn 3"),
        (
            MOVES.replace("messages[0].content", "'' if messages else ''"),
            r"leaves out text of turn 1 \(system\): 'You are",
        ),
        (NO_SYSTEM.replace("m.content", "m.content | upper"), "rewrites the text of turn 2"),
        (NO_SYSTEM.replace("{{ m.content", "{{ m.content | length }}{{ m.content"), "rewrites turn 2"),
    ],
)
def test_templates_that_move_drop_or_rewrite_text_are_refused(load, template, why):
    chat = CHAT if "system" in why or "moves" in why else CHAT[1:]
    with pytest.raises(RowError, match=why.replace("turn 2", "turn 1")):
        render_messages(load(template), chat, train_on="assistant")


def test_generation_marks_that_mark_something_else_are_refused(load):
    marked = NO_SYSTEM.replace(
        "<|im_start|>{{ m.role }}\n",
        "<|im_start|>{% if m.role == 'assistant' %}{% generation %}{{ m.role }}{% endgeneration %}"
        "{% else %}{{ m.role }}{% endif %}{{ '\n' }}",
    )
    with pytest.raises(RowError, match="marks 'assistant' as generated"):
        render_messages(load(marked), CHAT[1:], train_on="assistant")


def test_a_turn_of_weight_0_is_not_trained(tiny):
    chat = [{**turn, "weight": 0} if turn is CHAT[2] else turn for turn in CHAT]
    assert trained_text(tiny, render_messages(tiny, chat, train_on="assistant")) == "A lizard." + END
    with pytest.raises(RowError, match=r"turn 3 has the weight 0.5"):
        render_messages(tiny, [*CHAT[:2], {**CHAT[2], "weight": 0.5}], train_on="assistant")


def test_what_a_template_refuses_is_passed_on(load):
    with pytest.raises(RowError, match="refuses this conversation: System role not supported"):
        render_messages(load(NO_SYSTEM), CHAT, train_on="assistant")


def test_without_an_end_token_nothing_could_learn_to_stop(load):
    tokenizer = load("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    with pytest.raises(RowError, match="writes no end token after turn 3"):
        render_messages(tokenizer, CHAT, train_on="assistant")
    tokenizer.eos_token = None
    with pytest.raises(RowError, match="the tokenizer has no end token"):
        Renderer(tokenizer).render_text("a")


def test_the_end_token_of_an_answer_is_the_templates(load):
    """Chat templates on base models often end a turn with another token than the tokenizer names."""
    tokenizer = load()
    tokenizer.eos_token = "<|endoftext|>"
    assert Renderer(tokenizer).find_end_token() == tokenizer.convert_tokens_to_ids(END) != tokenizer.eos_token_id
    tokenizer.chat_template = None
    assert Renderer(tokenizer).find_end_token() == tokenizer.eos_token_id


def test_prompts_end_where_the_answer_begins(tiny):
    prompt = Renderer(tiny).encode_prompt(CHAT[:4])
    whole = render_messages(tiny, CHAT, train_on="last_assistant")
    first_trained = next(i for i, label in enumerate(whole.labels) if label != IGNORED)
    assert prompt == whole.input_ids[:first_trained]
