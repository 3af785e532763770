"""The cases of ``estimate_gpu.py``: which models and settings are measured, and the files that a run of them reads."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from forge_cli.facts.model_facts import find_model_facts
from forge_cli.paths import assets_root

NUM_STEPS = 3
# Of the embedded model's tokenizer; which tokens they are does not matter here.
TOKENIZER_TOKENS, END_TOKEN = 512, 3
# Decoder layers of real width; every further layer adds the same. Gemma's windows have a pattern of six layers.
LAYERS = {"llama-3.1-8b": 4, "qwen3-4b": 6, "gemma-3-4b": 8, "mistral-7b": 4}
METHODS = ("full", "lora", "qlora")
# On the CPU everything is shorter and narrower by this.
CPU_RATIO = 8
_CPU_SHAPE = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 704,
    "vocab_size": 8192,
}
_COPIED = ("model_type", "tie_word_embeddings", "max_position_embeddings", "sliding_window", *_CPU_SHAPE)


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        model: An alias of Forge's shelf.
        num_layers: Decoder layers to build.
        method: ``full`` (bfloat16 weights), ``lora`` (float32 adapters on a bfloat16 base) or ``qlora`` (nf4, double
            quantisation).
        checkpointing: Whether activations are recomputed.
        length: Tokens of a row.
        batch: Rows of a micro step.
        accumulation: Micro steps of an optimizer step.
        uneven: Every second row is shorter, so that batches are padded and attention takes a mask.
        more: Further settings of the run file, by section.
        is_deep: The model's whole depth.
    """

    model: str
    num_layers: int
    method: str
    checkpointing: bool
    length: int
    batch: int = 1
    accumulation: int = 1
    uneven: bool = False
    more: dict = field(default_factory=dict)
    is_deep: bool = False

    def __str__(self) -> str:
        words = [self.model, f"{self.num_layers} layers", self.method, "ckpt" if self.checkpointing else "no ckpt"]
        words += [f"{self.batch}x{self.length}"]
        words += ["padded"] if self.uneven else []
        words += [f"accumulation {self.accumulation}"] if self.accumulation > 1 else []
        for section, values in self.more.items():
            words += [values] if isinstance(values, str) else [f"{section}.{key}={one}" for key, one in values.items()]
        return " ".join(words)

    @property
    def is_for_cpu(self) -> bool:
        """Whether ``--cpu`` runs it: one model, and whatever is special."""
        is_special = self.more or self.uneven or self.accumulation > 1
        return not self.is_deep and self.length == 1024 and bool(is_special or self.model == "llama-3.1-8b")

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages that not every machine has."""
        needs_bits = self.method == "qlora" or "8bit" in self.more.get("training", {}).get("optim", "")
        return ("trl", "peft", *(("bitsandbytes",) if needs_bits else ()))


def list_cases() -> list[Case]:
    """Lists all cases: the whole grid for one model, its two corners for the others, and what is special."""
    grid = [
        Case(model, layers, method, checkpointing, length)
        for model, layers in LAYERS.items()
        for method in METHODS
        for checkpointing in (True, False)
        for length in (1024, 8192)
        if model == "llama-3.1-8b" or checkpointing == (length == 8192)
    ]
    paged = {"training": {"optim": "paged_adamw_8bit"}}
    half, average, pairs = {"freeze": {"first": "50%"}}, {"ema": {"decay": 0.99}}, {"method": "dpo"}
    special = [
        Case("llama-3.1-8b", 4, "lora", True, 1024, batch=4, uneven=True),
        Case("qwen3-4b", 6, "full", False, 1024, batch=2, uneven=True),
        Case("llama-3.1-8b", 4, "full", True, 1024, accumulation=2),
        Case("qwen3-4b", 6, "qlora", True, 1024, accumulation=2),
        Case("mistral-7b", 4, "full", True, 1024, more=paged),
        Case("mistral-7b", 4, "qlora", True, 1024, more=paged),
        Case("llama-3.1-8b", 4, "full", True, 1024, more={"training": {"optim": "adamw_bnb_8bit"}}),
        Case("qwen3-4b", 6, "lora", True, 1024, more=average),
        Case("llama-3.1-8b", 4, "full", True, 1024, more=average),
        Case("llama-3.1-8b", 8, "full", True, 1024, more=half),
        Case("mistral-7b", 8, "lora", False, 1024, more=half),
        Case("mistral-7b", 4, "lora", True, 1024, more={"data": {"packing": True}}),
        Case("qwen3-4b", 6, "lora", True, 1024, more=pairs),
        Case("qwen3-4b", 6, "full", True, 1024, more=pairs),
    ]
    deep = [
        Case("llama-3.1-8b", 32, "qlora", True, 8192, is_deep=True),
        Case("qwen3-4b", 36, "lora", False, 1024, batch=2, uneven=True, is_deep=True),
        Case("mistral-7b", 32, "full", True, 2048, is_deep=True),
    ]
    return [*grid, *special, *deep]


def write_settings(case: Case, folder: Path, on_cpu: bool) -> dict:
    """Writes a case's model folder (without weights) and returns its run file; its rows are written later."""
    (folder / "rows.jsonl").touch()
    model = folder / f"{case.model}-{case.num_layers}"
    if not model.exists():
        _write_model(model, case, on_cpu)
    settings: dict = {
        "name": "case",
        "output_dir": str(folder / "runs"),
        "model": {"name": str(model)},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": case.length // (CPU_RATIO if on_cpu else 1)},
        "training": {
            "max_steps": NUM_STEPS,
            "per_device_train_batch_size": case.batch,
            "gradient_accumulation_steps": case.accumulation,
            "activation_checkpointing": case.checkpointing,
            "precision": "fp32" if on_cpu else "bf16",
        },
        "logging": {"logging_steps": NUM_STEPS},
        "checkpoint": None,
        "report": None,
    }
    if case.method != "full":
        settings["lora"] = {"r": 16}
    elif not on_cpu:
        settings["model"]["dtype"] = "bfloat16"
    if case.method == "qlora":
        settings["quantization"] = {"bits": 4, "bnb_4bit_use_double_quant": True}
    for section, values in case.more.items():
        settings[section] = values if isinstance(values, str) else {**settings.get(section, {}), **values}
    if settings.get("method") == "dpo":
        settings["data"] |= {"format": "preference", "on_overlong": "truncate", "max_lost_ratio": 1.0}
    else:
        settings["data"]["format"] = "tokens"
    return settings


