"""Faults of whole files and of single lines, contradictions, and keys of other tools, written out by hand."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from valid_configs import REQUIRED, draw_settings, write_run_file

_END = "model: {name: forge-tiny}\ndata: {train: forge:quickstart/train, max_length: 128}\n"
_LEVELS = "abcdefghi"
_BOMB = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"{two}: &{two} [{', '.join([f'*{one}'] * 9)}]\n" for one, two in pairwise(_LEVELS)
)
_MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 22))
_STEPS = "".join("  " * depth + "a:\n" for depth in range(60))


class Case(NamedTuple):
    """A run file and what is wrong with it.

    Attributes:
        kind: The kind of fault; ``valid`` for none.
        text: The file.
        lines: Lines that may be blamed; empty when the fault has no line.
        meant: The name that was meant.
        overrides: Texts of ``--set``; the first is the fault when there are some.
    """

    kind: str
    text: bytes
    lines: tuple[int, ...] = ()
    meant: str = ""
    overrides: tuple[str, ...] = ()


# kind, file, lines that may be blamed (none: the file as a whole), the name that was meant
TEXTS: list[tuple[str, str | bytes, tuple[int, ...], str]] = [
    *[("empty file", one, (1,), "") for one in ("", "\n", "# only this\n", "---\n", "null\n", "   ", "\ufeff", "~\n")],
    *[("no settings at the top", one, (1,), "") for one in ("- a\n- b\n", "lr:1\n", "some words\n", "3\n", "[]\n")],
    ("several documents", f"{_END}---\nseed: 3\n", (3,), ""),
    ("missing", "{}\n", (), ""),
    ("missing", "data: {train: forge:quickstart/train, max_length: 128}\n", (), ""),
    ("missing", "seed: 3\nmodel: {name: org/model}\n", (), ""),
    ("missing", "model: {}\n" + _END.split("\n")[1], (1,), ""),
    ("missing", "seed: 1\nmodel:\n  dtype: auto\n" + _END.split("\n")[1], (2,), ""),
    ("missing", _END.split("\n")[0] + "\ndata: {max_length: 128}\n", (2,), ""),
    ("alias bomb", _BOMB + _END, (4, 5, 6), ""),
    ("alias bomb", _END + "output_dir: &o [*o]\n", (3,), ""),
    ("merge keys", _MERGES + _END, (2,), ""),
    ("nested too deep", _END + "name: " + "[" * 1000 + "]" * 1000 + "\n", (3,), ""),
    ("nested too deep", _END + "name: " + "{a: " * 1000 + "1" + "}" * 1000 + "\n", (3,), ""),
    ("nested too deep", _END + _STEPS + "  " * 60 + "a: 1\n", tuple(range(40, 46)), ""),
    ("too big", _END + "name: x\n" * 200_000, (), ""),
    ("too big", _END + "name: [" + "1, " * 20_000 + "1]\n", (3,), ""),
    ("bytes", _END.encode("utf-16"), (1,), ""),
    ("bytes", _END.encode("utf-16-be"), (1,), ""),
    ("bytes", b"\x89PNG\r\n\x1a\n" + bytes(64), (1,), ""),
    *[("version", f"{_END}version: {one}\n", (3,), "") for one in ("99", "0", "'1'", "true", "1.0", "null")],
    *[
        ("name of a preset", f"preset: {wrong}\n{_END}", (1,), right)
        for wrong, right in {
            "qlroa": "qlora", "loraa": "lora", "QLoRA": "qlora", "dpoo": "dpo", "memory-efficient": "memory_efficient",
            "rewrad": "reward", "simppo": "simpo", "../presets/lora": "", "''": "", "3": "", "[lora]": "",
            "lora.yaml": "lora", "nothing_like_it": "",
        }.items()
    ],
    *[
        ("name of a recipe", f"extends: {wrong}\n{_END}", (1,), right)
        for wrong, right in {"quikstart": "quickstart", "tiny-bsae": "tiny-base", "/etc/passwd": "", "{}": ""}.items()
    ],
    *[
        ("name of a file", f"{_END.split(chr(10))[0]}\ndata: {{train: {wrong}, max_length: 128}}\n", (2,), "")
        for wrong in ("forge:text/tarin", "data/no.jsonl", "''", "/dev/no.jsonl", "[]", "[{rows: 3}]", "[{pth: x}]")
    ],
]  # fmt: skip

# Keys as Axolotl, LLaMA-Factory, ms-swift, TRL, Unsloth and torchtune name them; "" where Forge has no such setting.
FOREIGN: dict[str, str] = {
    "base_model": "model.name", "model_name_or_path": "model.name",
    "micro_batch_size": "training.per_device_train_batch_size",
    "num_epochs": "training.num_train_epochs", "lr": "training.learning_rate", "training.lr": "training.learning_rate",
    "max_seq_length": "data.max_length", "cutoff_len": "data.max_length", "sequence_len": "data.max_length",
    "model.max_seq_length": "data.max_length", "sample_packing": "data.packing", "val_set_size": "data.eval_fraction",
    "lora_r": "lora.r", "lora.rank": "lora.r", "lora_alpha": "lora.lora_alpha", "lora.alpha": "lora.lora_alpha",
    "lora.dropout": "lora.lora_dropout", "lora_target_modules": "lora.target_modules",
    "load_in_4bit": "quantization.bits",
    "model.load_in_4bit": "quantization.bits", "torch_dtype": "model.dtype", "model.torch_dtype": "model.dtype",
    "optimizer": "training.optim", "training.optimizer": "training.optim", "training.bf16": "training.precision",
    "bf16": "training.precision", "gradient_checkpointing": "training.activation_checkpointing",
    "warmup_ratio": "training.warmup_steps", "training.warmup_ratio": "training.warmup_steps", "datasets": "data.train",
    "dataset": "data.train", "train_on_inputs": "data.train_on", "stage": "method", "rl": "method", "deepspeed": "",
    "finetuning_type": "", "training.fsdp": "", "trust_remote_code": "", "ema.beta": "ema.decay", "template": "",
    "training.seed": "seed", "lora.modules": "", "train_batch_size": "training.per_device_train_batch_size",
    "training.group_by_length": "training.train_sampling_strategy", "flash_attention": "model.attn_implementation",
}  # fmt: skip

_EVAL, _STEPS_100 = {"data.eval_rows": 3}, {"training.max_steps": 100}
# paths that may be blamed, and the settings beside the smallest run file
CONTRADICTIONS: list[tuple[str, dict]] = [
    ("quantization", {"quantization.bits": 4}),
    ("quantization lora", {"quantization": {}, "lora": None}),
    ("quantization.bnb_4bit_quant_type", {"lora": {}, "quantization": {"bits": 8, "bnb_4bit_quant_type": "fp4"}}),
    ("data.packing data.padding_free", {"data.packing": True, "data.padding_free": True}),
    ("data.eval_rows data.eval_fraction", {**_EVAL, "data.eval_fraction": 0.1}),
    ("data.eval data.train", {"data.eval": "forge:quickstart/train"}),
    ("data.max_length", {"data.max_length": 513}),
    ("data.streaming", {"data.streaming": True}),
    ("data.streaming data.packing", {"data.streaming": True, "data.packing": True, **_STEPS_100}),
    ("data.streaming data.eval_rows", {"data.streaming": True, **_EVAL, **_STEPS_100}),
    ("data.max_bad_ratio", {"data.max_bad_ratio": 0.5}),
    ("data.max_lost_ratio", {"data.max_lost_ratio": 0.5}),
    ("data.train_on", {"data.train_on": "all", "data.format": "text"}),
    ("evaluation.eval_steps", {"evaluation.eval_steps": 5}),
    ("report.exact_match", {"report.exact_match": True}),
    ("report.samples", {"report.samples": 2}),
    ("report.max_new_tokens", {"report.max_new_tokens": 9}),
    ("training.num_train_epochs", {"training.num_train_epochs": 2, **_STEPS_100}),
    ("training.warmup_steps", {"training.warmup_steps": 3, "training.lr_scheduler_type": "constant"}),
    ("training.warmup_steps", {"training.warmup_steps": 1.5}),
    ("training.warmup_steps training.max_steps", {"training.warmup_steps": 100, **_STEPS_100}),
    ("logging.logging_steps training.max_steps", {"logging.logging_steps": 101, **_STEPS_100}),
    ("checkpoint.save_steps", {"checkpoint.save_steps": 0}),
    ("evaluation.eval_steps", {"evaluation.eval_steps": -1, **_EVAL}),
    ("ema.update_after_step training.max_steps", {"ema.update_after_step": 100, **_STEPS_100}),
    ("monitor.spike_ratio", {"monitor.spike_ratio": 2, "training.max_steps": 20}),
    ("freeze", {"freeze": {}}),
    ("freeze.first", {"freeze.first": 8}),
    ("freeze.first", {"freeze.first": 0}),
    ("freeze.first", {"freeze.first": "100%"}),
    ("freeze.embeddings", {"freeze.embeddings": True, "lora": {}}),
    ("lora.target_modules", {"lora.target_modules": []}),
    ("lora.target_modules", {"lora.target_modules": ["lm_head"]}),
    ("lora.init_lora_weights lora.r", {"lora.init_lora_weights": "orthogonal", "lora.r": 3}),
    ("model.dtype training.precision", {"model.dtype": "bfloat16", "training.precision": "fp32"}),
    ("model.revision", {"model.revision": "main"}),
    ("preference.beta", {"preference.beta": 0.2}),
    ("preference.loss_type method", {"method": "kto", "preference.loss_type": "sigmoid"}),
    ("preference.desirable_weight", {"method": "dpo", "preference.desirable_weight": 2}),
    ("data.packing method", {"method": "dpo", "data.packing": True}),
    ("lora.lora_dropout", {"method": "dpo", "lora.lora_dropout": 0.1}),
    ("training.per_device_train_batch_size method", {"method": "kto", "training.per_device_train_batch_size": 1}),
    ("preference.reference", {"method": "dpo", "preference.reference": "adapter"}),
    ("model.adapter", {"model.adapter": "nowhere"}),
]  # fmt: skip


def spoil_layout(dice: random.Random) -> Iterator[Case]:
    """Spoils single lines: doubled keys, tabs, indentation, quotes, brackets, tags, bytes, colons."""
    for _ in range(25):
        spec = {**draw_settings(dice), "seed": 1}
        spec["data"] = {**spec.get("data", {}), "train": "forge:text/train", "max_length": 64, "on_bad_row": "skip"}
        spec = {key: value for key, value in spec.items() if value != {}}
        written = write_run_file(spec, dice, block=True)
        rows = written.text.split("\n")
        inner = {key: line for key, line in written.lines.items() if len(key) == 2 and isinstance(spec[key[0]], dict)}
        path, line = dice.choice(sorted(inner.items()))
        row, key = rows[line - 1], path[1]
        # A second or later line of a section: the first one decides the indentation.
        late = dice.choice([one for one in inner.values() if rows[one - 2].startswith("  ")])

        def edit(kind: str, at: int, *texts: str, rows: list[str] = rows, more: tuple[int, ...] = ()) -> Case:
            new = [*rows[: at - 1], *texts, *rows[at:]]
            return Case(kind, "\n".join(new).encode("utf-8", "surrogateescape"), more or (at,))

        yield edit("key twice", line, row, row, more=(line + 1,))
        yield edit("tab", line, row.replace("  ", "\t", 1))
        yield edit("tab", line, row.replace("  ", "  \t", 1))
        yield edit("indented too deep", late, "   " + rows[late - 1])
        yield edit("indented too little", late, rows[late - 1][1:])
        for mark in "'\"":
            yield edit("quote left open", line, f"  {key}: {mark}some words")
        yield edit("bracket left open", line, f"  {key}: [a, b")
        yield edit("bracket left open", line, f"  {key}: {{a: 1")
        # A section that holds one word may be blamed where it begins.
        either = (line, line - 1) if len(spec[path[0]]) == 1 else (line,)
        yield edit("no colon", line, f"  {key}", more=either)
        yield edit("no blank after the colon", line, f"  {key}:1", more=either)
        yield edit("two colons", line, f"  {key}: C: x")
        for tag in (
            "!!python/object/apply:os.system ['touch hacked']",
            "!foo x",
            "!!str x",
            "!!binary aGk=",
            "!!set {a}",
        ):
            yield edit("tag", line, f"  {key}: {tag}")
        yield edit("bytes", line, row + "\udcff")
        yield edit("bytes", line, row + dice.choice(["\x1b[31m", "\0", "\x07"]))
        yield edit("reserved character", line, f"  {key}: {dice.choice('@%`')}x")
        yield edit("value missing", line, f"  {key}:")
        yield edit("alias of nothing", line, f"  {key}: *nothing")
        yield edit(
            "word that readers differ on", line, f"  {key}: {dice.choice(['yes', 'off', 'No', '010', '9' * 5000])}"
        )


def spoil_whole_files(_: random.Random) -> Iterator[Case]:
    """Files that are empty, no mapping, too deep or too big, and overrides and names that lead nowhere."""
    for kind, text, lines, meant in TEXTS:
        yield Case(kind, text if isinstance(text, bytes) else text.encode(), lines, meant)
    base = write_run_file(REQUIRED, random.Random(0), block=True).text.encode()
    wrong = "lora.r|=3|lora.rr=8|training.learning_rate=abc|training.lr=1e-3|lora.r=[|data.max_length=yes|training=3|=|"
    wrong += (
        "lora..r=3|.=3|a.b.c.d=1|lora.r.x=3|model=null|seed=-1|lora.r=0|lora.r=!!int 3|lora.r=*a|preset=qlroa|seed="
    )
    for text in wrong.split("|"):
        yield Case("bad --set", base, (), "", (text,))
