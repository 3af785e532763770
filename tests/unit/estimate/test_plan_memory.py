"""How a plan becomes a setting: what trains, what is compared with, and what the replay makes of it, by hand."""

from __future__ import annotations

import json
from fnmatch import fnmatchcase

import pytest

from forge_cli.estimate.memory import Instant, estimate_memory
from forge_cli.estimate.plan_memory import setting_from_plan
from forge_cli.estimate.setting import Setting
from forge_cli.estimate.step import merge_layers, replay_evaluation, replay_step, run_layers
from forge_cli.estimate.trained_parts import find_trained_parts
from forge_cli.estimate.weights import weigh_model, weigh_quantized, weigh_tensors
from forge_cli.facts.model_facts import find_model_facts
from forge_cli.facts.weights import iterate_weights, list_holders
from forge_cli.resolve.plan import resolve_mapping

# Mistral 7B: 32 layers of width 4096, 1024 for keys and values, a feed-forward of 14336, 32000 words, nothing tied.
ATTENTION, FEED_FORWARD, TABLE = 2 * 4096 * 4096 + 2 * 4096 * 1024, 3 * 4096 * 14336, 32000 * 4096
LAYER = ATTENTION + FEED_FORWARD + 2 * 4096
TWICE = "training.gradient_accumulation_steps=2"  # from the second micro step on, gradients exist all the time
ONE_ROW = "training.per_device_train_batch_size=1"


def make_setting(preset: str, model: str, *overrides: str) -> Setting:
    rows = {"kto": "forge:preference/rated", "sft": "forge:quickstart/train"}
    train = rows.get(preset, "forge:quickstart/train" if "lora" in preset else "forge:preference/train")
    data = {"train": train, "max_length": 256}
    return setting_from_plan(
        resolve_mapping({"preset": preset, "model": {"name": model}, "data": data}, list(overrides))
    )


def find_instant(setting: Setting, name: str) -> Instant:
    return next(one for one in estimate_memory(setting).instants if one.name == name)


def gradients_throughout(setting: Setting) -> int:
    """The gradients' bytes, which are those of the trained tensors in every instant of a later micro step."""
    during = [one for one in estimate_memory(setting).instants if one.name not in ("load", "evaluation", "save")]
    found = {one.name: one.parts.get("gradients", 0) for one in during}
    # The replay makes a norm when it is first used, and the last of them after the forward pass's highest point.
    assert found.pop("forward") == pytest.approx(found["end of backward"], rel=1e-4)
    assert set(found.values()) == {weigh_tensors(setting.trained, setting.trained_bytes)}
    return found["end of backward"]


# What trains ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frozen", "trained"),
    [
        (("freeze.first=50%",), 16 * LAYER + TABLE + 4096),
        (("freeze.first=50%", "freeze.embeddings=false"), 16 * LAYER + 2 * TABLE + 4096),
        (('freeze.patterns=["*.mlp.*"]',), 32 * (LAYER - FEED_FORWARD) + 2 * TABLE + 4096),
        (('freeze.patterns=["model.layers.3"]',), 31 * LAYER + 2 * TABLE + 4096),
        (('freeze.patterns=["*layernorm", "lm_head"]',), 32 * (ATTENTION + FEED_FORWARD) + TABLE + 4096),
        (('freeze.patterns=["model.embed_tokens"]',), 32 * LAYER + TABLE + 4096),
    ],
)
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_what_is_frozen_has_no_gradient(frozen, trained, checkpointing):
    setting = make_setting("sft", "mistral-7b", TWICE, f"training.activation_checkpointing={checkpointing}", *frozen)
    assert gradients_throughout(setting) == 4 * trained


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_frozen_layers_below_trained_embeddings_run_with_autograd_and_have_no_gradients(checkpointing):
    options = ("freeze.first=50%", ONE_ROW, f"training.activation_checkpointing={checkpointing}")
    closed = make_setting("sft", "mistral-7b", *options)
    opened = make_setting("sft", "mistral-7b", "freeze.embeddings=false", *options)
    assert (closed.num_frozen_layers, opened.num_frozen_layers) == (16, 0)
    kept = [find_instant(one, "loss").parts["activations"] for one in (closed, opened)]
    # Checkpointing keeps the float32 input of each of the 16 layers more.
    assert kept[1] - kept[0] >= 16 * 256 * 4096 * 4
    if checkpointing == "true":
        assert kept[1] - kept[0] == 16 * 256 * 4096 * 4


