"""A frozen prefix: same numbers, one forward, no backward, less work."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from forge_cli.errors import ModelError
from forge_cli.parts.freeze import find_trainable_below, freeze_layers, setup_lp_lora_style
from forge_cli.parts.layers import find_decoder_layers

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def wrap(model: torch.nn.Module, first_layer: int = 0) -> torch.nn.Module:
    torch.manual_seed(1)
    layers = list(range(first_layer, 8))
    config = LoraConfig(r=4, target_modules=TARGETS, layers_to_transform=layers, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    # B starts at zero, and then A would get no gradient to compare.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return model


def count_passes(model: torch.nn.Module) -> tuple[Counter, Counter]:
    """Counts real forward computations and backward passes of every decoder layer, recomputation included."""
    forwards, backwards = Counter(), Counter()
    for index, layer in enumerate(find_decoder_layers(model)):

        def count_forward(module, args, kwargs, index=index):
            forwards[index] += 1

        def count_backward(module, args, output, index=index):
            if output.requires_grad:
                output.register_hook(lambda grad: backwards.update([index]))

        # Recomputation ends as soon as nothing more is needed: count where a layer begins, not where it ends.
        layer.self_attn.register_forward_pre_hook(count_forward, with_kwargs=True)
        layer.mlp.register_forward_hook(count_backward)
    return forwards, backwards


@pytest.mark.parametrize("checkpointing", [True, False])
def test_frozen_layers_run_forward_once_and_never_backward(load_tiny, tiny_batch, checkpointing):
    model = wrap(load_tiny(), first_layer=4)
    report = freeze_layers(model, 4)
    if checkpointing:
        model.gradient_checkpointing_enable()  # also makes the embedding's output require a gradient
    forwards, backwards = count_passes(model)
    model.train()
    model(**tiny_batch).loss.backward()
    assert report.prefix_without_grad
    assert [forwards[i] for i in range(8)] == [1] * 4 + [2 if checkpointing else 1] * 4
    assert [backwards[i] for i in range(8)] == [0] * 4 + [1] * 4


def test_libraries_alone_do_go_through_frozen_layers(load_tiny, tiny_batch):
    """The reason for all this: if it fails one day, the libraries have learned it and the trick may go."""
    model = wrap(load_tiny(), first_layer=4)
    model.gradient_checkpointing_enable()
    forwards, backwards = count_passes(model)
    model.train()
    model(**tiny_batch).loss.backward()
    assert [forwards[i] for i in range(8)] == [2] * 8
    assert [backwards[i] for i in range(8)] == [1] * 8


@pytest.mark.parametrize("checkpointing", [True, False])
def test_loss_and_gradients_are_identical_to_training_without_the_trick(load_tiny, tiny_batch, checkpointing):
    results = []
    for trick in (False, True):
        model = wrap(load_tiny(), first_layer=4)
        if trick:
            freeze_layers(model, 4)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        loss = model(**tiny_batch).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (plain_loss, plain), (trick_loss, tricked) = results
    assert torch.equal(plain_loss, trick_loss)
    assert plain.keys() == tricked.keys() and len(plain) == 4 * 7 * 2
    assert all(torch.equal(plain[name], tricked[name]) for name in plain)


def test_full_fine_tuning_keeps_frozen_weights_bitwise(load_tiny, tiny_batch):
    model = load_tiny()
    freeze_layers(model, 4)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    model(**tiny_batch).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        frozen = "embed_tokens" in name or any(f"layers.{i}." in name for i in range(4))
        assert torch.equal(parameter, before[name]) == frozen, name


def test_trainable_embeddings_keep_the_backward_pass(load_tiny, tiny_batch):
    model = load_tiny()
    report = freeze_layers(model, 4, embeddings=False)
    assert not report.prefix_without_grad
    assert report.blocked_by == "model.embed_tokens.weight"
    assert report.compute_ratio(trains_weights=True, activation_checkpointing=True) == 1
    model(**tiny_batch).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_a_deep_copy_runs_its_own_weights(load_tiny, tiny_batch):
    model = load_tiny()
    freeze_layers(model, 4)
    copy = deepcopy(model)
    with torch.no_grad():
        copy.model.layers[0].mlp.down_proj.weight.zero_()
        assert not torch.equal(copy(**tiny_batch).logits, model(**tiny_batch).logits)


def test_adapters_placed_after_freezing_are_refused(load_tiny, tiny_batch):
    """They would get no gradient, silently."""
    model = load_tiny()
    setup_lp_lora_style(model, freeze_ratio=0.5)
    model = wrap(model)
    with pytest.raises(ModelError, match="freeze after get_peft_model"):
        model(**tiny_batch)
    setup_lp_lora_style(model, freeze_ratio=0.5)
    model(**tiny_batch).loss.backward()


def test_freezing_again_takes_the_decision_anew(load_tiny, tiny_batch):
    model = load_tiny()
    assert freeze_layers(model, 4).prefix_without_grad
    model.get_input_embeddings().requires_grad_(True)
    assert find_trainable_below(model, 4)
    assert not freeze_layers(model, 4, embeddings=False).prefix_without_grad
    model(**tiny_batch).loss.backward()
    assert model.get_input_embeddings().weight.grad is not None


def test_lp_lora_style_freezes_adapters_that_are_there(load_tiny):
    model = wrap(load_tiny())
    report = setup_lp_lora_style(model, freeze_ratio=0.5)
    trained = {name.split(".layers.")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"4", "5", "6", "7"}
    assert report.num_frozen_layers == 4 and report.prefix_without_grad
    assert report.layer_map() == "[····####] 4 of 8 layers frozen"


def test_patterns(load_tiny):
    model = load_tiny()
    freeze_layers(model, 0, embeddings=False, patterns=["*.mlp.*"])
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".mlp." in n)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".self_attn." in n)
    with pytest.raises(ModelError, match="matches no module") as error:
        freeze_layers(model, 0, embeddings=False, patterns=["*.attention.*"])
    assert "model.layers" in str(error.value)


def test_freezing_everything_is_an_error(load_tiny):
    model = wrap(load_tiny())
    with pytest.raises(ModelError, match="nothing to train"):
        freeze_layers(model, 8)


def test_more_layers_than_there_are(load_tiny):
    with pytest.raises(ModelError, match="8 decoder layers"):
        freeze_layers(load_tiny(), 9)


# Shares by hand, of the layers alone: 2 units for a forward, 4 with the gradient of activations, ...
@pytest.mark.parametrize(
    ("full", "checkpointing", "ratio"),
    [(False, False, 0.75), (False, True, 2 / 3), (True, False, 2 / 3), (True, True, 0.625)],
)
def test_compute_ratio_by_hand(load_tiny, full, checkpointing, ratio):
    report = freeze_layers(load_tiny(), 4)
    assert report.compute_ratio(trains_weights=full, activation_checkpointing=checkpointing) == pytest.approx(ratio)


@pytest.mark.parametrize(("checkpointing", "bar"), [(True, 0.69), (False, 0.76)])
def test_matmul_flops_at_the_shape_of_llama_8b(monkeypatch, checkpointing, bar):
    """Counts with torch's own counter on the meta device; against the same model with all layers adapted."""
    # Looks for packed rows by value, which a tensor without values does not have.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda position_ids: None)
    plain = count_flops(frozen=0, checkpointing=checkpointing)
    frozen = count_flops(frozen=16, checkpointing=checkpointing)
    print(
        f"\nLlama-3.1-8B, 2048 tokens, checkpointing {checkpointing}: {plain / 1e12:.2f} -> {frozen / 1e12:.2f} TFLOP"
    )
    assert frozen / plain <= bar


def count_flops(frozen: int, checkpointing: bool) -> int:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=14336,
        vocab_size=128256,
        use_cache=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    layers = list(range(frozen, 32))
    lora = LoraConfig(r=16, target_modules=TARGETS, layers_to_transform=layers, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora, low_cpu_mem_usage=True, autocast_adapter_dtype=False).to(torch.bfloat16)
    if frozen:
        freeze_layers(model, frozen)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    ids = torch.zeros((1, 2048), dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids).logits
        logits.sum().backward()
    return counter.get_total_flops()
