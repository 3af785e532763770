"""Generates answers before and after training."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from forge_cli.build.data import Question
from forge_cli.errors import DataError
from forge_cli.parts.rendering import Renderer
from forge_cli.schema.training import ReportSection

BATCH_ROWS = 32


class Examination:
    """The same questions before and after training.

    With ``report.exact_match`` all evaluation rows are asked, else the first ``report.samples`` of them, and the
    prompts of the run file.

    Args:
        report: The section; ``None`` asks nothing.
        questions: Evaluation rows as prompts with wanted answers.
        tokenizer: Of the model that is asked.
        autocast_dtype: Format of mixed precision: answers are given as the training computes.

    Raises:
        DataError: An exact match is asked for and no evaluation row has an answer.
    """

    def __init__(
        self, report: ReportSection | None, questions: Sequence[Question], tokenizer, autocast_dtype: torch.dtype
    ) -> None:
        self.report = report
        self.autocast_dtype = autocast_dtype
        self.tokenizer = tokenizer
        self.entries: list[dict] = []
        if report is None:
            return
        if report.exact_match and not questions:
            raise DataError("report.exact_match: no evaluation row has a question and an answer", fix="use other rows")
        chosen = questions if report.exact_match else questions[: report.samples]
        self.entries = [{"prompt": q.prompt, "shown": q.shown, "wanted": q.wanted} for q in chosen]
        for text in report.prompts:
            turns = [{"role": "user", "content": text}]
            prompt = Renderer(tokenizer).encode_prompt(turns if tokenizer.chat_template else text)
            self.entries.append({"prompt": prompt, "shown": text, "wanted": None})

    def announce(self, when: str) -> str:
        """Says what comes, as it may take a while."""
        return f"answering {len(self.entries)} prompts {when} training ..." if self.entries else ""

    def answer(self, model) -> list[str]:
        """Answers all prompts with a model."""
        if not self.entries:
            return []
        prompts = [entry["prompt"] for entry in self.entries]
        mixed = self.autocast_dtype is not torch.float32
        with torch.autocast(model.device.type, dtype=self.autocast_dtype, enabled=mixed):
            return generate_answers(model, self.tokenizer, prompts, self.report.max_new_tokens)

    def pair(self, before: list[str], after: list[str]) -> list[dict]:
        """Puts the answers beside their questions."""
        return [{**e, "before": b, "after": a} for e, b, a in zip(self.entries, before, after, strict=True)]

    def exact_match_ratio(self, answers: list[str]) -> float | None:
        """Returns the share of wanted answers given to the letter (0 to 1); ``None`` unless the plan asks for it."""
        if self.report is None or not self.report.exact_match:
            return None
        pairs = [(e["wanted"], a) for e, a in zip(self.entries, answers, strict=True) if e["wanted"] is not None]
        return sum(wanted == answer for wanted, answer in pairs) / len(pairs)


def generate_answers(model, tokenizer, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """Answers prompts greedily, in batches padded on the left.

    Args:
        model: A causal language model; it is put into evaluation mode and back.
        tokenizer: Its tokenizer.
        prompts: Token ids of each, with the special tokens that belong to it.
        max_new_tokens: Longest answer.

    Returns:
        The answers in order, without special tokens and outer white space.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    was_training, side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"
    try:
        for start in range(0, len(order), BATCH_ROWS):
            chosen = order[start : start + BATCH_ROWS]
            batch = [prompts[i] for i in chosen]
            for i, answer in zip(chosen, _answer_batch(model, tokenizer, batch, max_new_tokens), strict=True):
                answers[i] = answer
    finally:
        tokenizer.padding_side = side
        # Padding is a state of the fast tokenizer, and would be saved with it.
        tokenizer.backend_tokenizer.no_padding()
        model.train(was_training)
    return answers


@torch.inference_mode()
def _answer_batch(model, tokenizer, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """Answers one batch. Shapes: ``input_ids [B, T]``, output ``[B, T + new]``."""
    encoded = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
    output = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=find_end_tokens(model, tokenizer),
    )
    new = output[:, encoded["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def find_end_tokens(model, tokenizer) -> list[int]:
    """Collects the end tokens of the tokenizer, its chat template and the model's generation settings."""
    # A model that scores answers has no settings for writing them.
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = ids if isinstance(ids, list) else [ids]
    own = [tokenizer.eos_token_id, Renderer(tokenizer).find_end_token()]
    return sorted({i for i in [*ids, *own] if i is not None})
