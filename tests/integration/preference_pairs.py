"""The shipped preference pairs by hand: token ids, log probabilities and runs, with nothing of Forge's data path."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from forge_cli.resolve.plan import resolve_mapping
from forge_cli.run.execute import train_plan
from forge_cli.run.reporter import QuietReporter

ASSETS = Path(__file__).parents[2] / "forge_cli" / "assets"
TINY = ASSETS / "forge-tiny"
PAIRS = {"train": "forge:preference/train", "eval": "forge:preference/heldout", "max_length": 128}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 8}


class Listener(QuietReporter):
    """Keeps what a run says."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


def run(settings: dict, listener: Listener | None = None):
    return train_plan(resolve_mapping(settings), reporter=listener or QuietReporter())


def read_pairs(split: str) -> list[dict]:
    return [json.loads(line) for line in (ASSETS / "preference" / f"{split}.jsonl").read_text().splitlines()]


def encode_pairs(split: str) -> list[tuple[list[int], list[int], list[int]]]:
    """Returns prompt, better and worse answer of every pair as token ids; answers end with the turn's end token."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    encoded = []
    for row in read_pairs(split):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        answers = [
            tokenizer(row[side][0]["content"] + "<|im_end|>", add_special_tokens=False).input_ids
            for side in ("chosen", "rejected")
        ]
        encoded.append((prompt, *answers))
    return encoded


def sum_log_probs(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Returns the summed log probability ``[]`` of an answer, one row at a time: no padding, no mask, no batch."""
    ids = torch.tensor([prompt + answer])
    log_probs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    taken = log_probs.gather(1, ids[0, 1:, None])[:, 0]
    return taken[len(prompt) - 1 :].sum()


def load_base():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def write_marked(path: Path, split: str) -> str:
    """Writes both answers of every pair as single answers that are marked good or bad; returns the file's name."""
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in read_pairs(split)
        for side in ("chosen", "rejected")
    ]
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def one_step(batch_size: int = 4) -> dict:
    return {"max_steps": 1, "per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 1}
