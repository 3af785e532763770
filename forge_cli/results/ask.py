"""Asks a run's model, or the base it came from, and streams the answer."""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import set_seed
from transformers.generation.streamers import BaseStreamer

from forge_cli.build.model import load_model
from forge_cli.parts.rendering import Renderer
from forge_cli.parts.turns import RowError
from forge_cli.results.find import Run
from forge_cli.results.load import load_run

Turn = dict[str, str]
# Share of the positions that an answer gets before old turns are kept.
_ANSWER_SHARE = 4
# A script without spaces is written character by character; U+FFFD is half of one.
_WORD_END = re.compile("\\s|(?<=[\u2e80-\ufffc])")


@dataclass(frozen=True)
class Style:
    """How answers are written.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: Of the drawing of tokens; ``None`` takes the likeliest one, as the run's evaluation does.
        top_p: Share of the probability (0 to 1) that tokens are drawn from.
    """

    max_new_tokens: int = 512
    temperature: float | None = None
    top_p: float | None = None


class Fitted(NamedTuple):
    """A conversation as the model gets it.

    Attributes:
        ids: Token ids ``[T]``.
        num_dropped: Oldest turns that do not fit.
        num_free: Positions left for the answer; ``None`` where the model names no limit.
    """

    ids: list[int]
    num_dropped: int
    num_free: int | None


