"""What a CPU run of ``forge train`` really holds, beside what ``forge estimate`` says: bar 3 of the estimate.

    python tests/benchmarks/estimate_reality.py [--only TEXT] [--json FILE] [--again FILE] [--profiler] [--trace]

Trains models of 54 to 71 million random weights for three optimizer steps in float32 and follows every live tensor
from the loading of the model to the end of training, by a dispatch mode that knows nothing of the estimate. ``--json``
keeps what was measured, ``--again`` compares it with today's predictions without training. ``--profiler`` measures
with torch's memory profiler instead, which also sees what operations allocate inside themselves. ``--trace`` compares
with the trace on fake tensors instead of the fast path. Takes about six minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from forge_cli.estimate.memory import estimate_memory
from forge_cli.estimate.plan_memory import setting_from_plan
from forge_cli.paths import assets_root
from forge_cli.resolve.plan import Plan, resolve_mapping
from forge_cli.run.trace import trace_plan

# Of the embedded model's tokenizer; which tokens they are does not matter here.
TOKENIZER_TOKENS, END_TOKEN = 512, 3
MODELS = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "qwen3": {
        "model_type": "qwen3",
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 40000,
        "tie_word_embeddings": True,
    },
    # Dropout in the attention would take the CPU, not a GPU, to a path that writes all scores out.
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 640,
        "n_layer": 10,
        "n_head": 10,
        "n_positions": 1024,
        "vocab_size": 8192,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    },
}


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        model: A key of ``MODELS``.
        method: ``full``, ``lora`` or ``qlora``.
        batch: Rows of a micro step.
        length: Tokens of a row.
        checkpointing: Whether activations are recomputed.
        accumulation: Micro steps of an optimizer step.
        more: Further settings of the run file, by section.
    """

    model: str
    method: str
    batch: int = 1
    length: int = 256
    checkpointing: bool = False
    accumulation: int = 1
    more: dict = field(default_factory=dict)

    def __str__(self) -> str:
        words = [self.model, self.method, f"{self.batch}x{self.length}"]
        words += ["ckpt"] if self.checkpointing else []
        words += [f"ga{self.accumulation}"] if self.accumulation > 1 else []
        words += [f"{section}.{key}={value}" for section, fields in self.more.items() for key, value in fields.items()]
        return " ".join(words)


SETTINGS = [
    Setting("llama", "full", 1, 256),
    Setting("llama", "full", 1, 512, True),
    Setting("llama", "full", 2, 128, False, 2),
    Setting("llama", "full", 1, 1024, True),
    Setting("llama", "full", 1, 256, True, 2, {"ema": {"decay": 0.99}}),
    Setting("llama", "full", 1, 256, True, 1, {"training": {"optim": "adafactor"}}),
    Setting("llama", "full", 1, 256, True, 2, {"training": {"optim": "sgd"}}),
    Setting("llama", "full", 2, 256, False, 1, {"freeze": {"first": "50%"}}),
    Setting("llama", "lora", 2, 256),
    Setting("llama", "lora", 4, 256, True),
    Setting("llama", "lora", 1, 1024, False),
    Setting("llama", "lora", 1, 512, True, 2, {"freeze": {"first": 4}}),
    Setting("llama", "lora", 1, 512, False, 2, {"lora": {"r": 64, "target_modules": ["q_proj", "v_proj"]}}),
    Setting("llama", "lora", 2, 256, False, 1, {"data": {"packing": True}}),
    Setting("llama", "lora", 2, 256, False, 1, {"lora": {"lora_dropout": 0.1}}),
    Setting("llama", "qlora", 2, 256),
    Setting("llama", "qlora", 1, 512, True),
    Setting("llama", "qlora", 1, 256, True, 2, {"quantization": {"bnb_4bit_use_double_quant": False}}),
    Setting("llama", "lora", 2, 256, False, 1, {"quantization": {"bits": 8}}),
    Setting("qwen3", "full", 1, 256),
    Setting("qwen3", "full", 2, 256, True, 2),
    Setting("qwen3", "lora", 3, 128, False, 2),
    Setting("qwen3", "lora", 1, 512, True, 1, {"ema": {"decay": 0.99}}),
    Setting("qwen3", "qlora", 2, 256, True),
    Setting("gpt2", "full", 1, 256),
    Setting("gpt2", "full", 1, 512, True, 1, {"training": {"optim": "adamw_torch"}}),
    Setting("gpt2", "lora", 2, 256),
]


def predict(plan: Plan) -> int:
    """Predicts the peak of live tensor bytes of a plan on the CPU in float32; rows are all of full length."""
    setting = setting_from_plan(plan, cuda=False)
    return estimate_memory(setting._replace(padded=False)).total_bytes


def predict_by_trace(plan: Plan) -> int:
    """Predicts the same by a trace on fake tensors."""
    return trace_plan(plan, "cpu").peak_bytes


