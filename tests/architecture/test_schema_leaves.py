"""No decoration: changing any leaf of the schema changes what the libraries, or Forge's own parts, are handed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import get_args

import pytest
import torch
from pydantic import BaseModel

from forge_cli.schema.runspec import RunSpec

ROWS = [
    {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": "one two " * n}] * 2}
    for n in range(1, 7)
]

# A run in which every leaf can take effect. What another base needs stands beside the leaf below.
BASE: dict[str, object] = {
    "model": {"name": "forge-tiny"},
    "data": {
        "train": "rows.jsonl",
        "eval": "eval.jsonl",
        "max_length": 64,
        "on_overlong": "drop",
        "max_lost_ratio": 1.0,
    },
    "lora": {"r": 4},
    "freeze": {"first": 2},
    "ema": {},
    "quantization": {},
    "report": {"samples": 1},
}
FULL = {"lora": None, "quantization": None}
DPO = {"method": "dpo", "data.train": "pairs.jsonl", "data.eval": None, "freeze": None}
KTO, CPO, REWARD = ({**DPO, "method": method} for method in ("kto", "cpo", "reward"))
# The adapter has to be one of these settings.
ADAPTER = {"model.adapter": "adapter", "lora.target_modules": ["q_proj"], "freeze": None}

# leaf: (another value, changes of the base it needs)
VARIANTS: dict[str, tuple[object, dict]] = {
    "name": ("other", {}),
    "output_dir": ("elsewhere", {}),
    "seed": (7, {}),
    "model.name": ("org/other", {}),
    "model.chat_template": ("other.jinja", {}),
    "model.adapter": ("adapter", {"lora.target_modules": ["q_proj"], "freeze": None}),
    "model.revision": ("v2", {"model.name": "org/other"}),
    "model.dtype": ("bfloat16", {}),
    "model.attn_implementation": ("eager", {}),
    "quantization.bits": (8, {}),
    "quantization.bnb_4bit_quant_type": ("fp4", {}),
    "quantization.bnb_4bit_use_double_quant": (False, {}),
    "quantization.bnb_4bit_compute_dtype": ("bfloat16", {}),
    "quantization.bnb_4bit_quant_storage": ("bfloat16", {}),
    "data.train": ("eval.jsonl", {}),
    "data.eval": ("rows.jsonl", {}),
    "data.eval_fraction": (0.5, {"data.eval": None}),
    "data.eval_rows": (2, {"data.eval": None}),
    "data.format": ("text", {}),
    "data.on_bad_row": ("skip", {"data.train": "some_bad.jsonl", "data.max_bad_ratio": 0.5}),
    "data.max_bad_ratio": (0.5, {"data.train": "some_bad.jsonl", "data.on_bad_row": "skip"}),
    "data.max_lost_ratio": (0.0, {"data.max_length": 48}),
    "data.padding_free": (True, {}),
    "data.streaming": (True, {"data.eval": None, "data.on_overlong": "truncate"}),
    "data.max_length": (32, {}),
    "data.on_overlong": ("truncate", {"data.max_length": 32}),
    "data.packing": (True, {}),
    "data.train_on": ("all", {}),
    "lora.r": (8, {}),
    "lora.lora_alpha": (8, {}),
    "lora.lora_dropout": (0.1, {}),
    "lora.target_modules": (["q_proj"], {}),
    "lora.modules_to_save": (["lm_head"], {}),
    "lora.use_rslora": (True, {}),
    "lora.use_dora": (True, {}),
    "lora.init_lora_weights": ("gaussian", {}),
    "freeze.first": (4, {}),
    "freeze.embeddings": (False, FULL),
    "freeze.patterns": (["*.layers.7.*"], {}),
    "preference.loss_type": ("ipo", DPO),
    "preference.loss_weights": ([1.0, 0.5], {**DPO, "preference.loss_type": ["sigmoid", "ipo"]}),
    "preference.beta": (0.3, DPO),
    "preference.label_smoothing": (0.1, DPO),
    "preference.reference": ("base", {**DPO, **ADAPTER}),
    "preference.precompute_ref_log_probs": (True, {**DPO, **FULL}),
    "preference.desirable_weight": (1.5, KTO),
    "preference.undesirable_weight": (1.5, KTO),
    "preference.cpo_alpha": (0.5, CPO),
    "preference.simpo_gamma": (1.0, {**CPO, "preference.loss_type": "simpo"}),
    "preference.center_rewards_coefficient": (0.01, REWARD),
    "ema.decay": (0.9, {}),
    "ema.decay_warmup": (False, {}),
    "ema.update_after_step": (5, {}),
    "ema.update_every": (2, {}),
    "ema.device": ("cpu", {}),
    "monitor.gradients": (False, {}),
    "monitor.spike_ratio": (2.0, {}),
    "monitor.spike_window": (9, {}),
    "monitor.on_spike": ("skip", {}),
    "training.learning_rate": (1e-3, {}),
    "training.num_train_epochs": (1, {}),
    "training.max_steps": (9, {}),
    "training.per_device_train_batch_size": (2, {}),
    "training.gradient_accumulation_steps": (2, {}),
    "training.optim": ("adamw_torch", {}),
    "training.lr_scheduler_type": ("linear", {}),
    "training.warmup_steps": (3, {}),
    "training.train_sampling_strategy": ("group_by_length", {}),
    "training.weight_decay": (0.1, {}),
    "training.max_grad_norm": (0.5, {}),
    "training.activation_checkpointing": (False, {}),
    "training.precision": ("fp32", {}),
    "evaluation.eval_steps": (5, {}),
    "evaluation.per_device_eval_batch_size": (3, {}),
    "checkpoint.save_steps": (5, {}),
    "checkpoint.save_total_limit": (5, {}),
    "logging.logging_steps": (3, {}),
    "logging.report_to": (["tensorboard"], {}),
    "report.samples": (2, {}),
    "report.exact_match": (True, {}),
    "report.max_new_tokens": (9, {}),
    "report.prompts": (["Hello"], {}),
}
# They choose layers or mark the language; what they do is tested in tests/unit/resolve.
CHOOSERS = {"version", "preset", "extends", "method"}


def list_leaves(section: type[BaseModel] = RunSpec, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        kinds = [k for k in (field.annotation, *get_args(field.annotation)) if isinstance(k, type)]
        inner = next((k for k in kinds if issubclass(k, BaseModel)), None)
        if inner:
            yield from list_leaves(inner, f"{prefix}{name}.")
        else:
            yield prefix + name


def build_spec(changes: dict[str, object]) -> RunSpec:
    values = json.loads(json.dumps(BASE))
    for path, value in changes.items():
        section, _, leaf = path.rpartition(".")
        (values.setdefault(section, {}) if section else values)[leaf] = value
    return RunSpec.model_validate(values)


def plain(value: object) -> object:
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def is_nameless(value: object) -> bool:
    """Tells whether the text of a value is an address, which differs every time."""
    return " at 0x" in str(value)


def test_every_leaf_has_a_variant():
    leaves = set(list_leaves())
    assert len(leaves) > 60
    assert leaves - CHOOSERS == set(VARIANTS)


@pytest.mark.parametrize("leaf", VARIANTS)
def test_a_leaf_changes_what_is_handed_over(leaf, tmp_path, monkeypatch, load_tiny):
    write_rows(tmp_path, monkeypatch)
    value, needs = VARIANTS[leaf]
    if leaf == "model.adapter" or "model.adapter" in needs:
        save_adapter(load_tiny)
    handed = [hand_over(build_spec(changes), load_tiny, monkeypatch) for changes in (needs, {**needs, leaf: value})]
    assert handed[0] != handed[1], f"{leaf} is read by nothing"


def test_the_same_file_hands_over_the_same(tmp_path, monkeypatch, load_tiny):
    """Without this, noise would pass for an effect."""
    write_rows(tmp_path, monkeypatch)
    assert hand_over(build_spec({}), load_tiny, monkeypatch) == hand_over(build_spec({}), load_tiny, monkeypatch)


def save_adapter(load_tiny) -> None:
    """Saves an adapter that a run with ``ADAPTER`` may go on with."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(load_tiny(), config).save_pretrained("adapter")


