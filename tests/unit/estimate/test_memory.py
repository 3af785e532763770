"""The estimate as a whole: what is held, which way it moves, and that it adds up."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_cli.estimate.memory import INSTANTS, estimate_memory
from forge_cli.estimate.plan_memory import estimate_from_plan, setting_from_plan
from forge_cli.estimate.step import merge_layers, replay_step, run_layers
from forge_cli.estimate.weights import weigh_model, weigh_optimizer, weigh_quantized
from forge_cli.facts.families import FAMILIES
from forge_cli.facts.model_facts import find_model_facts
from forge_cli.resolve.plan import resolve_mapping
from forge_cli.schema.training import TrainingSection
from forge_cli.units import GIB

MODELS = (
    "mistral-7b",
    "llama-3.2-1b",
    "qwen3-4b",
    "gemma-3-4b",
    "gpt2",
    "pythia-1b",
    "phi-2",
    "olmo-2-7b",
    "mixtral-8x7b",
)


def make_plan(preset: str = "qlora", model: str = "mistral-7b", *overrides: str):
    length = 1024 if model == "gpt2" else 2048
    data = {"train": "forge:quickstart/train", "packing": True, "max_length": length}
    values = {"preset": preset, "model": {"name": model}, "data": data}
    return resolve_mapping(values, list(overrides))


def make_setting(preset: str = "qlora", model: str = "mistral-7b", *overrides: str):
    return setting_from_plan(make_plan(preset, model, *overrides))


def test_quantised_layers_by_hand():
    # 4096 x 4096: half a byte each, the code book, and scales per 64: fp32, or a byte with an fp32 one per 256.
    n = 4096 * 4096
    assert weigh_quantized(n, 4, 4096, double_quant=False, granule_bytes=1) == n // 2 + 64 + 4 * n // 64
    assert (
        weigh_quantized(n, 4, 4096, double_quant=True, granule_bytes=1) == n // 2 + 64 + n // 64 + n // 4096 + 1024 + 4
    )
    assert weigh_quantized(n, 8, 4096, double_quant=False, granule_bytes=1) == n + 4 * 4096


@pytest.mark.parametrize(
    ("model", "single_minus_double_gb"),
    # LitGPT's resource tables: nf4 minus nf4-dq, as measured on an A100 (GB).
    [("llama-2-7b", 0.31), ("llama-2-13b", 0.60), ("codellama-34b", 1.57)],
)
def test_double_quantisation_saves_what_others_measured(model, single_minus_double_gb):
    facts = find_model_facts(model)
    single, double = (weigh_model(facts, 2, quantized_bits=4, double_quant=dq) for dq in (False, True))
    assert (single - double) / 1e9 == pytest.approx(single_minus_double_gb, abs=0.022)


def test_weights_are_two_bytes_each_and_the_granule():
    facts = find_model_facts("llama-3-8b")
    assert weigh_model(facts, 2) == pytest.approx(2 * 8_030_261_248, rel=1e-6)
    assert weigh_model(facts, 2, granule_bytes=1) == 2 * 8_030_261_248


def test_optimizer_states_by_hand():
    tensors = {1_000_000: 2, 1000: 3}

    def weigh(optim):
        return weigh_optimizer(tensors, optim, 4, granule_bytes=1)

    assert weigh("adamw_torch_fused") == 2 * (8_000_000 + 4) + 3 * (8000 + 4)
    assert weigh("adamw_torch") == 2 * 8_000_000 + 3 * 8000
    # Two bytes per weight and an fp32 scale per 256 for either state; small tensors stay in fp32.
    assert weigh("adamw_bnb_8bit") == 2 * (2_000_000 + 2 * 4 * 3907) + 3 * 8000
    assert weigh("paged_adamw_8bit") == 2 * (2 * 4 * 3907) + 3 * 8000
    assert weigh("paged_adamw_32bit") == 3 * 8000
    assert weigh("sgd") == 0


def test_every_optimizer_of_the_schema_is_known():
    names = get_args(TrainingSection.model_fields["optim"].annotation)
    assert len(names) == 9
    for name in names:
        assert estimate_memory(make_setting("lora", "llama-3.2-1b", f"training.optim={name}")).total_bytes > GIB


@pytest.mark.parametrize(
    ("overrides", "gib"),
    # An independent prototype's predictions (bf16 adapters, paged 8-bit AdamW); ours trains float32 adapters, whose
    # weights and gradients take 0.08 GiB more each.
    [
        (("training.per_device_train_batch_size=1", "data.max_length=1024"), 4.52),
        (("training.per_device_train_batch_size=1", "data.max_length=2048"), 4.99),
        (("training.per_device_train_batch_size=4", "data.max_length=2048"), 7.85),
        (("training.per_device_train_batch_size=4", "data.max_length=4096"), 11.76),
    ],
)
def test_qlora_of_mistral_agrees_with_a_prototype(overrides, gib):
    same = ("training.optim=paged_adamw_8bit", "lora.r=16", "model.attn_implementation=flash_attention_2")
    estimate = estimate_memory(make_setting("qlora", "mistral-7b", *same, *overrides))
    assert estimate.total_bytes / GIB - 0.16 == pytest.approx(gib, rel=0.03)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("preset", ["sft", "lora", "qlora"])
def test_layers_carried_on_are_layers_replayed(model, preset):
    """Three and four layers, carried on, against a replay of all."""
    setting = make_setting(preset, model, "data.max_length=512", "training.per_device_train_batch_size=1")
    setting = setting._replace(facts=setting.facts._replace(num_hidden_layers=9))
    carried, whole = replay_step(setting), merge_layers(run_layers(setting, 0, 9))
    if model == "gemma-3-4b":  # every sixth layer has another mask, which three and four layers do not see
        assert set(carried) == set(whole)
        assert all(carried[name][0] == pytest.approx(whole[name][0], rel=0.01) for name in whole)
    else:
        assert carried == whole


@pytest.mark.parametrize("model", MODELS)
def test_parts_add_up_and_are_known(model):
    estimate = estimate_memory(make_setting("lora", model, "data.max_length=256"))
    assert [one.name for one in estimate.instants if one.name not in INSTANTS] == []
    for one in estimate.instants:
        assert one.total_bytes == sum(one.parts.values()) and min(one.parts.values()) > 0
    assert estimate.total_bytes == max(one.total_bytes for one in estimate.instants)


STEPS = st.fixed_dictionaries(
    {
        "model": st.sampled_from(MODELS),
        "preset": st.sampled_from(("sft", "lora", "qlora")),
        "batch": st.integers(1, 9),
        "length": st.integers(16, 3000),
        "checkpointing": st.booleans(),
        "packing": st.booleans(),
    }
)


def total(model, preset, batch, length, checkpointing, packing, more=()) -> int:
    overrides = (
        f"training.per_device_train_batch_size={batch}",
        f"data.max_length={min(length, 900 + batch) if model == 'gpt2' else min(length, 1900)}",
        f"training.activation_checkpointing={str(checkpointing).lower()}",
        f"data.packing={str(packing).lower()}",
    )
    return estimate_from_plan(make_plan(preset, model, *overrides, *more)).total_bytes


@settings(max_examples=40, deadline=None)
@given(STEPS)
def test_more_never_takes_less(step):
    now = total(**step)
    assert total(**step | {"batch": step["batch"] + 1}) >= now
    assert total(**step | {"length": step["length"] + 64}) >= now
    if step["preset"] != "sft":
        assert total(**step, more=("lora.r=64",)) >= total(**step, more=("lora.r=8",))


@settings(max_examples=40, deadline=None)
@given(STEPS)
def test_saving_never_takes_more(step):
    now = total(**step | {"checkpointing": False})
    assert total(**step | {"checkpointing": True}) <= now
    assert total(**step, more=("freeze.first=1",)) <= total(**step)
    assert total(**step, more=("training.optim=adamw_bnb_8bit",)) <= total(**step)


@settings(max_examples=20, deadline=None)
@given(STEPS)
def test_quantising_never_takes_more_once_the_weights_outweigh_one_unpacked_layer(step):
    # A layer is unpacked as a whole, so a tiny model may need more; these are far above.
    if step["model"] in ("mistral-7b", "olmo-2-7b"):
        assert total(**step | {"preset": "qlora"}) <= total(**step | {"preset": "lora"})


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(set(FAMILIES) & {"llama", "qwen3", "gemma2"})), st.integers(1, 4), st.integers(100, 5000))
def test_a_larger_vocabulary_never_takes_less(family, batch, vocabulary):
    base = make_setting("lora", {"llama": "llama-3.2-1b", "qwen3": "qwen3-4b", "gemma2": "gemma-2-2b"}[family])
    sizes = []
    for size in (vocabulary, vocabulary + 777):
        facts = base.facts._replace(vocab_size=size)
        weights = weigh_model(facts, 2)
        sizes.append(estimate_memory(base._replace(facts=facts, batch_size=batch, weights_bytes=weights)).total_bytes)
    assert sizes[0] <= sizes[1]


def test_ema_and_reference_are_counted():
    lora = estimate_memory(make_setting("lora"))
    with_ema = estimate_memory(make_setting("lora", "mistral-7b", "ema.decay=0.99"))
    trained = sum(size * times for size, times in lora.setting.trained.items())
    assert with_ema.total_bytes - lora.total_bytes == pytest.approx(4 * trained, rel=1e-3)
    on_cpu = estimate_memory(make_setting("lora", "mistral-7b", "ema.decay=0.99", "ema.device=cpu"))
    assert on_cpu.total_bytes == lora.total_bytes


def test_an_unknown_architecture_is_not_guessed():
    plan = make_plan("lora", "org/unheard-of")
    assert estimate_from_plan(plan) is None
