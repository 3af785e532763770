"""The replay of a step against real steps of small models on the CPU: every family, then every method.

What is compared is the highest number of live bytes while the real model, its adapters and TRL's loss run forwards
and backwards. On CUDA other casts and masks apply; those that a CPU can be talked into are compared as well.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from trl.trainer import utils
from trl.trainer.utils import add_fused_lm_head

from forge_cli.build.fake_model import list_held
from forge_cli.estimate import losses
from forge_cli.estimate.setting import Adapters, Setting
from forge_cli.estimate.step import run_layers
from forge_cli.facts.config_facts import read_config_facts
from forge_cli.facts.families import FALCON_SEQUENTIAL, FALCON_TWO_NORMS, FAMILIES, find_family
from forge_cli.facts.parameter_count import linear_modules
from forge_cli.parts.adapter_inputs import leave_inputs_to_autocast
from forge_cli.parts.cuda_likeness import CudaAutocast, cuda_workspaces
from forge_cli.parts.memory_trace import CUDA_GRANULE, LiveBytes

SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LAYERS, BATCH, LENGTH, RANK = 3, 2, 96, 4
EVERY_HEAD = {"num_key_value_heads": 4}
WIDE_HEADS = {"head_dim": 48}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
FALCON = {"ffn_hidden_size": 352, "hidden_dropout": 0.0, "attention_dropout": 0.0}
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# What a family's configuration needs beside the shape.
FIELDS: dict[str, dict] = {
    **{name: {} for name in ("llama", "mistral", "smollm3", "qwen2", "olmo2", "phi3")},
    **{name: WIDE_HEADS for name in ("ministral3", "qwen3", "gemma", "gemma2")},
    "granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.2},
    "olmo3": {"sliding_window": 64},
    "gemma3_text": {"sliding_window": 64, **WIDE_HEADS},
    "phi": {**EVERY_HEAD, **QUIET},
    "gpt_neox": EVERY_HEAD,
    "gpt2": {"n_inner": 352, **EVERY_HEAD, **QUIET},
    "falcon": {"new_decoder_architecture": False, "multi_query": True, "bias": False, **FALCON},
    FALCON_TWO_NORMS: {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": False, **FALCON},
    FALCON_SEQUENTIAL: {"parallel_attn": False, "multi_query": False, "bias": True, "alibi": True, **FALCON},
    "mixtral": EXPERTS,
    "qwen3_moe": {"moe_intermediate_size": 96, **EXPERTS},
    "gpt_oss": {**WIDE_HEADS, **EXPERTS},
}
LINEAR = (torch.nn.Linear,)


@pytest.fixture(autouse=True)
def narrow_tiles(monkeypatch):
    """TRL's tile of 32768 words would be nearly all memory of a model this small."""
    monkeypatch.setattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 16)
    monkeypatch.setattr(losses, "TILE_VOCABULARY", 16)


def describe(name, num_layers=LAYERS, **fields):
    """Configuration and facts of a small model of a family."""
    config = CONFIG_MAPPING[name.split(" ")[0]](num_hidden_layers=num_layers, **{**SHAPE, **FIELDS[name], **fields})
    return config, read_config_facts(config.to_dict(), Path("config.json"), name, "")


def quantize(model, bits, double_quant):
    """Puts bitsandbytes' layers where transformers would."""
    for name, module in list(model.named_modules()):
        if type(module) not in LINEAR or "head" in name:
            continue
        sides = module.in_features, module.out_features, module.bias is not None
        if bits == 4:
            options = {"compress_statistics": double_quant, "quant_type": "nf4"}
            layer = bitsandbytes.nn.Linear4bit(*sides, compute_dtype=module.weight.dtype, **options)
            layer.weight = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, module=layer, **options)
        else:
            layer = bitsandbytes.nn.Linear8bitLt(*sides, has_fp16_weights=False, threshold=6.0)
            layer.weight = bitsandbytes.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
        layer.bias = module.bias
        layer.to("cpu").support_avx512bf16_for_cpu = False
        model.set_submodule(name, layer)
    setattr(model, f"is_loaded_in_{bits}bit", True)
    model.requires_grad_(False)


