"""Fixtures of runs that learn from preferences."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from preference_pairs import LORA, PAIRS, TARGETS, load_base
from transformers import set_seed

from forge_cli.backend import methods


@pytest.fixture
def pair_settings(tiny_settings, tmp_path, monkeypatch):
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))

    def settings(method: str = "dpo", **changes) -> dict:
        return tiny_settings(**{"method": method, "data": PAIRS, "lora": LORA, **changes})

    return settings


@pytest.fixture
def trainers(monkeypatch) -> list:
    """Receives the trainer of every run."""
    built: list = []
    build = methods.build_trainer
    monkeypatch.setattr(methods, "build_trainer", lambda *a, **parts: built.append(build(*a, **parts)) or built[-1])
    return built


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter whose log probabilities are unlike the base's, saved by PEFT alone."""
    set_seed(3)
    model = get_peft_model(load_base(), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder
