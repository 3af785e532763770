"""What is trained: LoRA adapters, and which layers stay frozen."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from forge_cli.schema.section import LARGEST_FACTOR, Section


class LoraSection(Section):
    """Low-rank adapters, by PEFT. Presence is the switch; without it the whole model is trained."""

    r: int = Field(default=16, ge=1, le=65_536, description="Rank of the adapters.")
    lora_alpha: float = Field(
        default=32, gt=0, le=LARGEST_FACTOR, description="Scale: the update is multiplied by lora_alpha / r."
    )
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapters' input.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        default="all-linear",
        description="Names of the linear layers that get an adapter; all-linear is expanded to names and shown.",
    )
    modules_to_save: list[str] = Field(
        default=[], description="Modules trained whole and saved with the adapter (embed_tokens, lm_head)."
    )
    use_rslora: bool = Field(default=False, description="Scale by lora_alpha / sqrt(r) instead of lora_alpha / r.")
    use_dora: bool = Field(default=False, description="Weight-decomposed adapters: better at low rank, slower.")
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = Field(
        default=True, description="How A and B start. true and gaussian change no output at step 0."
    )


class FreezeSection(Section):
    """Layers that are not trained, counted as decoder layers from the input. Presence is the switch."""

    first: Annotated[int, Field(ge=0, le=100_000)] | str | None = Field(
        default=None, description='How many of the first decoder layers stay frozen: a count (16) or a share ("50%").'
    )
    embeddings: bool | None = Field(
        default=None, description="Freeze the input embeddings. null: frozen when first is given."
    )
    patterns: list[str] = Field(default=[], description='Shell patterns of module names to freeze as well ("*.mlp.*").')