@pytest.mark.parametrize(
    "model",
    ["gpt2", "pythia-1b", "olmo-2-7b", "qwen3-4b", "gemma-3-4b", "mixtral-8x7b", "falcon-7b", "gpt-oss-20b"],
)
@pytest.mark.parametrize(
    ("patterns", "more"),
    [
        (["*norm*", "*.ln_1", "*experts", "*.dense_4h_to_h"], ()),
        (["*_norm", "*.ln_2", "*.router", "*.self_attn"], ("freeze.first=2", "freeze.embeddings=false")),
    ],
)
def test_every_family_knows_its_modules_by_name(model, patterns, more):
    names = {name for _, one in iterate_weights(find_model_facts(model)) for name in list_holders(one.module)}
    matching = [one for one in patterns if any(fnmatchcase(name, one) for name in names)]
    assert matching or (model, more) == ("falcon-7b", ("freeze.first=2", "freeze.embeddings=false"))
    frozen = [f"freeze.patterns={json.dumps(matching)}"] if matching else []
    assert gradients_throughout(make_setting("sft", model, TWICE, *frozen, *more)) > 0


@pytest.mark.parametrize("model", ["mistral-7b", "gpt2", "mixtral-8x7b"])
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_layers_with_frozen_halves_are_carried_on_as_they_are_replayed(model, checkpointing):
    options = ('freeze.patterns=["*.mlp"]', ONE_ROW, f"training.activation_checkpointing={checkpointing}")
    setting = make_setting("sft", model, *options)
    assert replay_step(setting) == merge_layers(run_layers(setting, 0, setting.facts.num_hidden_layers))


def test_a_frozen_body_has_a_backward_pass_of_the_loss_alone():
    setting = make_setting(
        "sft", "mistral-7b", 'freeze.patterns=["model*"]', "training.activation_checkpointing=false", ONE_ROW
    )
    assert setting.trained == {TABLE: 1} and setting.head_trains and not setting.embeddings_train
    assert find_instant(setting, "end of backward").parts["gradients"] == 4 * TABLE


# Adapters and copies -------------------------------------------------------------------------------------------------

ADAPTERS = 32 * 16 * (4096 + 4096)  # on q_proj alone, rank 16
Q_PROJ = ("lora.r=16", "lora.target_modules=[q_proj]", TWICE)


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_dotted_targets_are_those_that_peft_takes(checkpointing):
    options = (f"training.activation_checkpointing={checkpointing}", *Q_PROJ)
    named = make_setting("lora", "mistral-7b", *options)
    dotted = make_setting("lora", "mistral-7b", *options, "lora.target_modules=[self_attn.q_proj]")
    assert gradients_throughout(named) == gradients_throughout(dotted) == 4 * ADAPTERS
    assert estimate_memory(named).instants == estimate_memory(dotted).instants
    third = make_setting("lora", "mistral-7b", *options, "lora.target_modules=[layers.3.self_attn.q_proj]")
    assert gradients_throughout(third) == 4 * ADAPTERS // 32


def test_nothing_on_a_tape_goes_backwards():
    setting = make_setting("lora", "mistral-7b", "training.activation_checkpointing=false")
    nothing = setting._replace(trained={}, adapters=setting.adapters._replace(targets=()))
    assert "gradients" not in find_instant(nothing, "end of backward").parts


