"""Builds a plan's model without weights, for a trace of its memory. Call it under ``FakeTensorMode``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from forge_cli.build.compute import Compute
from forge_cli.build.model import choose_attention
from forge_cli.facts.families import find_family
from forge_cli.facts.shape import ModelFacts
from forge_cli.schema.model import QuantizationSection
from forge_cli.schema.runspec import RunSpec

_INT8_THRESHOLD = 6.0  # BitsAndBytesConfig.llm_int8_threshold


def build_fake_model(spec: RunSpec, facts: ModelFacts, compute: Compute, num_layers: int) -> torch.nn.Module:
    """Builds the model as :func:`forge_cli.build.model.load_model` would load it, with fewer decoder layers."""
    config = build_config(facts, num_layers)
    model = AutoModelForCausalLM.from_config(
        config, dtype=compute.weight_dtype, attn_implementation=choose_attention(spec, compute)
    )
    if spec.quantization:
        _quantize(model, spec.quantization, compute.quantized_dtype)
    model.config.use_cache = False
    return model


def list_held(model: torch.nn.Module) -> list[torch.Tensor]:
    """Lists what a model holds: weights, buffers, and what belongs to quantised weights."""
    held = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        held += [parameter.SCB] if hasattr(parameter, "SCB") else []
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            held += [one for one in vars(part or object).values() if isinstance(one, torch.Tensor)]
    return held


def build_config(facts: ModelFacts, num_layers: int) -> PreTrainedConfig:
    """Builds transformers' configuration: from the folder where there is one, else from the shape."""
    if facts.path:
        config = AutoConfig.from_pretrained(facts.path)
    else:
        config = AutoConfig.for_model(facts.model_type, **_config_fields(facts))
        if facts.sliding_window is None and find_family(facts).full_attention_every == 1:
            config.sliding_window = None  # else Mistral's would be its class's default
    config.num_hidden_layers = num_layers
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        if isinstance(getattr(config, name, None), list):
            setattr(config, name, getattr(config, name)[:num_layers])
    return config


def _config_fields(facts: ModelFacts) -> dict[str, object]:
    fields = {
        name: getattr(facts, name)
        for name in (
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "intermediate_size",
            "vocab_size",
            "tie_word_embeddings",
            "max_position_embeddings",
            "num_local_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "sliding_window",
            "attention_bias",
        )
        if getattr(facts, name, None) is not None
    }
    # The usual padding token may lie outside a small vocabulary.
    fields["pad_token_id"] = None
    if facts.num_local_experts is not None:
        fields["num_experts"] = facts.num_local_experts
    if facts.model_type == "gpt2":
        fields["n_inner"] = facts.intermediate_size
    if facts.model_type == "falcon":
        del fields["head_dim"]
        many = 1 < facts.num_key_value_heads < facts.num_attention_heads
        fields |= {"new_decoder_architecture": many, "multi_query": facts.num_key_value_heads == 1}
        fields |= {"num_kv_heads": facts.num_key_value_heads, "ffn_hidden_size": facts.intermediate_size}
    return fields


def _quantize(model: torch.nn.Module, quantization: QuantizationSection, compute_dtype: torch.dtype) -> None:
    """Puts quantised layers where transformers would: bitsandbytes' own, around what its fake kernels made."""
    kept = get_keys_to_not_convert(model)
    for name, module in list(model.named_modules()):
        is_linear = type(module) is torch.nn.Linear or type(module).__name__ == "Conv1D"
        if is_linear and should_convert_module(name, kept):
            weight = module.weight.detach()
            weight = weight if isinstance(module, torch.nn.Linear) else weight.t()
            # Its own constructor makes a parameter that forgets that it is fake.
            layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            if quantization.bits == 4:
                _fill_4bit(layer, weight, quantization, compute_dtype)
            else:
                _fill_8bit(layer, weight)
            layer.bias = module.bias if module.bias is None else torch.nn.Parameter(module.bias.detach(), False)
            model.set_submodule(name, layer)
    setattr(model, f"is_loaded_in_{quantization.bits}bit", True)


def _fill_4bit(
    layer: torch.nn.Module, weight: torch.Tensor, quantization: QuantizationSection, compute_dtype: torch.dtype
) -> None:
    import bitsandbytes  # part of an extra

    packed, state = bitsandbytes.functional.quantize_4bit(
        weight,
        compress_statistics=quantization.bnb_4bit_use_double_quant,
        quant_type=quantization.bnb_4bit_quant_type,
        quant_storage=getattr(torch, quantization.bnb_4bit_quant_storage),
    )
    layer.__class__ = bitsandbytes.nn.Linear4bit
    layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    layer.weight.quant_type = quantization.bnb_4bit_quant_type
    layer.weight.compress_statistics = quantization.bnb_4bit_use_double_quant
    layer.weight.quant_state = layer.quant_state = state
    layer.compute_dtype, layer.compute_type_is_set = compute_dtype, True
    layer.support_avx512bf16_for_cpu = False


def _fill_8bit(layer: torch.nn.Module, weight: torch.Tensor) -> None:
    import bitsandbytes

    layer.__class__ = bitsandbytes.nn.Linear8bitLt
    layer.state, layer.index = bitsandbytes.MatmulLtState(), None
    layer.state.threshold, layer.state.has_fp16_weights, layer.state.use_pool = _INT8_THRESHOLD, False, True
    layer.weight = torch.nn.Parameter(torch.empty_like(weight, dtype=torch.int8), requires_grad=False)
    layer.weight.CB, layer.weight.SCB = layer.weight.data, weight.new_empty(len(weight), dtype=torch.float32)


@contextlib.contextmanager
def cuda_int8() -> Iterator[None]:
    """Lets 8-bit layers on the CPU take the path of those on CUDA."""
    from bitsandbytes.autograd import _functions

    with mock.patch.object(_functions, "MatMul8bitFp", _functions.MatMul8bitLt):
        yield