def build(config, attention, dtype, checkpointing, lora=None, bits=None, double_quant=False):
    torch.manual_seed(0)
    model = base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if bits:
        quantize(model, bits, double_quant)
    if lora is not None:
        model = get_peft_model(model, LoraConfig(r=RANK, task_type="CAUSAL_LM", **lora))
        leave_inputs_to_autocast(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def measure(model, *, autocast, padded=False, packed=False, cuda=False):
    """Highest live bytes of a step, weights left out."""
    ids = torch.randint(3, SHAPE["vocab_size"], (1, BATCH * LENGTH) if packed else (BATCH, LENGTH))
    inputs = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    if padded:
        inputs["attention_mask"][0, LENGTH // 2 :] = 0
    if packed:
        inputs["attention_mask"] = None
        inputs["position_ids"] = torch.arange(LENGTH).repeat(1, BATCH)
    inside = {"aten._safe_softmax": lambda args, _: 5 * args[0].numel()}  # the softmax, and which rows are empty
    workspaces = cuda_workspaces() | inside if cuda else {"bitsandbytes.gemm_4bit": unpacking_bytes}
    live = LiveBytes(granule=CUDA_GRANULE if cuda else 1, workspaces=workspaces)
    mixed = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    states = [one for module in model.modules() for one in vars(getattr(module, "state", object)).values()]
    with live:
        live.register([one for one in inputs.values() if one is not None], "inputs")
        live.register(list_held(model), "weights")
        live.leave_out(list_held(model))
        live.leave_out([one for one in states if isinstance(one, torch.Tensor)])
        live.mark("step")
        with CudaAutocast() if cuda else contextlib.nullcontext(), mixed:
            output = model(**inputs, fused_lm_head=True, use_cache=False)
        loss = -output.log_probs.sum()
        del output
        loss.backward()
    return live.peaks["step"]


def unpacking_bytes(args, kwargs):
    """What bitsandbytes unpacks inside its product on the CPU: the weight, and scales that are quantised themselves."""
    numel, block, has_nested_scales = args[2][0] * args[2][1], args[4], len(args) > 7
    return numel * args[0].element_size() + (4 * -(-numel // block) if has_nested_scales else 0)


def predict(facts, **fields):
    setting = Setting(facts, BATCH, LENGTH, 0, **{"cuda": False, **fields})
    return max(peak for peak, _ in run_layers(setting, 0, facts.num_hidden_layers).values())


def trained_whole(dtype_bytes=4):
    return {"embeddings_train": True, "head_trains": True, "trained_bytes": dtype_bytes, "weight_bytes": dtype_bytes}


def compare(name, *, lora=None, autocast=True, checkpointing=False, attention=None, bits=None, **options):
    """Predicted over measured, less 1."""
    shape = {key: options.pop(key) for key in ("sliding_window", "num_layers") if key in options}
    whole_dtype, double_quant = options.pop("whole_dtype", torch.float32), options.pop("double_quant", False)
    config, facts = describe(name, **shape)
    attention = attention or ("sdpa" if find_family(facts).has_sdpa else "eager")
    dtype = (torch.bfloat16 if autocast else torch.float32) if lora is not None else whole_dtype
    fields = {"attention": attention, "autocast": autocast, "activation_checkpointing": checkpointing, **options}
    if lora is not None:
        lora = {"target_modules": sorted({one[0] for one in linear_modules(facts)}), **lora}
        fields["adapters"] = Adapters(
            RANK, tuple(lora["target_modules"]), lora.get("lora_dropout", 0.0), lora.get("use_dora", False)
        )
        fields["embeddings_train"] = fields["head_trains"] = bool(lora.get("modules_to_save"))
        fields |= {"weight_bytes": dtype.itemsize, "quantized_bits": bits, "double_quant": double_quant}
    else:
        fields |= trained_whole(dtype.itemsize)
    fields["compute_bytes"] = 2 if autocast else dtype.itemsize
    model = build(config, attention, dtype, checkpointing, lora, bits, double_quant)
    return predict(facts, **fields) / measure(model, autocast=autocast, **options) - 1


def test_every_family_is_compared():
    assert set(FIELDS) == set(FAMILIES)


BOTH = pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])


@BOTH
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lora", [None, {}], ids=["full", "LoRA"])
@pytest.mark.parametrize("name", FIELDS)
def test_families(name, lora, autocast, checkpointing):
    assert abs(compare(name, lora=lora, autocast=autocast, checkpointing=checkpointing)) < 0.01


METHODS: dict[str, dict] = {
    "dropout": {"lora": {"lora_dropout": 0.1}},
    "few targets": {"lora": {"target_modules": ["q_proj", "v_proj"]}},
    "DoRA": {"lora": {"use_dora": True}},
    "DoRA, dropout": {"lora": {"use_dora": True, "lora_dropout": 0.1}},
    "modules_to_save": {"lora": {"modules_to_save": ["embed_tokens", "lm_head"]}},
    "4 bit": {"lora": {}, "bits": 4},
    "4 bit, double": {"lora": {"lora_dropout": 0.1}, "bits": 4, "double_quant": True},
    "4 bit, DoRA": {"lora": {"use_dora": True}, "bits": 4, "double_quant": True},
    "8 bit": {"lora": {}, "bits": 8},
}


@BOTH
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_methods(method, autocast, checkpointing):
    assert abs(compare("llama", autocast=autocast, checkpointing=checkpointing, **METHODS[method])) < 0.01


@BOTH
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "mixtral"])
def test_whole_training_in_16_bit(name, checkpointing):
    options = {"autocast": False, "whole_dtype": torch.bfloat16, "checkpointing": checkpointing}
    assert abs(compare(name, **options)) < 0.01


MASKS: dict[str, dict] = {
    "padded": {"padded": True},
    "packed": {"packed": True},
    "eager": {"attention": "eager"},
    "eager, padded": {"attention": "eager", "padded": True},
    "eager, packed": {"attention": "eager", "packed": True},
}


@BOTH
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["llama", "phi", "gpt2", "gemma2"])
def test_masks(name, mask, checkpointing):
    options = {"attention": "eager"} if name == "gemma2" else {}
    assert abs(compare(name, lora={}, checkpointing=checkpointing, **options | MASKS[mask])) < 0.01


@BOTH
@pytest.mark.parametrize(("name", "num_layers"), [("mistral", 3), ("phi3", 3), ("olmo3", 5), ("gemma3_text", 7)])
def test_windows_shorter_than_rows(name, num_layers, checkpointing):
    options = {"lora": {}, "sliding_window": 64, "num_layers": num_layers}
    assert abs(compare(name, checkpointing=checkpointing, **options)) < 0.01


@pytest.mark.parametrize("lora", [{}, {"lora_dropout": 0.1}], ids=["LoRA", "dropout"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "phi", "falcon", "mixtral", "gpt_oss"])
def test_casts_and_masks_of_cuda(name, lora):
    assert abs(compare(name, lora=lora, cuda=True)) < 0.02
