"""One row of data becomes text, token ids and labels.

The tokenizer's own chat template is the only source of special tokens. Which tokens are trained is found by
rendering the conversation turn by turn: what an assistant turn adds to the text before it, up to and including its
end token, is trained.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

IGNORED = -100
ROLES = ("system", "user", "assistant", "tool")
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
        return len(self.labels) - self.labels.count(IGNORED)


@dataclass(frozen=True)
class RenderedRow:
    """A row as text, before it is tokenised.

    Attributes:
        text: The whole text.
        spans: Characters that are trained, as (first, behind the last).
        from_template: The chat template wrote all special tokens; otherwise the tokenizer adds its begin token, and
            an end token follows.
    """

    text: str
    spans: tuple[Span, ...]
    from_template: bool


class Renderer:
    """Renders and tokenises rows for one tokenizer.

    Args:
        tokenizer: A fast tokenizer; conversations need its chat template.
    """

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.values()
        named = {token for token in tokenizer.all_special_tokens if token}
        # Only some of the tokens that control a model have a name (eos_token, ...); the flag tells the others.
        control = sorted(named | {token.content for token in added if token.special}, key=len, reverse=True)
        self._control = re.compile("|".join(re.escape(token) for token in control if len(token) > 2) or r"(?!)")
        self._ends = tuple(named | {token.content for token in added})

    def render_messages(self, messages: Sequence[Message], *, train_on: str, trained_from: int = 0) -> RenderedRow:
        """Renders a conversation.

        Args:
            messages: ``{"role", "content"}`` in order.
            train_on: ``assistant`` (all assistant turns), ``last_assistant`` or ``all``.
            trained_from: Turns before this index are never trained (a prompt given as messages).

        Raises:
            RowError: Unknown roles, no assistant turn, special tokens inside a text, a template that writes no end
                token, or one that rewrites earlier turns so that a turn's own text cannot be told.
        """
        self._check_messages(messages)
        text = self._apply_template(messages)
        begin = self.tokenizer.bos_token
        if begin and text.startswith(begin * 2):
            raise RowError("the chat template writes two begin tokens")
        if train_on == "all":
            return RenderedRow(text, ((0, len(text)),), from_template=True)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= trained_from]
        if not turns:
            raise RowError("no assistant turn to train on")
        if train_on == "last_assistant":
            turns = turns[-1:]
        return RenderedRow(text, tuple(self._find_turn(messages, text, turn) for turn in turns), from_template=True)

    def render_completion(self, prompt: str, completion: str, *, train_on: str) -> RenderedRow:
        """Joins a plain prompt and its completion; the completion and its end token are trained."""
        self._check_text(prompt)
        self._check_text(completion)
        if not completion:
            raise RowError("the completion is empty")
        text = prompt + completion
        start = 0 if train_on == "all" else len(prompt)
        return self._plain(text, start)

    def render_text(self, text: str) -> RenderedRow:
        """Takes running text; all of it and an end token are trained."""
        self._check_text(text)
        if not text:
            raise RowError("the text is empty")
        return self._plain(text, 0)

    def encode_prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """Returns the token ids ``[T]`` of a plain prompt or a conversation, up to where the model is to answer."""
        if not isinstance(prompt, str):
            text = self._apply_template(prompt, add_generation_prompt=True)
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        ids = list(self.tokenizer(prompt)["input_ids"])
        # Some tokenizers end every text by themselves.
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def find_end_token(self) -> int | None:
        """Returns the token that ends an answer: the chat template's, which need not be the tokenizer's."""
        if self.tokenizer.chat_template:
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            text = self._apply_template(turns).rstrip()
            if text.endswith(self._ends):
                return self.tokenizer(text, add_special_tokens=False)["input_ids"][-1]
        return self.tokenizer.eos_token_id

    def tokenize(self, rows: Sequence[RenderedRow]) -> Iterator[Tokens]:
        """Tokenises every row as a whole, all rows at once, and labels the trained tokens."""
        for from_template, group in groupby(rows, key=lambda row: row.from_template):
            batch = list(group)
            encoded = self.tokenizer(
                [row.text for row in batch],
                add_special_tokens=not from_template,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
            for row, ids, offsets in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                tokens = Tokens(ids, _label(ids, offsets, row.spans))
                yield tokens if from_template else self._with_end(tokens)

    def _plain(self, text: str, start: int) -> RenderedRow:
        if self.tokenizer.eos_token_id is None:
            raise RowError("the tokenizer has no end token, so the model could never learn to stop")
        return RenderedRow(text, ((start, len(text)),), from_template=False)

    def _apply_template(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        try:
            # A batch of one, because what comes before a leading answer is a conversation without turns.
            return self.tokenizer.apply_chat_template(
                [list(messages)], tokenize=False, add_generation_prompt=add_generation_prompt
            )[0]
        except Exception as error:
            raise RowError(f"the chat template refuses this conversation: {error}") from error

    def _find_turn(self, messages: Sequence[Message], text: str, turn: int) -> Span:
        """Finds the characters that an assistant turn adds, up to its end token."""
        before = self._apply_template(messages[:turn], add_generation_prompt=True)
        after = text if turn + 1 == len(messages) else self._apply_template(messages[: turn + 1])
        if not text.startswith(after):
            raise RowError(
                f"the chat template rewrites turn {turn + 1} or one before it when more turns follow, so what it adds "
                "cannot be told; data.train_on: last_assistant or all may work"
            )
        if not after.startswith(before):
            raise RowError(
                f"the chat template asks for an answer in other words than it writes before turn {turn + 1}, so what "
                "that turn adds cannot be told; data.train_on: all may work"
            )
        # Templates end a turn with its end token and often a line break, which the model never has to produce.
        added = after[len(before) :].rstrip()
        if not added.endswith(self._ends):
            raise RowError(
                f"the chat template writes no end token after turn {turn + 1}, so the model could never learn to stop"
            )
        return len(before), len(before) + len(added)

    def _with_end(self, tokens: Tokens) -> Tokens:
        """Appends a trained end token, unless the tokenizer already wrote one."""
        end = self.tokenizer.eos_token_id
        if tokens.input_ids and tokens.input_ids[-1] == end:
            return Tokens(tokens.input_ids, [*tokens.labels[:-1], end])
        return Tokens([*tokens.input_ids, end], [*tokens.labels, end])

    def _check_messages(self, messages: Sequence[Message]) -> None:
        if not messages:
            raise RowError("the conversation is empty")
        for number, message in enumerate(messages, 1):
            if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
                raise RowError(f"turn {number} is not a mapping with role and content")
            if message["role"] not in ROLES:
                raise RowError(f"turn {number} has the unknown role {message['role']!r}; use system, user or assistant")
            if not isinstance(message["content"], str):
                raise RowError(f"turn {number} has content that is not text")
            if message["role"] == "assistant" and not message["content"].strip():
                raise RowError(f"turn {number} is an empty answer")
            self._check_text(message["content"])

    def _check_text(self, text: str) -> None:
        """A special token written inside a text would become control, not text."""
        if not isinstance(text, str):
            raise RowError(f"{type(text).__name__} where text is wanted")
        if found := self._control.search(text):
            raise RowError(f"the text contains the special token {found.group()}")
        if not text.isascii() and (lone := re.search("[\ud800-\udfff]", text)):
            raise RowError(f"the text contains half a character, {lone.group()!a}")


def render_messages(tokenizer, messages: Sequence[Message], *, train_on: str) -> Tokens:
    """Renders and tokenises one conversation; see :meth:`Renderer.render_messages`."""
    renderer = Renderer(tokenizer)
    return next(renderer.tokenize([renderer.render_messages(messages, train_on=train_on)]))


def _label(ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    """Labels the tokens that hold a character of a span. Shapes: ``ids [T]`` to labels ``[T]``."""
    labels = [IGNORED] * len(ids)
    # Many tokenizers leave spaces out of a token's offsets: a token begins where the text so far was covered.
    covered = list(accumulate((end for _, end in offsets), max))
    for first, last in spans:
        start, stop = bisect_right(covered, first), bisect_left(covered, last) + 1
        # The bytes of one character may be several tokens.
        while stop < len(ids) and offsets[stop][0] < last == offsets[stop][1]:
            stop += 1
        labels[start:stop] = ids[start:stop]
    return labels
