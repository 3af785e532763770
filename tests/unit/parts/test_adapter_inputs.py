"""Leaving out PEFT's casts changes no number, and keeps less."""

from __future__ import annotations

import copy

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from forge_cli.parts.adapter_inputs import leave_inputs_to_autocast

SHAPE = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}


def make_model(**options) -> torch.nn.Module:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=128, **SHAPE)).to(torch.bfloat16)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, **options)
    model = get_peft_model(base, config)
    assert next(p for n, p in model.named_parameters() if "lora_A" in n).dtype is torch.float32
    return model


def run_step(model: torch.nn.Module, *, autocast: bool) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    """Returns loss, gradients and the bytes that autograd keeps."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.arange(96).reshape(2, 48) % 128
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", torch.bfloat16, autocast):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.requires_grad], sum(kept.values())


def test_loss_and_gradients_are_the_same_to_the_bit_and_less_is_kept():
    plain = make_model()
    changed = copy.deepcopy(plain)
    assert leave_inputs_to_autocast(changed) == 6
    loss, gradients, kept = run_step(plain, autocast=True)
    new_loss, new_gradients, new_kept = run_step(changed, autocast=True)
    assert torch.equal(loss, new_loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, new_gradients, strict=True))
    assert new_kept < kept


def test_without_autocast_the_cast_stays():
    plain = make_model()
    changed = copy.deepcopy(plain)
    leave_inputs_to_autocast(changed)
    assert torch.equal(run_step(plain, autocast=False)[0], run_step(changed, autocast=False)[0])


def test_dora_is_left_alone():
    assert leave_inputs_to_autocast(make_model(use_dora=True)) == 0
