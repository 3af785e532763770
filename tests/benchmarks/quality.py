"""Do EMA and freezing help or hurt? Held-out losses of several seeds of each setting, compared seed by seed.

    python tests/benchmarks/quality.py tiny --seeds 1-5        (real: the 135M model, after recipes/real_prepare.py)

A run is built from the parts that `forge train` uses, but carries all averages of its setting at once: an average never
touches the weights, so each is the one that a run of its own would have ended with. A finished run is one line of the
--out file and is not done again. Times are CPU time of this process on one thread, averages timed apart.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
import warnings
from pathlib import Path
from statistics import mean, median, stdev

import torch
import transformers

from forge_cli.backend.sft import build_trainer, build_training_args
from forge_cli.build.adapter import prepare_trainable
from forge_cli.build.callbacks import build_monitor
from forge_cli.build.compute import choose_compute
from forge_cli.build.data import prepare_data
from forge_cli.build.model import load_model
from forge_cli.build.tokenizer import load_tokenizer
from forge_cli.parts.ema import EMACallback
from forge_cli.resolve.plan import Plan, resolve_plan
from forge_cli.run.answers import Examination
from forge_cli.run.execute import train

RECIPES = Path(__file__).parents[2] / "recipes"
UNTIMED_STEPS = 5
CONSTANT, TRIPLE = "training.lr_scheduler_type=constant", "training.learning_rate=3e-3"
# A decay, and whether it is warmed up. In 30 steps a warmed-up 0.9 is the same as 0.99: both reach 0.775.
WARM = {"EMA 0.9": (0.9, True), "EMA 0.99": (0.99, True)}
BOTH = WARM | {"EMA 0.95, no warm-up": (0.95, False), "EMA 0.99, no warm-up": (0.99, False)}
SHORT = {"EMA 0.99": (0.99, True), "EMA 0.9, no warm-up": (0.9, False)}
ALL = BOTH | SHORT | {"EMA 0.999": (0.999, True), "EMA 0.999, no warm-up": (0.999, False)}
FROZEN = {f"LoRA, freeze.first {share}": ([f"freeze.first={share}"], {}) for share in ("25%", "50%", "75%")}
TINY = ["training.max_steps=140", "training.per_device_train_batch_size=8", "report.samples=0"]
REAL = ["freeze=null", "report=null", "training.max_steps=30", "training.per_device_train_batch_size=4"]
REAL += ["data.max_length=64", "data.max_lost_ratio=0.2", "data.eval={path: build/real/heldout.jsonl, rows: 60}"]
# Model: recipe, overrides of all its runs, settings by name (overrides, averages). The first setting is the baseline.
TINY_SETTINGS = {
    "LoRA": ([], ALL),
    "LoRA, constant rate": ([CONSTANT], BOTH),
    "LoRA, 3 x rate": ([TRIPLE], WARM),
    "LoRA, 3 x rate, constant": ([TRIPLE, CONSTANT], BOTH),
    **FROZEN,
    "all weights, a tenth of the rate": (["lora=null", "training.learning_rate=1e-4"], WARM),
}
REAL_SETTINGS = {
    "LoRA": ([], SHORT),
    "LoRA, freeze.first 50%": FROZEN["LoRA, freeze.first 50%"],
    "LoRA, constant rate": ([CONSTANT], SHORT),
    "LoRA, freeze.first 50%, 45 steps": (["freeze.first=50%", "training.max_steps=45"], {}),
    "LoRA, 3 x rate, constant": ([TRIPLE, CONSTANT], SHORT),
}
GRIDS = {"tiny": ("quickstart.yaml", TINY, TINY_SETTINGS), "real": ("real-lora.yaml", REAL, REAL_SETTINGS)}


class Stopwatch(transformers.TrainerCallback):
    """Takes the CPU time of all steps but the first."""

    began = seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == UNTIMED_STEPS:
            self.began = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds = time.process_time() - self.began


class TimedAverage(EMACallback):
    """An average that takes the CPU time of its updates."""

    seconds = 0.0

    def on_optimizer_step(self, args, state, control, **kwargs):
        began = time.process_time()
        super().on_optimizer_step(args, state, control, **kwargs)
        self.seconds += (time.process_time() - began) * (state.global_step >= UNTIMED_STEPS)


def run_once(plan: Plan, averages: dict[str, tuple[float, bool]]) -> dict:
    """Trains once; returns held-out losses by weights, exact answers of the raw ones, trained weights and times."""
    spec, compute = plan.spec, choose_compute(plan.spec)
    tokenizer = load_tokenizer(spec)
    data = prepare_data(spec, tokenizer)
    model, trainable = prepare_trainable(load_model(spec, compute), spec)
    device, dtype = compute.device, compute.autocast_dtype
    monitor, watch = build_monitor(spec), Stopwatch()
    emas = {name: TimedAverage(decay, decay_warmup=warm) for name, (decay, warm) in averages.items()}
    for ema in emas.values():
        ema.was_skipped = lambda: monitor.is_skipped
    with tempfile.TemporaryDirectory() as folder:
        args = build_training_args(spec, output_dir=Path(folder), compute_dtype=dtype, device=device, has_eval=False)
        parts = {"tokenizer": tokenizer, "monitor": monitor, "callbacks": [*emas.values(), watch]}
        trainer = build_trainer(model=model, args=args, train_dataset=data.train, eval_dataset=data.eval, **parts)
        trainer.train()
    losses, steps = {"raw": trainer.evaluate()["eval_loss"]}, trainer.state.global_step - UNTIMED_STEPS
    for name, ema in emas.items():
        with ema.applied():
            losses[name] = trainer.evaluate()["eval_loss"]
    examination = Examination(spec.report, data.questions, tokenizer, dtype)
    return {
        "losses": losses,
        "exact": examination.exact_match_ratio(examination.answer(model)),
        "trained": trainable.num_trainable_parameters,
        "step_seconds": (watch.seconds - sum(ema.seconds for ema in emas.values())) / steps,
        "ema_seconds": {name: ema.seconds / steps for name, ema in emas.items()},
    }


def check_against_forge_train(recipe: Path, overrides: list[str]) -> None:
    """Prints the losses of one run beside what `forge train` reports for the same settings."""
    with tempfile.TemporaryDirectory() as folder:
        theirs = train(recipe, [*overrides, "ema.decay=0.99", f"output_dir={folder}"]).report["losses"]
    ours = run_once(resolve_plan(recipe, [*overrides, "ema=null"]), {"EMA": (0.99, True)})["losses"]
    print(f"here {ours}\nforge train raw {theirs['eval_raw']!r}, EMA {theirs['eval_ema']!r}")


def compare(values: dict[int, float], others: dict[int, float]) -> str:
    """Says the mean difference over the seeds, its standard error, and in how many seeds it is below zero."""
    differences = [value - others[seed] for seed, value in values.items() if seed in others]
    if values == others or len(differences) < 2:
        return ""
    error = stdev(differences) / math.sqrt(len(differences))
    return f"{mean(differences):+.5f} ± {error:.5f} ({sum(one < 0 for one in differences)}/{len(differences)})"


def render_row(name: str, weights: str, runs: dict[int, dict], base: dict[int, dict]) -> str:
    """Renders the raw weights or one average of a setting with at least two runs, by seed."""
    losses, raw = ({seed: run["losses"][key] for seed, run in runs.items()} for key in (weights, "raw"))
    seconds = {seed: run["step_seconds"] + run["ema_seconds"].get(weights, 0) for seed, run in runs.items()}
    exact = [run["exact"] for run in runs.values() if weights == "raw" and run["exact"] is not None]
    cells = [
        name if weights == "raw" else f"· {weights}",
        f"{mean(losses.values()):.5f} ± {stdev(losses.values()):.5f}",
        compare(losses, {seed: run["losses"]["raw"] for seed, run in base.items()}),
        compare(losses, raw),
        f"{100 * mean(exact):.1f} %" if exact else "",
        str(next(iter(runs.values()))["trained"]) if weights == "raw" else "",
        f"{median(seconds[seed] / base[seed]['step_seconds'] for seed in runs.keys() & base.keys()):.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def render(records: list[dict], settings: dict[str, tuple]) -> str:
    """Renders the table of one model."""
    head = "| setting | held-out loss | minus baseline (won) | minus its own raw (won) | exact | trained | step time |"
    lines, by_setting = [head, "|---|---:|---:|---:|---:|---:|---:|"], {}
    for name, (_, averages) in settings.items():
        runs = by_setting[name] = {one["seed"]: one for one in records if one["setting"] == name}
        kinds = ["raw", *averages] if len(runs) > 1 else []
        lines += [render_row(name, weights, runs, by_setting[next(iter(settings))]) for weights in kinds]
    return "\n".join(lines)


def main() -> None:
    """Does the runs that are missing, seed by seed, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=GRIDS)
    parser.add_argument("--seeds", default="1-5", help="first and last, such as 1-5")
    parser.add_argument("--out", type=Path, default=Path("build/quality.jsonl"), help="file of finished runs")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--check", action="store_true", help="compare one run with what forge train reports, then stop")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    recipe, common, settings = GRIDS[options.model]
    if options.check:
        return check_against_forge_train(RECIPES / recipe, common)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.touch()
    records = [one for one in map(json.loads, options.out.open()) if one["model"] == options.model]
    done = {(one["setting"], one["seed"]) for one in records}
    first, last = (int(part) for part in options.seeds.split("-"))
    jobs = [(name, seed) for seed in range(first, last + 1) for name in settings if (name, seed) not in done]
    for name, seed in [] if options.table else jobs:
        overrides, averages = settings[name]
        found = run_once(resolve_plan(RECIPES / recipe, [*common, *overrides, "ema=null", f"seed={seed}"]), averages)
        records.append({"model": options.model, "setting": name, "seed": seed, **found})
        with options.out.open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")
        print(f"{name}, seed {seed}: {found['losses']}", flush=True)
    print(render(records, settings))


if __name__ == "__main__":
    main()
