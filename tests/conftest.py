"""Fixtures that every test may use: the embedded model, loaded for real."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

# Before anything imports torch: no network, no telemetry.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
# A job in the background begins with Ctrl-C ignored, and so would all that the tests start and press it for.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Tokens that are kept from one test to the next, but never from one session to the next.
os.environ["FORGE_CACHE"] = tempfile.mkdtemp(prefix="forge-cache-")
atexit.register(shutil.rmtree, os.environ["FORGE_CACHE"], ignore_errors=True)

TINY = Path(__file__).parent.parent / "forge_cli" / "assets" / "forge-tiny"


@pytest.fixture
def tiny_settings(tmp_path: Path) -> Callable[..., dict]:
    """Settings of a three-step run of the embedded model; keyword arguments replace whole sections or merge."""

    def settings(**changes: object) -> dict:
        base: dict[str, object] = {
            "model": {"name": "forge-tiny"},
            "data": {"train": "forge:quickstart/train", "max_length": 128},
            "training": {
                "learning_rate": 1e-3,
                "max_steps": 3,
                "per_device_train_batch_size": 2,
                "gradient_accumulation_steps": 2,
            },
            "logging": {"logging_steps": 1},
            "checkpoint": None,
            "report": None,
            "output_dir": str(tmp_path / "runs"),
        }
        for section, value in changes.items():
            present = base.get(section)
            merge = isinstance(present, dict) and isinstance(value, dict)
            base[section] = {**present, **value} if merge else value
        return base

    return settings


@pytest.fixture
def load_tiny() -> Callable:
    """Loads a fresh embedded model in float32, or in 4 bits."""

    def load(four_bit: bool = False):
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        options = {"dtype": torch.float32, "attn_implementation": "sdpa"}
        if four_bit:
            options["device_map"] = {"": "cpu"}
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            )
        model = AutoModelForCausalLM.from_pretrained(TINY, **options)
        model.config.use_cache = False
        return model

    return load


@pytest.fixture
def tiny_batch() -> dict:
    """A batch of random tokens with labels. Shapes: ``[2, 24]``."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 500, (2, 24), generator=generator)
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