@pytest.mark.parametrize(
    ("model", "name", "copied"),
    [
        ("mistral-7b", "embed_tokens", 32000 * 4096),
        ("mistral-7b", "model.embed_tokens", 32000 * 4096),
        ("gpt2", "wte", 50257 * 768),
        ("gpt2", "transformer.wte", 50257 * 768),
        ("pythia-1b", "embed_in", 50304 * 2048),
        ("llama-3.2-1b", "model.embed_tokens", 128256 * 2048),
    ],
)
def test_embeddings_that_modules_to_save_names_are_trained(model, name, copied):
    with_copy = make_setting("lora", model, TWICE, f"lora.modules_to_save=[{name}]")
    without = make_setting("lora", model, TWICE)
    assert with_copy.embeddings_train and not with_copy.head_trains and not without.embeddings_train
    assert with_copy.trained_embeddings == {copied: 1}
    assert gradients_throughout(with_copy) - gradients_throughout(without) == -(-4 * copied // 512) * 512


@pytest.mark.parametrize("model", ["pythia-1b", "llama-3.2-1b"])
def test_a_copied_head_is_trained_be_it_tied_or_not(model):
    with_copy, without = (
        make_setting("lora", model, TWICE, *more) for more in (("lora.modules_to_save=[lm_head]",), ())
    )
    assert with_copy.head_trains and not with_copy.embeddings_train
    facts = with_copy.facts
    copied = 4 * facts.vocab_size * facts.hidden_size
    assert gradients_throughout(with_copy) - gradients_throughout(without) == copied


def test_an_adapter_on_the_embeddings_opens_the_frozen_layers():
    on_embeddings = 16 * (32000 + 4096)
    opened = make_setting("lora", "mistral-7b", *Q_PROJ, "lora.target_modules=[q_proj, embed_tokens]")
    assert opened.embeddings_train and opened.adapters.embeddings and opened.trained_embeddings == {}
    assert gradients_throughout(opened) == 4 * (ADAPTERS + on_embeddings)
    facts = opened.facts
    spec = resolve_mapping(
        {"model": {"name": "mistral-7b"}, "data": {"train": "forge:quickstart/train"}, "preset": "lora"},
        ["freeze.first=50%", *Q_PROJ, "lora.target_modules=[q_proj, embed_tokens]"],
    ).spec
    # Unless told otherwise, freezing layers freezes the embeddings, and their adapter with them.
    closed = find_trained_parts(facts, spec, 16)
    assert (closed.num_skipped_layers, closed.embeddings_train) == (16, False)
    told = spec.model_copy(update={"freeze": spec.freeze.model_copy(update={"embeddings": False})})
    parts = find_trained_parts(facts, told, 16)
    assert (parts.num_skipped_layers, parts.embeddings_train) == (0, True)
    assert sum(size * times for size, times in parts.sizes.items()) == ADAPTERS // 2 + on_embeddings


# What is compared with -----------------------------------------------------------------------------------------------


def test_a_row_of_kto_is_one_sequence():
    two_rows = "training.per_device_train_batch_size=2"
    pairs, rated = (make_setting(name, "mistral-7b", two_rows) for name in ("dpo", "kto"))
    assert (pairs.num_sequences, rated.num_sequences) == (4, 2)
    assert pairs.padded and rated.padded
    # Layers keep 2 bytes of each of 2 x 256 tokens, not of 4 x 256, and run again with as many.
    kept = [find_instant(one, "loss").parts["activations"] for one in (rated, pairs)]
    assert kept[0] >= 32 * 2 * 256 * 4096 * 2
    assert kept[1] == pytest.approx(2 * kept[0], rel=2e-3)
    for name in ("orpo", "cpo", "reward"):
        one = make_setting(name, "mistral-7b", ONE_ROW)
        assert one.num_sequences == 2 and one.padded
    assert not make_setting("sft", "mistral-7b", ONE_ROW).pairs


def test_a_folder_of_another_model_is_weighed_by_its_own_shape(tmp_path):
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    shape |= {"intermediate_size": 128, "vocab_size": 32000, "tie_word_embeddings": True, "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **shape}))
    tables, layer = 32000 * 64, 4 * 64 * 64 + 3 * 64 * 128
    norms = 5 * 512  # 64 weights of 2 bytes fill less than what the allocator hands out
    reference = f"preference.reference={tmp_path}"
    other = make_setting("dpo", "mistral-7b", reference, "quantization=null")
    assert other.reference_bytes == 2 * (tables + 2 * layer) + norms
    whole = make_setting("dpo", "mistral-7b", reference, "quantization=null", "lora=null")
    assert whole.reference_bytes == other.reference_bytes
    packed = make_setting("dpo", "mistral-7b", reference, "quantization.bits=8")
    # A byte per weight, and 4 per row: 64 rows fill a granule, 128 as well.
    assert packed.reference_bytes == 2 * tables + 2 * (layer + 7 * 512) + norms


def test_the_base_under_adapters_and_a_folder_of_an_adapter_are_no_second_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert make_setting("dpo", "mistral-7b").reference_bytes == 0
    other = make_setting("dpo", "mistral-7b", f"preference.reference={tmp_path}")
    assert other.reference_bytes == weigh_tensors(other.trained, 4)
    whole = make_setting("dpo", "mistral-7b", "lora=null", "quantization=null")
    assert whole.reference_bytes == weigh_model(whole.facts, 2)


# Evaluation, scales and eyes -----------------------------------------------------------------------------------------


def test_evaluation_is_padded_by_its_own_batch():
    options = ("data.eval_rows=8", ONE_ROW, "data.packing=false", "evaluation.per_device_eval_batch_size=8")
    setting = make_setting("lora", "llama-3.2-1b", *options)
    assert not setting.padded and setting.eval_batch_size == 8
    assert replay_evaluation(setting) == replay_evaluation(setting._replace(padded=True))
    flash = setting._replace(attention="flash")
    # The mask of 8 rows of 256 x 256, a byte each, is what flash attention does without.
    difference = sum(replay_evaluation(setting).values()) - sum(replay_evaluation(flash).values())
    assert difference >= 8 * 256 * 256
    single = setting._replace(eval_batch_size=1)
    assert replay_evaluation(single) == replay_evaluation(single._replace(padded=True))


def test_double_quantisation_reaches_the_replay():
    short = (ONE_ROW, "data.max_length=32", "data.packing=false")  # one layer's weight outweighs all activations
    on, off = (
        make_setting("qlora", "mistral-7b", f"quantization.bnb_4bit_use_double_quant={flag}", *short)
        for flag in ("true", "false")
    )
    assert on.double_quant and not off.double_quant
    # Scales that are quantised are unpacked too: 4 bytes per 64 weights, for the while of a layer's backward pass.
    name = "backward layer"
    held = [find_instant(one, name).total_bytes - one.weights_bytes for one in (on, off)]
    assert held[0] > held[1]


def test_linear_layers_of_eyes_are_packed():
    facts = find_model_facts("gemma-3-4b")
    blind = facts._replace(num_other_parameters=0, num_other_linear_parameters=0)
    eyes, linear = facts.num_other_parameters, facts.num_other_linear_parameters
    assert 0 < linear < eyes
    assert weigh_model(facts, 2) - weigh_model(blind, 2) == 2 * eyes
    for bits in (4, 8):
        packed = weigh_quantized(linear, bits, 0, double_quant=True, granule_bytes=512)
        found = weigh_model(facts, 2, quantized_bits=bits) - weigh_model(blind, 2, quantized_bits=bits)
        assert found == 2 * (eyes - linear) + packed
        assert packed == pytest.approx(linear * bits / 8, rel=0.04)


def test_the_average_covers_eyes_that_get_no_gradient():
    with_ema = make_setting("sft", "gemma-3-4b", "ema.decay=0.99", ONE_ROW)
    trained = 4 * sum(size * times for size, times in with_ema.trained.items())
    average = find_instant(with_ema, "loss").parts["EMA"]
    assert average == pytest.approx(trained + 4 * with_ema.facts.num_other_parameters, rel=1e-6)
    # While it is swapped in, the raw weights are kept aside.
    assert find_instant(with_ema, "save").parts["EMA"] == 2 * average
    adapters = make_setting("lora", "gemma-3-4b", "ema.decay=0.99", ONE_ROW)
    assert find_instant(adapters, "loss").parts["EMA"] == weigh_tensors(adapters.trained, 4)
