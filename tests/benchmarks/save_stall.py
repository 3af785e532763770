"""How long a save holds training: Forge's checkpoint against the Trainer's own, of the same run, in turns.

    python tests/benchmarks/save_stall.py [--width 768] [--layers 8] [--saves 6]

Forge copies what is to be saved and writes, hashes and fsyncs it in a thread; the Trainer writes at once, and neither
hashes nor fsyncs. Both are timed on the clock at the same steps of the same run; what is given is their ratio.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer

import forge_cli.backend.keeping as keeping
from forge_cli.facts.model_facts import locate_model
from forge_cli.resolve.plan import resolve_mapping
from forge_cli.run.execute import train_plan
from forge_cli.run.reporter import QuietReporter

SAVE_EVERY = 4


def main() -> None:
    """Trains a whole model and a LoRA adapter, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("width", 768), ("layers", 8), ("saves", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="forge-stall-"))
    write_model(folder / "model", options)
    print("| trained | checkpoint, MB | Trainer, s | Forge, s | ratio (median) | ratio (range) |")
    print("|---|---|---|---|---|---|")
    for kind, lora in (("full", None), ("lora", {"r": 64, "lora_alpha": 64})):
        pairs, size = measure(folder, kind, lora, options.saves)
        ratios = [ours / theirs for theirs, ours in pairs]
        plain, own = (statistics.median(column) for column in zip(*pairs, strict=True))
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"| {kind} | {size / 1e6:.0f} | {plain:.3f} | {own:.3f} | {statistics.median(ratios):.2f} | {spread} |")
    shutil.rmtree(folder)


def write_model(folder: Path, options: argparse.Namespace) -> None:
    """Writes a model with random weights."""
    tokenizer = AutoTokenizer.from_pretrained(str(locate_model("forge-tiny")))
    config = LlamaConfig(
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 64,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(folder: Path, kind: str, lora: dict | None, num_saves: int) -> tuple[list[tuple[float, float]], int]:
    """Returns seconds of the Trainer's save and of Forge's at every save, and the size of a checkpoint."""
    pairs: list[tuple[float, float]] = []
    real = keeping.KeptTrainer._save_checkpoint

    def save(self, model, trial=None) -> None:
        if self.state.global_step == 1:  # the proof of the first save is not what is measured
            return real(self, model, trial)
        self.keeper.finish()
        began = time.perf_counter()
        Trainer._save_checkpoint(self, model, trial)
        middle = time.perf_counter()
        real(self, model, trial)
        pairs.append((middle - began, time.perf_counter() - middle))
        return None

    settings = {
        "model": {"name": str(folder / "model")},
        "name": kind,
        "data": {"train": "forge:quickstart/train", "max_length": 128},
        "lora": lora,
        "training": {"max_steps": SAVE_EVERY * num_saves, "per_device_train_batch_size": 2},
        "checkpoint": {"save_steps": SAVE_EVERY, "save_total_limit": 1},
        "report": None,
        "output_dir": str(folder / "runs"),
    }
    keeping.KeptTrainer._save_checkpoint = save
    try:
        result = train_plan(resolve_mapping(settings), reporter=QuietReporter())
    finally:
        keeping.KeptTrainer._save_checkpoint = real
    newest = max((result.folder / "checkpoints").glob("step-*"))
    return pairs, sum(path.stat().st_size for path in newest.iterdir())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