class Asker:
    """A run's model, with its base beside it.

    Args:
        run: The run.
        which: ``ema`` or ``raw`` weights.

    Raises:
        ForgeError: They cannot be loaded.
    """

    def __init__(self, run: Run, which: str = "ema") -> None:
        self.run = run
        self.has_ema = run.weights("raw") != run.weights()
        self._base: torch.nn.Module | None = None
        self.load(which)
        loaded, data = self.loaded, run.report.get("data", {})
        self.tokenizer, self.system = loaded.tokenizer, loaded.system_prompt
        self.renderer = Renderer(self.tokenizer)
        self.is_plain = not self.tokenizer.chat_template or bool(data.get("has_plain_prompts"))
        # What stands between question and answer where an instruction became plain text.
        formats = [one.get("format") for one in data.get("splits", [])]
        self._behind = "\n\n" if self.is_plain and formats[:1] == ["instruction"] else ""
        self.positions: int | None = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)

    def load(self, which: str) -> None:
        """Loads ``ema`` or ``raw`` weights in the place of the present ones; without EMA both are the same."""
        self.loaded = None  # two at once may not fit
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.loaded, self.which = load_run(self.run, which=which), which

    def describe(self, base: bool = False) -> str:
        """Says in a line what is asked."""
        kind = "LoRA adapter" if self.run.kind == "adapter" else "all weights trained"
        weights = {"ema": "averaged (EMA)", "raw": "raw"}[self.which] if self.has_ema else "no EMA"
        kind, weights = ("before training", "base") if base else (kind, weights)
        return f"{self.run.path}: {self.run.plan.spec.model.name}, {kind}, {weights}; {self.loaded.compute.device_name}"

    @contextlib.contextmanager
    def choosing(self, base: bool) -> Iterator[torch.nn.Module]:
        """Gives the trained model or its base, in the formats that the run's evaluations were computed in.

        The base of an adapter is the same model with the adapter off; that of a whole model is loaded beside it.
        """
        model = self.loaded.model
        with contextlib.ExitStack() as stack:
            if base and self.run.kind == "adapter":
                stack.enter_context(model.disable_adapter())
            elif base:
                if self._base is None:
                    self._base = load_model(self.run.plan.spec, self.loaded.compute).eval()
                    self._base.config.use_cache = True
                model = self._base
            stack.enter_context(self.loaded.autocast())
            stack.enter_context(torch.inference_mode())
            yield model

    def encode(
        self, prompt: str | Sequence[Turn], tools: list | None = None, options: Mapping | None = None
    ) -> list[int]:
        """Returns the token ids ``[T]`` of a text or a conversation, up to where the model is to answer.

        A text is asked as the run's rows asked: as it is, or as a user's turn behind the run's system prompt.

        Raises:
            RowError: The tokenizer or its template refuses it.
        """
        if isinstance(prompt, str):
            if self.is_plain:
                return self.renderer.encode_prompt(prompt + self._behind)
            prompt = [{"role": "user", "content": prompt}]
        if self.system and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": self.system}, *prompt]
        return self.renderer.encode_prompt(prompt, tools, options)

    def set_system(self, text: str) -> None:
        """Sets what conversations begin with; an empty text leaves it to the template.

        Raises:
            RowError: The model takes none; the present one stays.
        """
        if text and self.is_plain:
            raise RowError("this model continues text and has no system prompt")
        before, question = self.system, [{"role": "user", "content": "a"}]
        try:
            self.system = None
            bare = self.encode(question)
            self.system = text or None
            if text and self.encode(question) == bare:
                raise RowError("the chat template leaves the system prompt out, or writes this one by itself")
        except RowError:
            self.system = before
            raise

    def fit(self, prompt: str | Sequence[Turn], max_new_tokens: int) -> Fitted:
        """Encodes what fits into the model's positions with room for an answer; the oldest turns go first.

        Raises:
            RowError: The last turn alone does not fit.
        """
        kept, num_dropped = prompt if isinstance(prompt, str) else list(prompt), 0
        ids = self.encode(kept)
        if self.positions is None:
            return Fitted(ids, 0, None)
        room = self.positions - min(max_new_tokens, self.positions // _ANSWER_SHARE)
        while len(ids) > room and not isinstance(kept, str) and len(kept) > 1:
            # A conversation goes on with a user's turn.
            cut = next((i for i in range(1, len(kept)) if kept[i]["role"] == "user"), len(kept) - 1)
            kept, num_dropped = kept[cut:], num_dropped + cut
            ids = self.encode(kept)
        if len(ids) >= self.positions:
            raise RowError(f"this has {len(ids)} tokens and the model has {self.positions} positions")
        return Fitted(ids, num_dropped, self.positions - len(ids))

    def answer(self, fitted: Fitted, style: Style, write: Callable[[str], None], *, base: bool = False) -> bool:
        """Answers, word by word.

        Args:
            fitted: What to answer.
            style: How.
            write: Receives the answer in pieces, without special tokens and outer white space.
            base: Ask the base.

        Returns:
            Whether the answer came to its end; ``False`` if it reached ``max_new_tokens`` or the last position.
        """
        ids = torch.tensor([fitted.ids], device=self.loaded.model.device)
        drawing = style.temperature is not None
        with self.choosing(base) as model:
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=min(style.max_new_tokens, fitted.num_free or style.max_new_tokens),
                do_sample=drawing,
                num_beams=1,
                use_cache=True,
                temperature=style.temperature,
                top_p=style.top_p,
                top_k=0 if drawing else None,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.loaded.end_token_ids,
                streamer=_WordStream(self.tokenizer, write),
            )
        return output[0, -1].item() in self.loaded.end_token_ids


class _WordStream(BaseStreamer):
    """Writes tokens as text as soon as a word is whole.

    All tokens are decoded each time: some tokenizers drop the space of a first token, so that the pieces of an answer,
    decoded alone, are not the answer.
    """

    def __init__(self, tokenizer, write: Callable[[str], None]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.ids: list[int] = []
        self.written = 0
        self.has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt ``[1, T]`` first, and then token after token ``[1]``."""
        if not self.has_prompt:
            self.has_prompt = True
            return
        self.ids += value.flatten().tolist()
        text = self._decode()
        ends = [found.start() for found in _WORD_END.finditer(text)]
        self._write(text[: ends[-1]].rstrip() if ends else "")

    def end(self) -> None:
        """Writes the rest."""
        self._write(self._decode().rstrip())

    def _decode(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True).lstrip()

    def _write(self, text: str) -> None:
        if len(text) > self.written:
            self.write(text[self.written :])
            self.written = len(text)


def seed_drawing(seed: int) -> None:
    """Makes drawn answers the same each time."""
    set_seed(seed)
