"""What EMA and the monitor cost: Forge's trainer against the bare TRL trainer, interleaved, and their host syncs.

    python tests/benchmarks/overhead.py [--pairs 12] [--steps 24] [--model FOLDER]

Prints the ratio of CPU time per step (Forge / TRL; below 1 is faster) with its spread over the pairs, and host
syncs per micro step. Time is process time: what other programs do on the machine counts less than on the clock.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from trl import SFTTrainer

from forge_cli.backend.sft import build_trainer, build_training_args
from forge_cli.build.adapter import prepare_trainable
from forge_cli.build.callbacks import build_ema, build_monitor
from forge_cli.build.data import prepare_data
from forge_cli.build.tokenizer import load_tokenizer
from forge_cli.facts.model_facts import locate_model
from forge_cli.resolve.plan import resolve_mapping

WARM_UP_STEPS = 4
ACCUMULATION = 2


class SyncCounter(TorchDispatchMode):
    """Counts host reads of a tensor's value."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


class Stopwatch(TrainerCallback):
    """Takes the CPU time of the steps after the warm-up."""

    def __init__(self) -> None:
        self.began = self.seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP_STEPS:
            self.began = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = time.process_time() - self.began


def build(kind: str, options: argparse.Namespace, folder: Path) -> tuple[object, Stopwatch]:
    """Builds a trainer of one kind on a fresh model."""
    plan = resolve_mapping(
        {
            "model": {"name": options.model},
            "data": {"train": "forge:quickstart/train", "max_length": 128},
            "lora": {"r": 16},
            "ema": {"decay": 0.99},
            "training": {
                "max_steps": options.steps,
                "per_device_train_batch_size": options.batch,
                "gradient_accumulation_steps": ACCUMULATION,
                "activation_checkpointing": False,
            },
            "checkpoint": None,
        }
    )
    spec = plan.spec
    tokenizer = load_tokenizer(spec)
    rows = prepare_data(spec, tokenizer).train
    model, _ = prepare_trainable(AutoModelForCausalLM.from_pretrained(locate_model(options.model)).float(), spec)
    args = build_training_args(spec, output_dir=folder, compute_dtype=torch.float32, device="cpu", has_eval=False)
    watch = Stopwatch()
    if kind == "forge":
        monitor = build_monitor(spec, folder / "metrics.jsonl")
        trainer = build_trainer(
            model=model,
            tokenizer=tokenizer,
            args=args,
            train_dataset=rows,
            eval_dataset=None,
            monitor=monitor,
            ema=build_ema(spec),
            callbacks=[watch],
        )
        return trainer, watch
    args.logging_nan_inf_filter = True  # the trainer as it comes
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=rows.remove_columns("rows"),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, watch


def measure(kind: str, options: argparse.Namespace) -> float:
    """Returns the CPU seconds of the measured steps of one run."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, watch = build(kind, options, Path(folder))
        trainer.train()
    return watch.seconds


def count_syncs(kind: str, options: argparse.Namespace) -> float:
    """Counts host syncs per micro step of a whole run."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, _ = build(kind, options, Path(folder))
        with SyncCounter() as counter:
            trainer.train()
    return counter.count / (options.steps * ACCUMULATION)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--model", default="forge-tiny")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    measure("trl", argparse.Namespace(**{**vars(options), "steps": 6}))
    ratios = []
    for pair in range(options.pairs):
        order = ("trl", "forge") if pair % 2 else ("forge", "trl")
        seconds = {kind: measure(kind, options) for kind in order}
        ratios.append(seconds["forge"] / seconds["trl"])
        steps = options.steps - WARM_UP_STEPS
        print(f"pair {pair + 1:2}: {seconds['trl'] / steps * 1e3:7.1f} ms TRL, {ratios[-1]:.4f}", flush=True)
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"\nForge with EMA and monitor / bare TRL, CPU time per step: median {middle:.4f}, quartiles {low:.4f} to "
          f"{high:.4f}, range {min(ratios):.4f} to {max(ratios):.4f}, {len(ratios)} pairs")  # fmt: skip
    syncs = {kind: count_syncs(kind, options) for kind in ("trl", "forge")}
    print(f"host syncs per micro step: {syncs['trl']:.2f} TRL, {syncs['forge']:.2f} Forge")


if __name__ == "__main__":
    main()
