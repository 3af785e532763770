"""Loads the base model of a plan."""

from __future__ import annotations

import importlib.util

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import is_flash_attn_2_available

from forge_cli import faults
from forge_cli.build.compute import Compute, dtype_name
from forge_cli.data.hub import explain_loading
from forge_cli.errors import MachineError, ModelError
from forge_cli.facts.model_facts import locate_model
from forge_cli.schema.model import QuantizationSection
from forge_cli.schema.runspec import RunSpec


def load_model(spec: RunSpec, compute: Compute) -> torch.nn.Module:
    """Loads the base model onto the device: safetensors only, no remote code, quantised if the plan says so.

    For reward it gets a head with one score instead of the vocabulary, drawn by the seed.

    Raises:
        ModelError: The weights are missing, pickled or of an unknown kind.
        MachineError: bitsandbytes is wanted and not installed, or the weights are not on this machine and the hub
            cannot be reached.
    """
    faults.reach("load")
    place = locate_model(spec.model.name)
    options: dict[str, object] = {
        "revision": spec.model.revision,
        "dtype": compute.weight_dtype,
        "attn_implementation": choose_attention(spec, compute),
        "use_safetensors": True,
        "trust_remote_code": False,
        "device_map": {"": compute.device},
    }
    if spec.quantization:
        options["quantization_config"] = build_quantization(spec.quantization, compute.quantized_dtype)
    kind = AutoModelForCausalLM
    if spec.method == "reward":
        kind, options["num_labels"] = AutoModelForSequenceClassification, 1
        set_seed(spec.seed)
    try:
        model = kind.from_pretrained(place, **options)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise explain_loading(error, place, f"the model {spec.model.name}") from error
    refuse_non_finite(model, place)
    model.config.use_cache = False
    if compute.device == "cpu":
        keep_4bit_exact(model)
    return model


def refuse_non_finite(model: torch.nn.Module, place: str) -> None:
    """Refuses weights that are not finite: every loss would be NaN.

    One pass over the weights where they lie and one transfer; ``aminmax`` needs no memory, and NaN passes through it.
    Quantised weights are integers: of these models only norms, embeddings and adapters are looked at.

    Raises:
        ModelError: Some are NaN or infinite; names the tensors.
    """
    tensors = [(name, one) for name, one in model.named_parameters() if one.is_floating_point() and one.numel()]
    widths = [(high.float() - low.float()) for low, high in (torch.aminmax(one.detach()) for _, one in tensors)]
    finite = torch.isfinite(torch.stack([one.to(widths[0].device) for one in widths])).tolist() if widths else []
    bad = [name for (name, _), is_finite in zip(tensors, finite, strict=True) if not is_finite]
    if bad:
        raise ModelError(
            f"{len(bad)} of {len(tensors)} weights hold NaN or infinity: {', '.join(bad[:5])}",
            where=place,
            why="every loss would be NaN",
            fix="copy the model again; weights too large for float16 need model.dtype: bfloat16 or float32",
        )


def keep_4bit_exact(model: torch.nn.Module) -> None:
    """Keeps 4-bit weights as they are on CPUs with bfloat16 units.

    There bitsandbytes repacks a layer at its first evaluation, for good, with scales rounded to bfloat16: training
    would go on with other weights than before, and layers whose width is no multiple of the block size crash.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def build_quantization(quantization: QuantizationSection, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Builds the bitsandbytes settings.

    Raises:
        MachineError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MachineError(
            "quantization needs bitsandbytes, which is not installed",
            where="quantization",
            fix='pip install "forge-finetune[qlora]"',
        )
    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=getattr(torch, quantization.bnb_4bit_quant_storage),
    )


def choose_attention(spec: RunSpec, compute: Compute) -> str | None:
    """Chooses the attention code: flash attention where it can run, else the architecture's own choice.

    That is sdpa for most; some have no sdpa (Gemma 2) and take eager.

    Returns:
        The name to load with; ``None`` leaves the choice to transformers.

    Raises:
        MachineError: flash_attention_2 is asked for and cannot run here.
    """
    wanted = spec.model.attn_implementation
    can_flash = (
        compute.device.startswith("cuda")
        and compute.dtype is not torch.float32
        and torch.cuda.get_device_capability() >= (8, 0)
        and is_flash_attn_2_available()
    )
    if wanted == "flash_attention_2" and not can_flash:
        raise MachineError(
            "flash_attention_2 cannot run here",
            where="model.attn_implementation",
            why="it needs a CUDA GPU of compute capability 8.0, the flash-attn package, and bf16 or fp16",
            fix="use model.attn_implementation: auto or sdpa",
        )
    if wanted != "auto":
        return wanted
    return "flash_attention_2" if can_flash else None


def check_lengths(spec: RunSpec, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compares the loaded model with its tokenizer and with ``data.max_length``.

    Raises:
        ModelError: The tokenizer knows more tokens than the embedding has rows, or rows are longer than positions.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {rows} embeddings",
            why="a token without an embedding ends the run in the middle",
            fix="use the tokenizer that belongs to the model",
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and spec.data.max_length > positions:
        raise ModelError(
            f"data.max_length is {spec.data.max_length} and the model has {positions} positions",
            fix=f"set data.max_length: {positions} or less",
        )


def describe_model(spec: RunSpec, compute: Compute, model: torch.nn.Module) -> str:
    """Says in one line what was loaded and in which formats."""
    attention = model.config._attn_implementation
    held = dtype_name(compute.weight_dtype)
    if spec.quantization:
        kind = spec.quantization.bnb_4bit_quant_type if spec.quantization.bits == 4 else "int8"
        held = f"{kind} ({spec.quantization.bits}-bit), rest {held}"
    return f"{spec.model.name}: weights {held}, compute {dtype_name(compute.dtype)}, attention {attention}"
