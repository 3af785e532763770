"""Rows of one format become token ids that fit into the longest row."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice

from forge_cli.data import long_rows
from forge_cli.data.formats import Example, read_example
from forge_cli.data.outcomes import Columns, Limits, Outcome, Question, Status
from forge_cli.parts.labels import IGNORED, RenderedRow, Tokens
from forge_cli.parts.rendering import Renderer
from forge_cli.parts.turns import BREAK, RowError

_NOTHING_ASKS = (
    "no token stands before the answer, as the prompt is empty and the tokenizer writes no begin token; give the row a "
    "prompt"
)


class RowTokenizer:
    """Tokenises rows of one format.

    Args:
        renderer: Of the model's tokenizer.
        limits: What becomes of rows.
    """

    def __init__(self, renderer: Renderer, limits: Limits) -> None:
        self.renderer = renderer
        self.limits = limits
        tokenizer = renderer.tokenizer
        self.has_template = bool(tokenizer.chat_template)
        self.num_ids = len(tokenizer)
        try:
            end = renderer.find_end_token()
        except RowError:  # a template may refuse this question and take others; every row says so itself
            end = None
        self.ends = {end, tokenizer.eos_token_id} - {None}

    def tokenize(self, rows: Sequence[tuple[int, Mapping[str, object], bool]]) -> list[Outcome]:
        """Tokenises rows, given as number, columns, and whether a question is wanted."""
        prepared: list[tuple[Example, list[RenderedRow], list[RenderedRow]] | RowError] = []
        for _, values, _ in rows:
            try:
                example = read_example(values, self.limits.kind, self.has_template)
                whole = self._render(example)
                prepared.append((example, whole, long_rows.shorten(whole, self.limits)))
            except RowError as error:
                prepared.append(error)
        texts = [text for one in prepared if not isinstance(one, RowError) for text in one[2]]
        tokens = iter(self.renderer.tokenize_each(texts))
        outcomes = []
        for (number, _, asks), one in zip(rows, prepared, strict=True):
            if isinstance(one, RowError):
                outcomes.append(Outcome(number, "bad", what=str(one)))
                continue
            example, rendered, begun = one
            results = list(islice(tokens, len(begun)))
            try:
                outcome = self._judge(number, example, rendered, begun, results)
            except RowError as error:
                outcome = Outcome(number, "bad", what=str(error))
            if outcome.status == "kept" and asks:
                outcome = outcome._replace(question=self._build_question(example))
            outcome = outcome._replace(
                escaped=sum(text.text.count(BREAK) for text in rendered),
                is_parted=any(isinstance(result, Tokens) and result.is_parted for result in results),
                is_prompt_found=example.is_prompt_found,
            )
            outcomes.append(outcome)
        return outcomes

    def _judge(
        self,
        number: int,
        example: Example,
        whole: list[RenderedRow],
        begun: list[RenderedRow],
        tokens: list[Tokens | RowError],
    ) -> Outcome:
        for one in tokens:
            if isinstance(one, RowError):
                raise one
        if not begun and whole:
            tokens = [long_rows.tokenize_in_pieces(whole[0], self.renderer)]
        elif begun is not whole:
            if long_rows.is_too_long(whole, begun, tokens, self.limits):
                found = Outcome(number, "dropped")
                if self.limits.on_overlong == "truncate" and long_rows.can_be_cut(tokens):
                    found = self._measure(number, example, tokens)
                return long_rows.complete(found, whole, begun, tokens, self.renderer.tokenizer)
            tokens = list(self.renderer.tokenize(whole))
        return self._measure(number, example, tokens)

    def _render(self, example: Example) -> list[RenderedRow]:
        """Renders what a row holds: one text, or the two of a pair."""
        kind, renderer = self.limits.kind, self.renderer
        if kind == "tokens":
            return []
        if kind == "text":
            return [renderer.render_text(example.answers[0])]
        return [self._render_answer(example, answer) for answer in example.answers]

    def _render_answer(self, example: Example, answer: object) -> RenderedRow:
        # Of a preference, the whole answer is compared.
        train_on = (
            self.limits.train_on if self.limits.kind not in ("preference", "unpaired_preference") else "assistant"
        )
        if isinstance(example.prompt, str):
            row = self.renderer.render_completion(example.prompt, answer, train_on=train_on)
            # Nobody asks with a prompt that was found: both texts stay what the tokenizer makes of them.
            return replace(row, border=0) if example.is_prompt_found else row
        return self.renderer.render_messages(
            [*example.prompt, *answer],
            train_on=train_on,
            trained_from=len(example.prompt),
            tools=example.tools,
            template_options=example.options,
        )

    def _measure(self, number: int, example: Example, tokens: list[Tokens]) -> Outcome:
        if self.limits.kind == "preference":
            return self._measure_pair(number, *tokens)
        if self.limits.kind == "unpaired_preference":
            return self._measure_answer(number, tokens[0], bool(example.label))
        if self.limits.kind == "tokens":
            ids, labels = example.answers
            if not 0 <= min(ids) <= max(ids) < self.num_ids:
                raise RowError(f"a token id is not between 0 and {self.num_ids - 1}, the tokenizer's last")
            tokens = [Tokens(ids, labels)]
        (row,) = tokens
        length, limit = len(row.input_ids), self.limits.max_length
        has_end = row.num_trained > 0 and next(one for one in reversed(row.labels) if one != IGNORED) in self.ends
        if length <= limit:
            return Outcome(number, "kept", (_as_columns(row),), length, row.num_trained, has_end=has_end)
        if self.limits.on_overlong == "split" and self.limits.kind in ("text", "tokens"):
            parts = [Tokens(row.input_ids[i : i + limit], row.labels[i : i + limit]) for i in range(0, length, limit)]
            return Outcome(number, "split", tuple(map(_as_columns, parts)), length, row.num_trained, has_end=has_end)
        cut = Tokens(row.input_ids[:limit], row.labels[:limit])
        if self.limits.on_overlong == "truncate" and cut.num_trained:
            is_lost = cut.num_trained < row.num_trained
            return Outcome(
                number, "cut", (_as_columns(cut),), length, cut.num_trained, is_lost, has_end and not is_lost
            )
        return Outcome(number, "dropped", length=length, is_lost=row.num_trained > 0)

    def _measure_pair(self, number: int, chosen: Tokens, rejected: Tokens) -> Outcome:
        """Splits both texts behind the tokens of the prompt; fewer where a token spans the end of a found one."""
        shared = 0
        limit = min(_find_start(chosen), _find_start(rejected))
        while shared < limit and chosen.input_ids[shared] == rejected.input_ids[shared]:
            shared += 1
        if not shared and chosen.input_ids[0] == rejected.input_ids[0]:
            shared = 1  # without a prompt the first token is given, as nothing stands before it to predict it from
        if not shared:
            raise RowError(_NOTHING_ASKS)
        answers = [_cut_end(one)[shared:] for one in (chosen, rejected)]
        if answers[0] == answers[1]:
            raise RowError("chosen and rejected are the same tokens, so there is nothing to prefer")
        return self._fit_answers(number, chosen.input_ids[:shared], ["chosen_ids", "rejected_ids"], answers, {})

    def _measure_answer(self, number: int, row: Tokens, label: bool) -> Outcome:
        start = _find_start(row)
        if not start:
            raise RowError(_NOTHING_ASKS)
        return self._fit_answers(
            number, row.input_ids[:start], ["completion_ids"], [_cut_end(row)[start:]], {"label": label}
        )

    def _fit_answers(
        self, number: int, prompt: list[int], names: list[str], answers: list[list[int]], more: Columns
    ) -> Outcome:
        length = len(prompt) + max(map(len, answers))
        room = self.limits.max_length - len(prompt)
        trained = sum(map(len, answers))
        status: Status = "kept"
        has_end = all(answer[-1] in self.ends for answer in answers)
        if length > self.limits.max_length:
            cut = [answer[:room] for answer in answers]
            if self.limits.on_overlong != "truncate" or room < 1 or (len(cut) == 2 and cut[0] == cut[1]):
                return Outcome(number, "dropped", length=length, is_lost=True)
            status, answers, has_end = "cut", cut, False
        columns = {"prompt_ids": array("i", prompt)} | {
            name: array("i", answer) for name, answer in zip(names, answers, strict=True)
        }
        is_lost = sum(map(len, answers)) < trained
        return Outcome(number, status, (columns | more,), length, sum(map(len, answers)), is_lost, has_end)

    def _build_question(self, example: Example) -> Question | None:
        """Turns a row into a prompt with a wanted answer: the completion, or the last assistant turn."""
        answer = example.answers[0]
        if self.limits.kind in ("text", "tokens") or example.label is False or example.is_prompt_found:
            return None
        if isinstance(example.prompt, str):
            prompt = self.renderer.encode_prompt(example.prompt)
            return Question(prompt, example.prompt.strip(), answer.strip()) if example.prompt else None
        turns = [*example.prompt, *answer]
        last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
        if not last or not turns[last].get("content"):
            return None
        try:
            prompt = self.renderer.encode_prompt(turns[:last], example.tools, example.options)
        except RowError:  # a template may write what it does not ask for, such as a second answer in a row
            return None
        return Question(prompt, str(turns[last - 1]["content"]), str(turns[last]["content"]).strip())


def _as_columns(tokens: Tokens) -> Columns:
    return {"input_ids": array("i", tokens.input_ids), "labels": array("i", tokens.labels)}


def _find_start(tokens: Tokens) -> int:
    """Returns the place of the first trained token."""
    return next((i for i, label in enumerate(tokens.labels) if label != IGNORED), len(tokens.labels))


def _cut_end(tokens: Tokens) -> list[int]:
    """Returns the ids up to the last trained token: what a template writes behind an end token is no answer."""
    last = max(i for i, label in enumerate(tokens.labels) if label != IGNORED)
    return tokens.input_ids[: last + 1]