def _write_model(folder: Path, case: Case, on_cpu: bool) -> None:
    """Writes a configuration of real width and the embedded model's tokenizer, which is small."""
    shutil.copytree(assets_root() / "forge-tiny", folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    facts = find_model_facts(case.model)
    fields = {name: value for name in _COPIED if (value := getattr(facts, name)) is not None}
    if on_cpu:
        fields |= _CPU_SHAPE
        if facts.sliding_window:
            fields["sliding_window"] = facts.sliding_window // CPU_RATIO
    fields |= {"num_hidden_layers": case.num_layers, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(fields))


def write_rows(settings: dict, uneven: bool, tokenizer) -> None:
    """Writes rows of full length, pairs that are cut to it, or halves that fill a sequence together (packing)."""
    chance = random.Random(0)
    data, training = settings["data"], settings["training"]
    length, packed = data["max_length"], data.get("packing", False)
    count = NUM_STEPS * training["per_device_train_batch_size"] * training["gradient_accumulation_steps"]
    with open(data["train"], "w", encoding="utf-8") as stream:
        for number in range(count * (2 if packed else 1)):
            if data["format"] == "preference":
                row = _make_pair(chance, length, tokenizer)
            else:
                # Little shorter, as the estimate takes all rows at full length.
                size = length // 2 if packed else length - length // 16 if uneven and number % 2 else length
                row = {"input_ids": [*(chance.randrange(5, TOKENIZER_TOKENS) for _ in range(size - 1)), END_TOKEN]}
            stream.write(json.dumps(row) + "\n")


def _make_pair(chance: random.Random, length: int, tokenizer) -> dict[str, str]:
    """Makes a better answer that is longer than a row may be, and a worse one that is a little shorter."""
    texts = [" ".join(str(chance.randrange(1000)) for _ in range(length)) for _ in range(2)]
    worse = tokenizer.decode(tokenizer(texts[1])["input_ids"][: length - length // 16])
    return {"prompt": "Count.", "chosen": texts[0], "rejected": worse}
