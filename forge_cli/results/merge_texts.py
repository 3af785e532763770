"""The texts that a merged or exported model is compared on: rows of the run, then what its report asked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from forge_cli.errors import ForgeError
from forge_cli.parts.labels import IGNORED
from forge_cli.parts.rendering import Renderer
from forge_cli.results.find import Run
from forge_cli.results.rows import prepare_rows
from forge_cli.units import count_of

NUM_TEXTS = 8
FEWEST_TEXTS = 4
_MOST_TOKENS = 96  # logits of a vocabulary of 150 000 take 600 kB a token
_SENTENCES = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "List three prime numbers: 2, 3,",
    "Translate into German: good morning.",
)


@dataclass(frozen=True)
class Texts:
    """Token ids to compare models on.

    Attributes:
        rows: Ids of each text, question and answer.
        prompt_lengths: How many ids of each are the question; at least 1.
        source: Where they come from, in words.
    """

    rows: list[list[int]]
    prompt_lengths: list[int]
    source: str

    @property
    def prompts(self) -> list[list[int]]:
        """The questions alone."""
        return [row[:length] for row, length in zip(self.rows, self.prompt_lengths, strict=True)]


def collect_texts(run: Run, tokenizer) -> Texts:
    """Collects evaluation rows, or training rows without any; fills up with the report's questions and sentences.

    Args:
        run: The run. Its rows may be gone by now.
        tokenizer: As saved with the weights.
    """
    found: list[tuple[list[int], int]] = []
    sources = []
    try:
        name, rows = _read_rows(run, tokenizer)
        found = [(row, length) for row, length in rows if len(row) > 1]
        sources = [count_of(len(found), f"{name} row", f"{name} rows")] if found else []
    except (ForgeError, OSError):
        pass  # the data has moved or changed since
    spare = (
        ("question of the report", "questions of the report", _read_samples(run)),
        ("sentence", "sentences", [(one, "") for one in _SENTENCES]),
    )
    for one, many, texts in spare:
        added = [_render(tokenizer, *text) for text in texts[: max(FEWEST_TEXTS - len(found), 0)]]
        found += added
        if added:
            sources.append(count_of(len(added), one, many))
    return Texts([row for row, _ in found], [max(length, 1) for _, length in found], " and ".join(sources))


def _read_rows(run: Run, tokenizer) -> tuple[str, list[tuple[list[int], int]]]:
    data = prepare_rows(run, run.plan.spec, tokenizer)
    name, rows = ("evaluation", data.eval) if data.eval is not None else ("training", data.train)
    return name, [_cut(row) for row in itertools.islice(iter(rows), NUM_TEXTS)]


def _cut(row: dict) -> tuple[list[int], int]:
    """Returns the first ids of a row, and how many of them are the question."""
    if "input_ids" in row:
        ids, labels = list(row["input_ids"]), list(row["labels"])
        end = row["seq_lengths"][0] if "seq_lengths" in row else len(ids)
        start = next((i for i, label in enumerate(labels[:end]) if label != IGNORED), end)
    else:
        answer = next(value for name, value in row.items() if name.endswith("_ids") and name != "prompt_ids")
        ids, start = [*row["prompt_ids"], *answer], len(row["prompt_ids"])
        end = len(ids)
    end = min(end, _MOST_TOKENS)
    return ids[:end], min(start, end)


def _read_samples(run: Run) -> list[tuple[str, str]]:
    return [(one["shown"], one["wanted"] or one["after"]) for one in run.report.get("samples", [])]


def _render(tokenizer, question: str, answer: str) -> tuple[list[int], int]:
    turns = [{"role": "user", "content": question}]
    prompt = Renderer(tokenizer).encode_prompt(turns if tokenizer.chat_template else question)
    return [*prompt, *tokenizer.encode(answer, add_special_tokens=False)][:_MOST_TOKENS], len(prompt)


@torch.inference_mode()
def read_logits(model: torch.nn.Module, rows: list[list[int]]) -> list[torch.Tensor]:
    """Computes the logits of texts, one text at a time, so that padding plays no part.

    Returns:
        For each text float32 ``[tokens, vocabulary]`` on the CPU.
    """
    device = model.get_input_embeddings().weight.device
    return [
        model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float().cpu() for ids in rows
    ]


def list_differences(one: list[torch.Tensor], other: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yields the absolute differences of two models' logits, text by text; NaN counts as infinite."""
    return ((a - b).abs().nan_to_num(nan=torch.inf) for a, b in zip(one, other, strict=True))