def write_rows(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    Path("eval.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS[:2]))
    pairs = [{"prompt": f"{n}:", "chosen": " yes", "rejected": " no"} for n in range(6)]
    Path("pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    Path("some_bad.jsonl").write_text("\n".join([*(json.dumps(row) for row in ROWS), "{"]))
    Path("other.jinja").write_text(
        "{% for m in messages %}{{ m.role }}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant<|im_start|>{% endif %}"
    )


def hand_over(spec: RunSpec, load_tiny, monkeypatch) -> object:
    """Collects everything that leaves Forge's hands on the way to a run, by calling the same builders."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from forge_cli.backend.methods import build_training_args
    from forge_cli.build import model as model_room
    from forge_cli.build.adapter import prepare_trainable
    from forge_cli.build.callbacks import build_ema, build_monitor
    from forge_cli.build.compute import choose_compute
    from forge_cli.build.reference import prepare_reference
    from forge_cli.build.tokenizer import load_tokenizer
    from forge_cli.run.answers import Examination
    from forge_cli.run.folder import create_run_folder

    compute = choose_compute(spec)
    args = build_training_args(
        spec, output_dir=Path("out"), compute_dtype=torch.float32, device="cpu", has_eval=spec.data.eval is not None
    ).to_dict()
    handed: dict[str, object] = {"args": {k: v for k, v in args.items() if k != "logging_dir"}, "compute": str(compute)}

    loads: list[tuple] = []
    tiny = load_tiny()

    def load(place, **options):
        loads.append((place, {k: str(v) for k, v in options.items()}))
        return tiny

    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", load)
        patch.setattr(AutoModelForSequenceClassification, "from_pretrained", load)
        model = model_room.load_model(spec, compute)
        reference = prepare_reference(spec, compute)
    handed["loads"], handed["reference"] = loads, reference and reference.text
    # The second model is the same object here, and frozen by now.
    model.requires_grad_(True)

    model, trainable = prepare_trainable(model, spec)
    trained = {name: p.detach().double().sum().item() for name, p in model.named_parameters() if p.requires_grad}
    config = model.peft_config["default"].to_dict() if spec.lora else None
    handed["trained"] = (trained, trainable.freeze and trainable.freeze.prefix_without_grad, config)

    for part in (build_ema(spec), build_monitor(spec)):
        handed[type(part).__name__] = [(k, str(v)) for k, v in vars(part).items() if not is_nameless(v)]
    guard = vars(build_monitor(spec).guard)
    handed["guard"] = [(k, str(v), getattr(v, "maxlen", None)) for k, v in guard.items()]
    handed["data"] = hand_over_data(spec)
    questions = handed["data"][-1] if isinstance(handed["data"][-1], tuple) else ()
    if spec.report and questions:
        examination = Examination(spec.report, questions, load_tokenizer(build_spec({})), torch.float32)
        asked = []
        with monkeypatch.context() as patch:
            patch.setattr("forge_cli.run.answers.generate_answers", lambda *given: asked.append(given[2:]) or [])
            examination.answer(model)
        answers = ["no answer"] * len(examination.entries)
        handed["asked"] = (asked, examination.exact_match_ratio(answers))
    folder = create_run_folder(spec.output_dir, spec.name, "stem", "", overwrite=True).path
    handed["folder"] = str(folder)
    shutil.rmtree(folder)
    return plain(handed)


def hand_over_data(spec: RunSpec) -> tuple:
    """Returns the rows that are trained and evaluated, or why there are none."""
    from forge_cli.build.data import prepare_data
    from forge_cli.build.tokenizer import load_tokenizer
    from forge_cli.errors import DataError

    named = {**spec.model.model_dump(), "name": "forge-tiny"}
    try:
        data = prepare_data(spec, load_tokenizer(spec.model_copy(update={"model": type(spec.model)(**named)})))
    except DataError as error:
        return (str(error),)
    if spec.data.streaming:
        return ([type(data.train).__name__, *islice(data.train, 20)], ())
    return (data.train.to_dict(), data.train[:], data.eval.to_dict() if data.eval else None, data.questions)


@pytest.mark.parametrize(
    ("name", "value"), [("path", "eval.jsonl"), ("rows", 3), ("weight", 2.0), ("columns", {"messages": "other"})]
)
def test_every_key_of_a_source_changes_the_rows(name, value, tmp_path, monkeypatch):
    write_rows(tmp_path, monkeypatch)
    other = [json.dumps({**row, "other": row["messages"][:2]}) for row in ROWS]
    Path("rows.jsonl").write_text("\n".join(other))
    sources = [{"path": "rows.jsonl"}, {"path": "rows.jsonl", name: value}]
    handed = [hand_over_data(build_spec({"data.train": source})) for source in sources]
    assert handed[0] != handed[1]
