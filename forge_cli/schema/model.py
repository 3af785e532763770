"""Which model is trained, and in which number format its frozen weights are held."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from forge_cli.schema.section import Section

DType = Literal["auto", "float32", "bfloat16", "float16"]


class ModelSection(Section):
    """The base model."""

    name: str = Field(
        min_length=1,
        description="Hub name (org/name), alias (forge models list) or local folder. forge-tiny is the embedded model.",
    )
    adapter: str | None = Field(
        default=None, description="Folder of a LoRA adapter to go on training; lora takes its rank, scale and targets."
    )
    chat_template: str | None = Field(
        default=None, description="File with a Jinja chat template, in place of the tokenizer's own."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    dtype: DType = Field(
        default="auto",
        description="Number format of the loaded weights. auto: the compute format for a frozen base, float32 master "
        "weights for a trained one.",
    )
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        default="auto", description="Attention code. auto: flash_attention_2 if it is installed and can run, else sdpa."
    )


class QuantizationSection(Section):
    """Quantised frozen weights, by bitsandbytes. Presence is the switch."""

    bits: Literal[4, 8] = Field(default=4, description="4 or 8 bits per weight.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(default="nf4", description="4-bit code book.")
    bnb_4bit_use_double_quant: bool = Field(
        default=True, description="Quantise the quantisation constants too (saves about 0.4 bits per weight)."
    )
    bnb_4bit_compute_dtype: DType = Field(
        default="auto", description="Number format of the multiplications. auto: the precision of the run."
    )
    bnb_4bit_quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = Field(
        default="uint8", description="Number format that the packed 4-bit weights are stored as (matters for FSDP)."
    )
