"""One row of data becomes token ids and labels.

The tokenizer's own chat template is the only source of special tokens. Which tokens are trained is found by
rendering the conversation turn by turn: what an assistant turn adds to the text before it, up to and including its
end token, is trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

IGNORED = -100
Message = Mapping[str, str]
Span = tuple[int, int]


class RowError(ValueError):
    """A row that cannot be trained on; the message says why. The caller knows its number."""


@dataclass(frozen=True)
class Tokens:
    """A tokenised row.

    Attributes:
        input_ids: Token ids ``[T]``.
        labels: The same ids where the token is trained, else -100 ``[T]``.
    """

    input_ids: list[int]
    labels: list[int]

    @property
    def num_trained(self) -> int:
        """Number of trained tokens."""
        return sum(label != IGNORED for label in self.labels)


def render_messages(tokenizer, messages: Sequence[Message], *, train_on: str, trained_from: int = 0) -> Tokens:
    """Renders and tokenises a conversation.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        messages: ``{"role", "content"}`` in order.
        train_on: ``assistant`` (all assistant turns), ``last_assistant`` or ``all``.
        trained_from: Turns before this index are never trained (a prompt given as messages).

    Raises:
        RowError: Unknown roles, no assistant turn, special tokens inside a text, or a template that rewrites
            earlier turns so that a turn's own text cannot be told.
    """
    _check_messages(tokenizer, messages)
    text = _render(tokenizer, messages)
    if train_on == "all":
        return _tokenize(tokenizer, text, [(0, len(text))], from_template=True)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= trained_from]
    if not turns:
        raise RowError("no assistant turn to train on")
    if train_on == "last_assistant":
        turns = turns[-1:]
    spans = [_find_turn(tokenizer, messages, text, turn) for turn in turns]
    return _tokenize(tokenizer, text, spans, from_template=True)


def render_completion(tokenizer, prompt: str, completion: str, *, train_on: str) -> Tokens:
    """Tokenises a plain prompt and its completion; the completion and its end token are trained."""
    _check_text(tokenizer, prompt)
    _check_text(tokenizer, completion)
    if not completion:
        raise RowError("the completion is empty")
    text = prompt + completion
    start = 0 if train_on == "all" else len(prompt)
    return _with_end(tokenizer, _tokenize(tokenizer, text, [(start, len(text))], from_template=False))


def render_text(tokenizer, text: str) -> Tokens:
    """Tokenises running text; all of it and an end token are trained."""
    _check_text(tokenizer, text)
    if not text:
        raise RowError("the text is empty")
    return _with_end(tokenizer, _tokenize(tokenizer, text, [(0, len(text))], from_template=False))


def render_prompt(tokenizer, messages: Sequence[Message]) -> str:
    """Renders a conversation up to where the assistant is to answer."""
    return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)


def _render(tokenizer, messages: Sequence[Message], *, prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except Exception as error:
        raise RowError(f"the chat template refuses this conversation: {error}") from error


def _find_turn(tokenizer, messages: Sequence[Message], text: str, turn: int) -> Span:
    """Finds the characters that an assistant turn adds, up to its end token."""
    before = _render(tokenizer, messages[:turn], prompt=True)
    after = _render(tokenizer, messages[: turn + 1])
    if not (text.startswith(after) and after.startswith(before)):
        raise RowError(
            f"the chat template rewrites the text before turn {turn + 1}, so what that turn adds cannot be told; "
            "data.train_on: last_assistant or all may work"
        )
    added = after[len(before) :]
    trimmed = added.rstrip()
    # Templates end a turn with its end token and often a line break, which the model never has to produce.
    ends_special = any(token and trimmed.endswith(token) for token in tokenizer.all_special_tokens)
    return len(before), len(before) + len(trimmed if ends_special else added)


def _tokenize(tokenizer, text: str, spans: Sequence[Span], *, from_template: bool) -> Tokens:
    """Tokenises once, as a whole, and trains the tokens that start inside a span."""
    encoded = tokenizer(text, add_special_tokens=not from_template, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    if len(ids) > 1 and tokenizer.bos_token_id is not None and ids[0] == ids[1] == tokenizer.bos_token_id:
        raise RowError("the row starts with two begin tokens")
    labels = [IGNORED] * len(ids)
    for place, (start, end) in enumerate(encoded["offset_mapping"]):
        if end > start and any(first <= start < last for first, last in spans):
            labels[place] = ids[place]
    return Tokens(ids, labels)


def _with_end(tokenizer, tokens: Tokens) -> Tokens:
    """Appends a trained end token, unless the tokenizer already wrote one."""
    end = tokenizer.eos_token_id
    if end is None:
        raise RowError("the tokenizer has no end token, so the model could never learn to stop")
    if tokens.input_ids and tokens.input_ids[-1] == end:
        return Tokens(tokens.input_ids, [*tokens.labels[:-1], end])
    return Tokens([*tokens.input_ids, end], [*tokens.labels, end])


def _check_messages(tokenizer, messages: Sequence[Message]) -> None:
    if not messages:
        raise RowError("the conversation is empty")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise RowError(f"turn {number} is not a mapping with role and content")
        if message["role"] not in ("system", "user", "assistant", "tool"):
            raise RowError(f"turn {number} has the unknown role {message['role']!r}; use system, user or assistant")
        if not isinstance(message["content"], str):
            raise RowError(f"turn {number} has content that is not text")
        if message["role"] == "assistant" and not message["content"].strip():
            raise RowError(f"turn {number} is an empty answer")
        _check_text(tokenizer, message["content"])


def _check_text(tokenizer, text: str) -> None:
    """A special token written inside a text would become control, not text."""
    if not isinstance(text, str):
        raise RowError(f"{type(text).__name__} where text is wanted")
    for token in tokenizer.all_special_tokens:
        if token and len(token) > 2 and token in text:
            raise RowError(f"the text contains the special token {token}")
