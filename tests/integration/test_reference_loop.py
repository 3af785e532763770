"""`forge train` against a training loop written by hand, on the same batches."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, set_seed

from forge_cli.backend import sft
from forge_cli.backend.sft import build_trainer, build_training_args
from forge_cli.build.callbacks import build_monitor
from forge_cli.build.data import prepare_data
from forge_cli.build.model import keep_4bit_exact
from forge_cli.build.tokenizer import load_tokenizer
from forge_cli.resolve.plan import resolve_mapping
from forge_cli.run.execute import train_plan
from forge_cli.run.reporter import QuietReporter

STEPS, LEARNING_RATE, SEED = 5, 1e-3, 42
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = {
    "sft": {"training": {"weight_decay": 0.01}},
    "lora": {"lora": {"r": 8, "lora_alpha": 16}},
    "qlora": {"lora": {"r": 8, "lora_alpha": 16}, "quantization": {"bits": 4}},
    "frozen": {"lora": {"r": 8, "lora_alpha": 16}, "freeze": {"first": "50%"}},
}
WEIGHT_DECAY = {"sft": 0.01}


def build_model_by_hand(method: str, load_tiny):
    model = load_tiny(four_bit=method == "qlora")
    keep_4bit_exact(model)
    if method == "sft":
        return model
    set_seed(SEED)
    layers = range(4, 8) if method == "frozen" else range(8)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, layers_to_transform=list(layers))
    return get_peft_model(model, config)


def list_batches(plan, tmp_path) -> list[dict]:
    """Takes the batches from a second trainer of the same plan; their order is a function of the seed."""
    tokenizer = load_tokenizer(plan.spec)
    args = build_training_args(
        plan.spec, output_dir=tmp_path, compute_dtype=torch.float32, device="cpu", has_eval=False
    )
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "base"))
    trainer = build_trainer(
        model=model,
        tokenizer=tokenizer,
        args=args,
        train_dataset=prepare_data(plan.spec, tokenizer).train,
        eval_dataset=None,
        monitor=build_monitor(plan.spec),
    )
    return list(trainer.get_train_dataloader())


def learning_rate(step: int) -> float:
    """Cosine to zero over the run, after a warm-up of 3 % of 5 steps, rounded up: one step."""
    warmup = math.ceil(0.03 * STEPS)
    if step < warmup:
        return LEARNING_RATE * step / warmup
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))


def train_by_hand(model, batches: list[dict], weight_decay: float) -> tuple[list[float], list[float]]:
    """Trains and returns the loss of every step and the norm of its gradient before clipping."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0)
    # transformers spares norms from weight decay; the embedding is a matrix and decays.
    decayed = {id(p) for name, p in model.named_parameters() if p.requires_grad and "norm" not in name}
    model.train()
    losses, norms = [], []
    for step in range(STEPS):
        micro = batches[2 * step : 2 * step + 2]
        total = sum((batch["labels"][:, 1:] != -100).sum().item() for batch in micro)
        step_loss = 0.0
        for batch in micro:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            flat = logits[:, :-1].flatten(0, 1).float()
            loss = torch.nn.functional.cross_entropy(flat, batch["labels"][:, 1:].flatten(), reduction="sum") / total
            loss.backward()
            step_loss += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 0.4).item())
        rate = learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.no_grad():
            for p in parameters:
                if id(p) in decayed:
                    p.mul_(1 - rate * weight_decay)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step_loss)
    return losses, norms


@pytest.mark.parametrize("method", METHODS)
def test_losses_and_saved_weights_equal_a_loop_by_hand(
    method, tiny_settings, load_tiny, tiny_batch, tmp_path, monkeypatch
):
    changes = dict(METHODS[method])
    training = {"max_steps": STEPS, "learning_rate": LEARNING_RATE, "max_grad_norm": 0.4, **changes.pop("training", {})}
    plan = resolve_mapping(tiny_settings(training=training, monitor={"gradients": True}, **changes))
    load_tiny().save_pretrained(tmp_path / "base")
    batches = list_batches(plan, tmp_path)

    trainers = []
    monkeypatch.setattr(sft, "build_trainer", lambda **parts: trainers.append(build_trainer(**parts)) or trainers[0])
    result = train_plan(plan, reporter=QuietReporter())
    records = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records]

    model = build_model_by_hand(method, load_tiny)
    expected, norms = train_by_hand(model, batches, WEIGHT_DECAY.get(method, 0.0))
    assert losses == pytest.approx(expected, abs=1e-5)
    assert losses[-1] < losses[0]
    assert [r["grad_norm"] for r in records] == pytest.approx(norms, rel=1e-4)
    assert max(norms) > 0.4, "the clipping has to matter"
    assert [r["learning_rate"] for r in records] == pytest.approx([learning_rate(step) for step in range(STEPS)])

    saved = load_saved(method, result.weights, load_tiny)
    with torch.no_grad():
        in_memory, reloaded, by_hand = (
            m.eval()(input_ids=tiny_batch["input_ids"]).logits for m in (trainers[0].model, saved, model)
        )
    assert torch.allclose(in_memory, reloaded, atol=1e-5), (in_memory - reloaded).abs().max()
    # Adam divides a gradient by its own size: rounding in a gradient near zero becomes a step of full length.
    assert torch.allclose(by_hand, reloaded, atol=2e-2), (by_hand - reloaded).abs().max()


def load_saved(method: str, folder, load_tiny):
    """Loads what was saved with nothing but transformers and PEFT."""
    if method == "sft":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base = load_tiny(four_bit=method == "qlora")
    keep_4bit_exact(base)
    return PeftModel.from_pretrained(base, folder)
