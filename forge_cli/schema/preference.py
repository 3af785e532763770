"""Learning from preferences: pairs of a better and a worse answer, or answers marked good or bad."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from forge_cli.schema.section import LARGEST_FACTOR, Section

PreferenceLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
    "kto",
    "apo_zero_unpaired",
    "simpo",
]


class PreferenceSection(Section):
    """Settings of the methods dpo, kto, orpo, cpo and reward, under TRL's names. ``method`` is the switch."""

    loss_type: PreferenceLoss | list[PreferenceLoss] | None = Field(
        default=None, description="Loss. null: sigmoid for dpo and cpo, kto for kto. dpo also takes a list, summed."
    )
    loss_weights: list[Annotated[float, Field(ge=0, le=LARGEST_FACTOR)]] | None = Field(
        default=None, description="Weight of each loss when loss_type is a list. null: 1 each."
    )
    beta: float = Field(
        default=0.1,
        gt=0,
        le=LARGEST_FACTOR,
        description="How strongly the model is held to the reference; for orpo, weight of the odds.",
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=0.5, description="Assumed share of pairs whose answers are the wrong way round."
    )
    reference: str = Field(
        default="auto",
        min_length=1,
        description="What the model is compared with: base, adapter (model.adapter as it was), or the folder of an "
        "adapter or a model. auto: adapter when model.adapter is given, else base.",
    )
    precompute_ref_log_probs: bool = Field(
        default=False, description="Run the reference once, before training, and keep its log probabilities on disk."
    )
    desirable_weight: float = Field(
        default=1.0, gt=0, le=LARGEST_FACTOR, description="Weight of the good answers, for kto."
    )
    undesirable_weight: float = Field(
        default=1.0, gt=0, le=LARGEST_FACTOR, description="Weight of the bad answers, for kto."
    )
    cpo_alpha: float = Field(
        default=1.0,
        ge=0,
        le=LARGEST_FACTOR,
        description="Weight of the plain loss on the better answer, for cpo; 0 is SimPO proper.",
    )
    simpo_gamma: float = Field(
        default=0.5, ge=0, le=LARGEST_FACTOR, description="Margin between the answers, for cpo's simpo loss."
    )
    center_rewards_coefficient: float | None = Field(
        default=None,
        gt=0,
        le=LARGEST_FACTOR,
        description="Pulls the mean of both rewards to 0, for reward. null: not at all.",
    )
