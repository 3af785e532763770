"""The run file as a whole."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from forge_cli.schema.adapter import FreezeSection, LoraSection
from forge_cli.schema.averaging import EmaSection, MonitorSection
from forge_cli.schema.data import DataSection
from forge_cli.schema.model import ModelSection, QuantizationSection
from forge_cli.schema.preference import PreferenceSection
from forge_cli.schema.section import Section
from forge_cli.schema.training import (
    CheckpointSection,
    EvaluationSection,
    LoggingSection,
    ReportSection,
    TrainingSection,
)


class RunSpec(Section):
    """Everything one run file can say, after its layers are merged."""

    # Not Literal[1], which takes true for 1.
    version: int = Field(default=1, ge=1, le=1, description="Version of the run file's language.")
    preset: str | None = Field(default=None, description="Preset below this file (forge presets list).")
    extends: str | None = Field(default=None, description="Recipe below this file (forge recipes list).")
    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="Name of the run folder. null: the name of the run file, numbered.",
    )
    output_dir: str = Field(default="runs", min_length=1, description="Folder that holds the run folders.")
    seed: int = Field(default=42, ge=0, le=2**32 - 1, description="Seed of weights, row order and dropout.")
    method: Literal["sft", "dpo", "kto", "orpo", "cpo", "reward"] = Field(default="sft", description="Training method.")
    model: ModelSection
    quantization: QuantizationSection | None = Field(default=None, description="Quantised frozen weights.")
    data: DataSection
    lora: LoraSection | None = Field(default=None, description="LoRA adapters; null trains the whole model.")
    preference: PreferenceSection = Field(
        default_factory=PreferenceSection, description="Settings of the methods that learn from preferences."
    )
    freeze: FreezeSection | None = Field(default=None, description="Layers that stay frozen.")
    ema: EmaSection | None = Field(default=None, description="Moving average of the trained weights.")
    monitor: MonitorSection | None = Field(default_factory=MonitorSection, description="Gradient norms and alarms.")
    training: TrainingSection = Field(default_factory=TrainingSection, description="Optimisation.")
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection, description="Evaluation while training.")
    checkpoint: CheckpointSection | None = Field(default_factory=CheckpointSection, description="Checkpoints.")
    logging: LoggingSection = Field(default_factory=LoggingSection, description="Logs and trackers.")
    report: ReportSection | None = Field(default_factory=ReportSection, description="Answers for the report.")
