"""One row of data becomes text, token ids and labels.

The tokenizer's own chat template is the only source of special tokens; :mod:`forge_cli.parts.turns` finds in its text
what is trained. The text of a special token inside a row is encoded as text, never as the token.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from forge_cli.parts.labels import IGNORED, RenderedRow, Tokens, drop_breaks, label_tokens, take_answer
from forge_cli.parts.turn_check import check_turn
from forge_cli.parts.turns import BREAK, MARKS, THINKING, Message, RowError, Span, TurnFinder

__all__ = ["IGNORED", "RenderedRow", "Renderer", "RowError", "Tokens", "render_messages"]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


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
        special = named | {token.content for token in added if token.special}
        control = sorted((token for token in special if len(token) > 2), key=len, reverse=True)
        tags = [token.content for token in added if token.content not in special and token.content.strip()]
        # Some families do not flag what opens a turn (DeepSeek's <｜User｜>); what asks for an answer shows it.
        asked = self._ask_plainly()
        opening = [tag for tag in tags if tag in asked and tag not in THINKING]
        control, tags = sorted([*control, *opening], key=len, reverse=True), sorted({*tags} - {*opening})
        self._control = re.compile("|".join(map(re.escape, control)) or r"(?!)")
        self._control_ids = {number for token, number in tokenizer.added_tokens_encoder.items() if token in {*control}}
        self._finder = TurnFinder(self._control, tags)
        self._has_marks = bool(tokenizer.chat_template) and bool(_GENERATION.search(str(tokenizer.chat_template)))

    def render_messages(
        self,
        messages: Sequence[Message],
        *,
        train_on: str,
        trained_from: int = 0,
        tools: Sequence[Mapping[str, object]] | None = None,
        template_options: Mapping[str, object] | None = None,
    ) -> RenderedRow:
        """Renders a conversation.

        Args:
            messages: ``{"role", "content"}`` in order, with ``tool_calls``, ``reasoning_content`` and what else the
                template knows; ``weight: 0`` leaves an answer untrained.
            train_on: ``assistant`` (all assistant turns), ``last_assistant`` or ``all``.
            trained_from: Turns before this index are never trained (a prompt given as messages).
            tools: JSON schemas of the functions that may be called.
            template_options: Further variables for the template.

        Raises:
            RowError: Unknown roles, no assistant turn, or a template that refuses the conversation, leaves text out,
                rewrites or moves it, or writes no end token.
        """
        cleaned, trained = self._clean(messages, train_on, trained_from)
        tools = self._break(list(tools)) if tools else None
        options = dict(template_options or {})

        def render(chat: Sequence[Message], add_generation_prompt: bool = False) -> str:
            return self._apply_template(chat, add_generation_prompt, tools, options)

        text = render(cleaned)
        if tools and text == self._apply_template(cleaned, False, None, options):
            raise RowError("the chat template leaves out the tools, so the model would call what it was never told of")
        begin = self.tokenizer.bos_token
        if begin and text.startswith(begin * 2):
            raise RowError("the chat template writes two begin tokens")
        everything = train_on == "all"
        spans = self._finder.find_spans(render, cleaned, text, [] if everything else trained)
        if self._has_marks and train_on == "assistant" and trained_from == 0:
            self._compare_with_marks(cleaned, text, spans, trained, tools, options)
        return RenderedRow(text, ((0, len(text)),) if everything else tuple(spans), from_template=True)

    def render_completion(self, prompt: str, completion: str, *, train_on: str) -> RenderedRow:
        """Joins a plain prompt and its completion; the completion and its end token are trained."""
        prompt, completion = self._clean_text(prompt), self._clean_text(completion)
        if not completion:
            raise RowError("the completion is empty")
        return self._plain(prompt + completion, 0 if train_on == "all" else len(prompt), len(prompt))

    def render_text(self, text: str) -> RenderedRow:
        """Takes running text; all of it and an end token are trained."""
        text = self._clean_text(text)
        if not text:
            raise RowError("the text is empty")
        return self._plain(text, 0)

    def encode_prompt(
        self, prompt: str | Sequence[Message], tools: Sequence | None = None, template_options: Mapping | None = None
    ) -> list[int]:
        """Returns the token ids ``[T]`` of a plain prompt or a conversation, up to where the model is to answer."""
        if not isinstance(prompt, str):
            chat = [self._break(dict(message)) for message in prompt]
            text = self._apply_template(chat, True, self._break(list(tools)) if tools else None, template_options or {})
            return self._encode([RenderedRow(text, (), from_template=True)])[0].input_ids
        return self._encode_prompts([RenderedRow(self._clean_text(prompt), (), from_template=False)])[0].input_ids

    def find_end_token(self) -> int | None:
        """Returns the token that ends an answer: the chat template's, which need not be the tokenizer's."""
        if self.tokenizer.chat_template:
            with contextlib.suppress(RowError):  # some refuse so short a conversation
                if end := self._finder.find_end(self._apply_template):
                    return self.tokenizer.convert_tokens_to_ids(end)
        return self.tokenizer.eos_token_id

    def tokenize(self, rows: Sequence[RenderedRow]) -> Iterator[Tokens]:
        """Tokenises every row as a whole, all rows at once, and labels the trained tokens.

        Raises:
            RowError: The text of a special token cannot be kept apart from it by this tokenizer.
        """
        for from_template, group in groupby(rows, key=lambda row: row.from_template):
            rows = list(group)
            yield from self._encode(rows) if from_template else map(self._with_end, self._encode_plain(rows))

    def tokenize_each(self, rows: Sequence[RenderedRow]) -> list[Tokens | RowError]:
        """Tokenises rows as :meth:`tokenize` does; a row that cannot be tokenised is its own error."""
        try:
            return list(self.tokenize(rows))
        except RowError as error:
            return [error] if len(rows) == 1 else [one for row in rows for one in self.tokenize_each([row])]

    def _encode(self, rows: Sequence[RenderedRow]) -> list[Tokens]:
        texts = [row.text for row in rows]
        if rows[0].from_template:
            backend = self.tokenizer.backend_tokenizer
            backend.no_truncation(), backend.no_padding()
            # It has nothing to add to what a template wrote, but may keep spaces out of the offsets.
            kept, backend.post_processor = backend.post_processor, None
            try:
                found = [(one.ids, one.offsets) for one in backend.encode_batch(texts, add_special_tokens=False)]
            finally:
                backend.post_processor = kept
        else:
            encoded = self.tokenizer(texts, return_offsets_mapping=True, verbose=False)
            found = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        return [
            drop_breaks(row.text, Tokens(ids, label_tokens(ids, offsets, row.spans, self._control_ids)), offsets)
            for row, (ids, offsets) in zip(rows, found, strict=True)
        ]

    def _encode_prompts(self, rows: Sequence[RenderedRow]) -> list[Tokens]:
        """Tokenises plain prompts as servers do; some tokenizers end every text by themselves, which asks nothing."""
        end = self.tokenizer.eos_token_id
        return [
            Tokens(one.input_ids[:-1], one.labels[:-1]) if one.input_ids[-1:] == [end] else one
            for one in self._encode(rows)
        ]

    def _encode_plain(self, rows: Sequence[RenderedRow]) -> Iterator[Tokens]:
        """Tokenises plain rows whole, unless that makes other tokens of the prompt than the model is asked with."""
        prompts = [
            RenderedRow(row.text[: row.border], tuple((a, row.border) for a, _ in row.spans if a < row.border), False)
            for row in rows
        ]
        for row, tokens, prompt in zip(rows, self._encode(rows), self._encode_prompts(prompts), strict=True):
            is_kept = tokens.input_ids[: len(prompt.input_ids)] == prompt.input_ids
            yield tokens if is_kept else self._part(row, prompt)

    def _part(self, row: RenderedRow, prompt: Tokens) -> Tokens:
        text = BREAK + row.text[row.border :]
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        answer = take_answer(text, encoded["input_ids"], encoded["offset_mapping"])
        return Tokens([*prompt.input_ids, *answer], [*prompt.labels, *answer], is_parted=True)

    def _plain(self, text: str, start: int, border: int = 0) -> RenderedRow:
        if self.tokenizer.eos_token_id is None:
            raise RowError("the tokenizer has no end token, so the model could never learn to stop")
        return RenderedRow(text, ((start, len(text)),), from_template=False, border=border)

    def _ask_plainly(self) -> str:
        try:
            return self._apply_template([{"role": "user", "content": "a"}], True)
        except RowError:
            return ""

    def _apply_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        tools: list | None = None,
        options: Mapping[str, object] | None = None,
    ) -> str:
        if not self.tokenizer.chat_template:
            raise RowError(
                "the tokenizer has no chat template, so it cannot write a conversation; train an instruct model, or "
                "give rows of prompt and completion"
            )
        try:
            # A batch of one, because what comes before a leading answer is a conversation without turns.
            return self.tokenizer.apply_chat_template(
                [list(messages)],
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(options or {}),
            )[0]
        except Exception as error:
            raise RowError(f"the chat template refuses this conversation: {error}") from error

    def _compare_with_marks(
        self,
        messages: Sequence[Message],
        text: str,
        spans: Sequence[Span],
        trained: Sequence[int],
        tools: list | None,
        options: Mapping[str, object],
    ) -> None:
        """Compares with what the template itself marks as generated; white space and end tokens may differ."""
        from transformers.utils.chat_template_utils import render_jinja_template

        names = {**self.tokenizer.special_tokens_map, **options}
        template = self.tokenizer.get_chat_template(None, tools)
        _, marks = render_jinja_template(
            [list(messages)], tools=tools, chat_template=template, return_assistant_tokens_mask=True, **names
        )
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(marks[0]) != len(answers):
            return  # one mark a turn is how templates are written; others cannot be laid beside turns
        for turn, span in zip(trained, spans, strict=True):
            start, end = marks[0][answers.index(turn)]
            ours, theirs = (self._control.sub("", text[a:b]).strip() for a, b in (span, (start, end)))
            if ours != theirs:
                raise RowError(
                    f"turn {turn + 1}: the chat template marks {theirs[:40]!r} as generated, but it writes "
                    f"{ours[:40]!r} there; its generation marks are wrong"
                )

    def _with_end(self, tokens: Tokens) -> Tokens:
        """Appends a trained end token, unless the tokenizer already wrote one."""
        end = self.tokenizer.eos_token_id
        if tokens.input_ids and tokens.input_ids[-1] == end:
            return replace(tokens, labels=[*tokens.labels[:-1], end])
        return replace(tokens, input_ids=[*tokens.input_ids, end], labels=[*tokens.labels, end])

    def _clean(
        self, messages: Sequence[Message], train_on: str, trained_from: int
    ) -> tuple[list[dict[str, object]], list[int]]:
        """Checks a conversation; returns it for the template, and the numbers of the turns that are trained."""
        if not messages:
            raise RowError("the conversation is empty")
        cleaned, trained = [], []
        for number, message in enumerate(messages, 1):
            if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
                raise RowError(f"turn {number} is not a mapping with role and content")
            # Column files fill what a turn does not have with null.
            turn = {key: value for key, value in message.items() if value is not None or key == "content"}
            check_turn(turn, number)
            weight = turn.pop("weight", 1)
            if weight not in (0, 1):
                raise RowError(f"turn {number} has the weight {weight!r}; a turn is trained (1) or not (0)")
            if turn["role"] == "assistant" and number > trained_from and weight:
                trained.append(number - 1)
            cleaned.append(self._break(turn))
        if not trained and train_on != "all":
            raise RowError("no assistant turn to train on")
        return cleaned, trained[-1:] if train_on == "last_assistant" else trained

    def _clean_text(self, text: object) -> str:
        if not isinstance(text, str):
            raise RowError(f"{type(text).__name__} where text is wanted")
        return self._break(text)

    def _break(self, value):
        """Puts a break into the text of every special token inside a value, so that it stays text."""
        if isinstance(value, str):
            if not value.isascii():
                if lone := re.search("[\ud800-\udfff]", value):
                    raise RowError(f"the text contains half a character, {lone.group()!a}")
                if MARKS.search(value):
                    raise RowError("the text contains a character of the private plane 16 that Forge marks text with")
            return self._control.sub(lambda found: found.group()[0] + BREAK + found.group()[1:], value)
        if isinstance(value, Mapping):
            return {key: self._break(one) for key, one in value.items()}
        return [self._break(one) for one in value] if isinstance(value, (list, tuple)) else value


def render_messages(tokenizer, messages: Sequence[Message], *, train_on: str) -> Tokens:
    """Renders and tokenises one conversation; see :meth:`Renderer.render_messages`."""
    renderer = Renderer(tokenizer)
    return next(renderer.tokenize([renderer.render_messages(messages, train_on=train_on)]))
