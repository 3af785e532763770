"""The guide's script, as shipped, with a 4-bit model; what it leaves is loaded by plain PEFT."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from forge_cli import estimate_model_memory, get_memory_savings_estimate, get_preset, print_model_info
from forge_cli.errors import ConfigError
from forge_cli.parts.freeze import setup_lp_lora_style
from forge_cli.parts.layers import find_linear_names

ROOT = Path(__file__).parents[2]


def test_the_script_ends_with_an_ema_adapter_that_plain_peft_loads(tmp_path, load_tiny, tiny_batch):
    command = [sys.executable, str(ROOT / "recipes/train_with_forge.py"), "--output", str(tmp_path), "--max-steps", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 of 8 layers frozen" in done.stdout and "0 alarms" in done.stdout

    from peft import PeftModel

    base = load_tiny()
    with torch.no_grad():
        plain = base(input_ids=tiny_batch["input_ids"]).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "final_model")(input_ids=tiny_batch["input_ids"]).logits
    assert (plain - adapted).abs().max() > 0.01
    averaged, raw = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("final_model", "raw_model"))
    assert averaged.keys() == raw.keys()
    trained = [n for n in raw if "lora_B" in n and any(f"layers.{i}." in n for i in range(4, 8))]
    assert all(not torch.equal(averaged[n], raw[n]) for n in trained) and len(trained) == 28
    frozen = [n for n in raw if "lora_B" in n and n not in trained]
    assert all(not raw[n].any() for n in frozen) and len(frozen) == 28


def test_import_forge_cli_imports_no_torch():
    code = "import sys, forge_cli; dir(forge_cli); assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_get_preset_takes_the_guides_values(capsys):
    preset = get_preset("qlora", lora_r=32, lora_alpha=64, learning_rate=2e-4, num_train_epochs=3)
    lora, quantization, args = preset.get_lora_config(), preset.get_bnb_config(), preset.get_training_args()
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (32, 64, "all-linear")
    assert quantization.bnb_4bit_quant_type == "nf4" and quantization.bnb_4bit_use_double_quant
    assert (args.learning_rate, args.num_train_epochs, args.lr_scheduler_type) == (2e-4, 3, "cosine")
    assert args.logging_nan_inf_filter is False
    preset.print_info()
    assert "lora_alpha" in capsys.readouterr().out


def test_get_preset_refuses_what_it_does_not_know():
    with pytest.raises(ConfigError, match=r"did you mean training\.learning_rate"):
        get_preset("lora", learning_rat=1)
    with pytest.raises(ConfigError, match="qlora"):
        get_preset("qlorra")
    with pytest.raises(ConfigError, match=r"training\.learning_rate"):
        get_preset("lora", learning_rate="fast")
    with pytest.raises(ConfigError, match="no adapters"):
        get_preset("sft").get_lora_config()
    assert get_preset("lora").get_bnb_config() is None


def test_memory_figures_of_a_live_model_by_hand(load_tiny, capsys):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load_tiny(), LoraConfig(r=8, target_modules=find_linear_names(load_tiny())))
    adapters = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert get_memory_savings_estimate(model)["gradient_saved_gb"] == 0
    whole = estimate_model_memory(model, batch_size=4, sequence_length=256)
    setup_lp_lora_style(model, freeze_ratio=0.5)
    savings = get_memory_savings_estimate(model, batch_size=4, sequence_length=256)
    half = estimate_model_memory(model, batch_size=4, sequence_length=256)
    # Half the float32 adapters: 4 bytes of gradient and 8 of Adam each.
    assert savings["gradient_saved_gb"] == pytest.approx(adapters / 2 * 4 / 2**30)
    assert savings["optimizer_saved_gb"] == pytest.approx(adapters / 2 * 8 / 2**30)
    assert savings["activation_saved_gb"] > 0
    assert savings["total_saved_gb"] == pytest.approx(sum(v for k, v in savings.items() if k != "total_saved_gb"))
    assert half["total_estimated_gb"] < whole["total_estimated_gb"]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert whole["weights_gb"] == pytest.approx(weights / 2**30)
    print_model_info(model, show_breakdown=True)
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM, 8 layers" in printed and "frozen first 4 of 8 layers" in printed and "layer 7" in printed
