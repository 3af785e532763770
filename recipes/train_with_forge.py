"""The whole job in Python, with plain transformers and PEFT and Forge's parts.

preset -> 4-bit model -> LoRA -> freeze half the layers -> model info -> tokenise -> EMA and monitor -> train
-> apply EMA -> save. It runs on the embedded model on a laptop; give --model and --data for your own.

    python recipes/train_with_forge.py --output runs/train_with_forge
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from datasets import Dataset
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer

from forge_cli import (
    EMACallback,
    MonitorCallback,
    estimate_model_memory,
    get_memory_savings_estimate,
    get_preset,
    print_model_info,
    setup_lp_lora_style,
)
from forge_cli.build.model import keep_4bit_exact
from forge_cli.parts.rendering import render_messages
from forge_cli.paths import assets_root

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(assets_root() / "forge-tiny"), help="hub name or local folder")
parser.add_argument("--data", default=str(assets_root() / "quickstart"), help="folder with train and heldout .jsonl")
parser.add_argument("--output", default="runs/train_with_forge", help="folder to write")
parser.add_argument("--max-steps", type=int, default=60, help="optimizer steps")
options = parser.parse_args()

# 1. A preset, with some values changed.
preset = get_preset("qlora", lora_r=32, lora_alpha=64, learning_rate=2e-3, max_steps=options.max_steps)
preset.print_info()
training_args = preset.get_training_args()
training_args.output_dir = options.output
training_args.logging_steps = 10

# 2. The model in 4 bits, on this machine's device.
tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(
    options.model,
    quantization_config=preset.get_bnb_config(),
    device_map={"": training_args.device},
    use_safetensors=True,
)
keep_4bit_exact(model)

# 3. Adapters, then frozen layers: the other way round, adapters would land on all layers.
model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
model = get_peft_model(model, preset.get_lora_config())
print(setup_lp_lora_style(model, freeze_ratio=0.5).layer_map())
print_model_info(model, show_breakdown=True)
memory = estimate_model_memory(model, batch_size=4, sequence_length=2048)
savings = get_memory_savings_estimate(model)
print(f"estimated total: {memory['total_estimated_gb']:.3f} GiB")
print(f"gradient memory saved: {savings['gradient_saved_gb'] * 1024:.3f} MiB")


# 4. Token ids with labels: only what the assistant says is trained, its end token included.
def tokenize(row: dict) -> dict:
    tokens = render_messages(tokenizer, row["messages"], train_on="assistant")
    return {"input_ids": tokens.input_ids, "labels": tokens.labels}


def load(split: str) -> Dataset:
    lines = (Path(options.data) / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return Dataset.from_list([tokenize(json.loads(line)) for line in lines])


# 5. Callbacks, trainer, training.
ema_callback = EMACallback(decay=0.99)
monitor_callback = MonitorCallback(check_gradients=True)
trainer = Trainer(
    model=model,
    args=training_args,
    train_dataset=load("train"),
    eval_dataset=load("heldout"),
    processing_class=tokenizer,
    data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
    callbacks=[ema_callback, monitor_callback],
)
before = trainer.evaluate()["eval_loss"]
trainer.train()
raw = trainer.evaluate()["eval_loss"]

# 6. The averaged weights, and both on disk.
ema_callback.apply_ema(model)
averaged = trainer.evaluate()["eval_loss"]
model.save_pretrained(f"{options.output}/final_model")
tokenizer.save_pretrained(f"{options.output}/final_model")
ema_callback.restore_original(model)
model.save_pretrained(f"{options.output}/raw_model")
print(
    f"held-out loss: {before:.4f} before, {raw:.4f} raw, {averaged:.4f} with EMA; {len(monitor_callback.alarms)} alarms"
)
print(f"the EMA adapter is in {options.output}/final_model")
