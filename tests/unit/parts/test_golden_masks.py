"""Golden masks: 16 chat formats x 6 shapes of conversation, to the token.

What is trained is written down by hand in :mod:`golden_formats`; Forge has to find it from the chat templates in
``tests/golden/masks`` alone. Where a format cannot carry a conversation, Forge has to say so.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from itertools import compress, groupby
from operator import attrgetter, itemgetter
from pathlib import Path

import pytest
from golden_conversations import (
    ANSWER,
    CALL,
    MORE,
    QUESTION,
    SHAPES,
    THOUGHT,
    TOOLS,
    WITH_TOOLS,
    converse,
)
from golden_families import FAMILIES, TEMPLATES, build_tokenizer, spell
from golden_formats import Segment

from forge_cli.parts.rendering import IGNORED, Renderer, RowError, Tokens

LEFT_OUT = "leaves out"
ALTERNATE = "refuses .* must alternate"
OTHER_WORDS = "asks for an answer in other words"
# What a format cannot carry, and what a user has to be told. All other cells have a golden mask.
REFUSED = {
    ("mistral_v01", "system"): ALTERNATE,
    ("mistral_v03", "system"): LEFT_OUT,  # written only while the last turn is the user's
    ("gemma", "system"): "refuses .*System role not supported",
    ("chatml", "tools"): LEFT_OUT,
    ("llama2", "tools"): ALTERNATE,
    ("mistral_v01", "tools"): ALTERNATE,
    ("gemma", "tools"): ALTERNATE,
    ("gemma3", "tools"): ALTERNATE,
    ("command_r", "tools"): ALTERNATE,
    ("phi3", "tools"): LEFT_OUT,
    ("zephyr", "tools"): LEFT_OUT,
    ("tulu", "tools"): LEFT_OUT,
    # R1 is asked with an opened <think> that its template never writes before an answer, and it drops all thinking.
    **{("deepseek_r1", shape): OTHER_WORDS for shape in ("question", "system", "turns", "nasty")},
    ("deepseek_r1", "tools"): LEFT_OUT,
    ("deepseek_v3", "tools"): LEFT_OUT,  # writes calls, but no definitions
    ("deepseek_r1", "reasoning"): LEFT_OUT,
    ("deepseek_v3", "reasoning"): LEFT_OUT,
}
ANSWERS = [name for name in FAMILIES if (name, "turns") not in REFUSED]
READS_TOOLS = ("llama31", "mistral_v03", "mistral_tekken", "qwen25", "qwen3")
CELLS = [(name, shape) for name in FAMILIES for shape in SHAPES]
CARRIED = [cell for cell in CELLS if cell not in REFUSED]
# The weight of a turn is Forge's own; templates that look through the keys of a message must not find it.
NO_WEIGHT = "{%- for turn in messages if 'weight' in turn -%}{{ raise_exception('weight') }}{%- endfor -%}"
REAL = Path(find_spec("trl").origin).parent / "chat_templates"


def write(name: str, messages: list[dict], tools: list[dict] | None = None) -> list[Segment]:
    return [segment for segment in FAMILIES[name].write(messages, tools) if segment.text]


def join(segments: list[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def keep_answers(segments: list[Segment], *kept: int) -> list[Segment]:
    """Leaves only some of the answers trained, by their number from 0."""
    runs = [list(run) for _, run in groupby(segments, attrgetter("trained"))]
    answers = [number for number, run in enumerate(runs) if run[0].trained]
    wanted = {answers[number] for number in kept}
    return [segment._replace(trained=number in wanted) for number, run in enumerate(runs) for segment in run]


def label(name: str, messages: list[dict], tools: list[dict] | None = None, train_on: str = "assistant") -> Tokens:
    """Labels a conversation with Forge."""
    tokenizer = build_tokenizer(name)
    tokenizer.chat_template = NO_WEIGHT + tokenizer.chat_template
    return run(tokenizer, messages, tools, train_on)


def run(tokenizer, messages: list[dict], tools: list[dict] | None = None, train_on: str = "assistant") -> Tokens:
    renderer = Renderer(tokenizer)
    return next(renderer.tokenize([renderer.render_messages(messages, train_on=train_on, tools=tools)]))


def find_trained(pieces: list[bytes], segments: list[Segment]) -> list[bool]:
    """A token is trained when it holds a byte of a trained segment."""
    trained = [segment.trained for segment in segments for _ in segment.text.encode()]
    ends = [sum(map(len, pieces[: n + 1])) for n in range(len(pieces))]
    return [any(trained[end - len(piece) : end]) for piece, end in zip(pieces, ends, strict=True)]


def assert_golden(name: str, tokens: Tokens, segments: list[Segment], border: str = "") -> None:
    """Compares with the golden segments; the first token of an answer may hold ``border`` of the prompt too."""
    tokenizer, family = build_tokenizer(name), FAMILIES[name]
    ids, trained = tokens.input_ids, [token != IGNORED for token in tokens.labels]
    pieces = spell(name, tokenizer, ids)
    assert b"".join(pieces).decode() == join(segments)
    assert trained == find_trained(pieces, segments)
    assert [token for token in tokens.labels if token != IGNORED] == list(compress(ids, trained))

    control = tokenizer.added_tokens_encoder
    frames = [segment.text for segment in segments if not segment.quoted]
    assert {token: ids.count(number) for token, number in control.items()} == {
        token: sum(text.count(token) for text in frames) for token in control
    }
    if not any(token in segment.text for token in control for segment in segments if segment.quoted):
        assert ids == tokenizer(join(segments), add_special_tokens=False)["input_ids"]

    end = control[family.end]
    turns = [[pair[0] for pair in run] for on, run in groupby(zip(ids, trained, strict=True), itemgetter(1)) if on]
    answers = [join(list(run)) for on, run in groupby(segments, attrgetter("trained")) if on]
    assert len(turns) == len(answers) > 0
    for turn, answer in zip(turns, answers, strict=True):
        assert turn[-1] == end
        # A token ahead, because decoders take a space from the very first one.
        assert tokenizer.decode([end, *turn]) in (family.end + answer, family.end + border + answer)


def test_the_matrix_is_whole():
    assert len(CELLS) == 16 * 6
    assert set(REFUSED) < set(CELLS)
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == set(FAMILIES)


@pytest.mark.parametrize(("name", "shape"), CARRIED)
def test_template_and_golden_format_say_the_same(name, shape):
    messages, tools = converse(name, shape)
    rendered = build_tokenizer(name).apply_chat_template(messages, tools=tools, tokenize=False)
    assert rendered == join(write(name, messages, tools))


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.real])
def test_templates_write_what_the_originals_write(name):
    """TRL ships the templates of some models as they were published."""
    original = (REAL / f"{FAMILIES[name].real}.jinja").read_text(encoding="utf-8")
    if name == "deepseek_v3":  # this copy asks as R1 does; V3 itself opens no thinking
        original = original.replace(r"<think>\n", "")
    tokenizer = build_tokenizer(name)

    def render(template: str, messages: list[dict], tools: list[dict] | None, cue: bool) -> str | None:
        try:
            return tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=template, add_generation_prompt=cue, tokenize=False
            )
        except Exception:
            return None

    for shape in SHAPES:
        messages, tools = converse(name, shape)
        for length in range(1, len(messages) + 1):
            for cue in (False, True):
                ours = render(tokenizer.chat_template, messages[:length], tools, cue)
                assert ours == render(original, messages[:length], tools, cue), (shape, length)


@pytest.mark.parametrize(("name", "shape"), CELLS)
def test_golden_mask(name, shape):
    messages, tools = converse(name, shape)
    if (name, shape) in REFUSED:
        with pytest.raises(RowError, match=REFUSED[name, shape]):
            label(name, messages, tools)
    else:
        border = "\n" if shape == "nasty" else ""
        assert_golden(name, label(name, messages, tools), write(name, messages, tools), border)


@pytest.mark.parametrize("name", ANSWERS)
def test_last_assistant_trains_the_last_answer_only(name):
    messages, _ = converse(name, "turns")
    assert_golden(name, label(name, messages, train_on="last_assistant"), keep_answers(write(name, messages), 2))


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_of_weight_zero_is_not_trained(name):
    messages, _ = converse(name, "turns")
    weighed = [*messages[:3], {**messages[3], "weight": 0}, messages[4], {**messages[5], "weight": 1}]
    assert_golden(name, label(name, weighed), keep_answers(write(name, messages), 0, 2))


@pytest.mark.parametrize("name", ANSWERS)
def test_the_name_of_a_control_token_in_an_answer_is_text(name):
    end, cue = FAMILIES[name].end, FAMILIES[name].cue.strip()
    messages = [QUESTION, {"role": "assistant", "content": f"Write {end} at the end and {cue} before an answer."}]
    assert_golden(name, label(name, messages), write(name, messages))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "qwen3"])
def test_reasoning_that_a_template_does_not_read_is_missed(name):
    with pytest.raises(RowError, match=LEFT_OUT):
        label(name, [QUESTION, {**ANSWER, "reasoning_content": THOUGHT}])


@pytest.mark.parametrize("name", [name for name in ANSWERS if name not in READS_TOOLS])
def test_tools_that_a_template_does_not_read_are_missed(name):
    with pytest.raises(RowError, match=LEFT_OUT):
        label(name, [QUESTION, ANSWER], TOOLS)


@pytest.mark.parametrize("name", ["phi3", "tulu", "zephyr"])
def test_a_result_that_a_template_does_not_read_is_missed(name):
    with pytest.raises(RowError, match=LEFT_OUT):
        label(name, [WITH_TOOLS[0], {"role": "assistant", "content": "Let me look."}, *WITH_TOOLS[2:]])


@pytest.mark.parametrize("name", ["chatml", "deepseek_r1"])
def test_a_call_that_a_template_does_not_read_is_missed(name):
    with pytest.raises(RowError, match=LEFT_OUT):
        label(name, WITH_TOOLS)


def test_calls_are_trained_where_only_the_definitions_have_no_place():
    assert_golden("deepseek_v3", label("deepseek_v3", WITH_TOOLS), write("deepseek_v3", WITH_TOOLS))


@pytest.mark.parametrize("name", READS_TOOLS)
def test_calls_as_an_api_returns_them_are_the_same(name):
    """No content, and the arguments as JSON text."""
    function = {**CALL["function"], "arguments": json.dumps(CALL["function"]["arguments"])}
    returned = {"role": "assistant", "content": None, "tool_calls": [{**CALL, "function": function}]}
    messages = [WITH_TOOLS[0], returned, *WITH_TOOLS[2:]]
    assert label(name, messages, TOOLS) == label(name, WITH_TOOLS, TOOLS)


def test_reasoning_may_stand_in_the_content_or_beside_it():
    messages, _ = converse("qwen3", "reasoning")
    inside = {"role": "assistant", "content": f"<think>\n{THOUGHT}\n</think>\n\nA lizard."}
    assert label("qwen3", [*messages[:3], inside]) == label("qwen3", messages)


def test_reasoning_that_history_loses_is_missed_only_where_it_is_trained():
    messages = [QUESTION, {**ANSWER, "reasoning_content": THOUGHT}, *MORE[:2]]
    with pytest.raises(RowError, match=LEFT_OUT):
        label("qwen3", messages)
    golden = keep_answers(write("qwen3", messages), 1)
    assert_golden("qwen3", label("qwen3", messages, train_on="last_assistant"), golden)
    messages[1]["weight"] = 0
    assert_golden("qwen3", label("qwen3", messages), golden)


@pytest.mark.parametrize("space", ["", " ", "\n  "])
def test_a_control_token_that_takes_the_space_behind_it_is_not_trained(space):
    """Phi-3's own tokenizer strips white space on the right of its control tokens, also that of an answer."""
    tokenizer = build_tokenizer("phi3", strips=True)
    tokens = run(tokenizer, [QUESTION, {"role": "assistant", "content": f"{space}A fish."}, *MORE[:2]])
    trained = [token for token in tokens.labels if token != IGNORED]
    assert tokenizer.decode(trained) == f"A fish.<|end|>{MORE[1]['content']}<|end|>"