def write_model(folder: Path, fields: dict) -> None:
    """Writes a model with random weights and the embedded model's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(assets_root() / "forge-tiny", folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(pad_token_id=0, **fields), dtype=torch.float32)
    model.save_pretrained(folder)


def write_rows(file: Path, setting: Setting) -> None:
    """Writes rows of full length, or pairs that fill a sequence together where rows are packed."""
    chance = random.Random(0)
    packed = "packing" in setting.more.get("data", {})
    length, count = (setting.length // 2, 2) if packed else (setting.length, 1)
    with file.open("w") as stream:
        for _ in range(3 * setting.batch * setting.accumulation * count):
            ids = [chance.randrange(5, TOKENIZER_TOKENS) for _ in range(length - 1)] + [END_TOKEN]
            stream.write(json.dumps({"input_ids": ids}) + "\n")


def make_plan(setting: Setting, folder: Path) -> Plan:
    """Resolves a setting's run file, with its model and rows beside it."""
    model, rows = folder / setting.model, folder / "rows.jsonl"
    if not model.exists():
        write_model(model, MODELS[setting.model])
    write_rows(rows, setting)
    settings: dict = {
        "name": "reality",
        "output_dir": str(folder / "runs"),
        "model": {"name": str(model)},
        "data": {"train": str(rows), "format": "tokens", "max_length": setting.length},
        "training": {
            "max_steps": 3,
            "per_device_train_batch_size": setting.batch,
            "gradient_accumulation_steps": setting.accumulation,
            "activation_checkpointing": setting.checkpointing,
            "precision": "fp32",
        },
        "checkpoint": None,
        "report": None,
    }
    if setting.method != "full":
        settings["lora"] = {"r": 16}
    if setting.method == "qlora":
        settings["quantization"] = {"bits": 4}
    for section, values in setting.more.items():
        settings[section] = {**settings.get(section, {}), **values}
    return resolve_mapping(settings)


class Follower:
    """Measures by following live tensors."""

    def __init__(self) -> None:
        from forge_cli.parts.cuda_likeness import cpu_workspaces
        from forge_cli.parts.memory_trace import LiveBytes

        self.live = LiveBytes(1, cpu_workspaces())
        self.mark = self.live.mark

    def __enter__(self) -> None:
        self.live.__enter__()

    def __exit__(self, *error: object) -> None:
        self.live.__exit__(*error)

    def peaks(self) -> dict[str, int]:
        """Highest bytes of each phase."""
        return self.live.peaks


class Profiler:
    """Measures by what torch's CPU allocator tells the profiler: all tensors, and what operations need inside."""

    def __init__(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.marks: list[tuple[int, str]] = []

    def mark(self, phase: str) -> None:
        """Begins a phase."""
        self.marks.append((time.time_ns(), phase))

    def __enter__(self) -> None:
        self.profile.__enter__()

    def __exit__(self, *error: object) -> None:
        self.profile.__exit__(*error)

    def peaks(self) -> dict[str, int]:
        """Highest bytes of each phase."""
        events = [one for one in self.profile.profiler.kineto_results.events() if one.name() == "[memory]"]
        live, peaks, marks, phase = 0, {}, list(self.marks), ""
        for event in sorted(events, key=lambda one: one.start_ns()):
            while marks and marks[0][0] <= event.start_ns():
                phase = marks.pop(0)[1]
            live += event.nbytes()
            peaks[phase] = max(peaks.get(phase, 0), live)
        return peaks


@contextlib.contextmanager
def watching(instrument) -> Iterator[None]:
    """Watches a run from the loading of its model to the end of its training."""
    from forge_cli.build import model as loading
    from forge_cli.run import execute

    load, train = loading.load_model, execute._run_training

    def watched_load(*args, **kwargs):
        instrument.__enter__()
        instrument.mark("load")
        return load(*args, **kwargs)

    def watched_train(*args, **kwargs):
        instrument.mark("train")
        try:
            train(*args, **kwargs)
        finally:
            instrument.__exit__(None, None, None)
        raise Enough

    with (
        mock.patch.object(loading, "load_model", watched_load),
        mock.patch.object(execute, "_run_training", watched_train),
        contextlib.suppress(Enough),
    ):
        yield


class Enough(BaseException):
    """Ends a run after its training: nothing is saved, and nobody takes it for an error."""


class Silence:
    """A reporter that says nothing."""

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None


def measure(plan: Plan, with_profiler: bool) -> dict[str, int]:
    """Trains a plan and returns the highest live bytes of each phase."""
    from forge_cli.run.execute import train_plan

    instrument = Profiler() if with_profiler else Follower()
    with watching(instrument):
        train_plan(plan, overwrite=True, reporter=Silence())
    gc.collect()
    return instrument.peaks()


def show(name: str, measured: int, predicted: int, seconds: float) -> float:
    """Prints a line and returns the error of the prediction, as a ratio."""
    error = predicted / measured - 1
    mib = 2**20
    print(f"{name:72} {measured / mib:9.1f} {predicted / mib:9.1f} {100 * error:+7.2f} %  {seconds:5.1f} s", flush=True)
    return error


def main() -> None:
    """Runs, or reads, and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="settings whose line contains this")
    parser.add_argument("--json", type=Path, help="keep what was measured here, beside what is there")
    parser.add_argument("--again", type=Path, help="compare what was measured before")
    parser.add_argument("--profiler", action="store_true", help="measure with torch's memory profiler")
    parser.add_argument("--trace", action="store_true", help="predict by a trace on fake tensors")
    args = parser.parse_args()
    source = args.again or args.json
    kept = json.loads(source.read_text()) if source and source.is_file() else {}
    errors = []
    print(f"{'MiB':>82} {'predicted':>9} {'error':>9}")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FORGE_CACHE"] = str(Path(folder) / "cache")
        for setting in SETTINGS:
            name = str(setting)
            if args.only not in name or (args.again and name not in kept):
                continue
            began = time.perf_counter()
            plan = make_plan(setting, Path(folder))
            if not args.again:
                kept[name] = measure(plan, args.profiler)
                if args.json:
                    args.json.write_text(json.dumps(kept, indent=1))
            predicted = predict_by_trace(plan) if args.trace else predict(plan)
            peak = max(kept[name]["load"], kept[name]["train"])
            errors.append(abs(show(name, peak, predicted, time.perf_counter() - began)))
    median, worst = 100 * statistics.median(errors), 100 * max(errors)
    print(f"{len(errors)} settings: median {median:.2f} %, worst {worst:.2f} %")


if __name__ == "__main__":
    main()
