"""Presets for Python: the same YAML, handed to the libraries' own objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from forge_cli.errors import ConfigError
from forge_cli.resolve.plan import resolve_mapping
from forge_cli.schema.runspec import RunSpec

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainingArguments

# A preset says how to train, never what; the run file's checks want something there.
_WHAT = {"model": {"name": "forge-tiny"}, "data": {"train": "forge:quickstart/train", "max_length": 128}}
# What the objects that a preset hands out are made of; freezing, EMA and monitor have their own functions in Python.
_SECTIONS = ("training", "lora", "quantization", "logging")


class Preset:
    """A method with its starting values.

    Attributes:
        name: ``sft``, ``lora``, ``qlora``, ``memory_efficient``, ...
        spec: All values, in the sections of a run file.
    """

    def __init__(self, name: str, spec: RunSpec) -> None:
        self.name = name
        self.spec = spec

    def print_info(self) -> None:
        """Prints the sections and values of the preset."""
        print(f"preset {self.name}")
        for section in _SECTIONS:
            values = getattr(self.spec, section)
            if values is None:
                continue
            print(f"  {section}")
            for field, value in values.model_dump().items():
                print(f"    {field:30} {value}")

    def get_bnb_config(self) -> BitsAndBytesConfig | None:
        """Returns the quantisation for ``from_pretrained(quantization_config=...)``; ``None`` without one."""
        from forge_cli.build.compute import choose_compute
        from forge_cli.build.model import build_quantization

        if self.spec.quantization is None:
            return None
        return build_quantization(self.spec.quantization, choose_compute(self.spec).quantized_dtype)

    def get_lora_config(self) -> LoraConfig:
        """Returns PEFT's settings.

        Raises:
            ConfigError: The preset trains the whole model.
        """
        from forge_cli.build.adapter import build_lora_config

        if self.spec.lora is None:
            raise ConfigError(
                f"preset {self.name} has no adapters", fix='use get_preset("lora") or get_preset("qlora")'
            )
        return build_lora_config(self.spec.lora)

    def get_training_args(self) -> TrainingArguments:
        """Returns arguments for a plain ``transformers.Trainer``, in the precision of this machine."""
        from forge_cli.backend.plain import build_plain_args
        from forge_cli.build.compute import choose_compute

        compute = choose_compute(self.spec)
        return build_plain_args(self.spec, compute_dtype=compute.autocast_dtype, device=compute.device)


def get_preset(name: str, **overrides: object) -> Preset:
    """Returns a preset with some values changed.

    Args:
        name: A preset (``forge presets list``).
        **overrides: Values by the name of their setting, such as ``learning_rate=2e-4``; settings of LoRA also with
            the prefix ``lora_``, such as ``lora_r=32``. Freezing, EMA and monitor have their own functions in Python.

    Raises:
        ConfigError: No such preset or setting, or a value that is not allowed.
    """
    settings = _list_settings()
    values: dict[str, dict | object] = {"preset": name, **_WHAT}
    for key, value in overrides.items():
        if key in settings:
            section, field = settings[key]
            values.setdefault(section, {})[field] = value
        elif key in RunSpec.model_fields:
            raise ConfigError(f"get_preset: {key} reaches none of the objects that a preset hands out")
        else:
            values[key] = value  # unknown: the run file's own check says what was meant
    return Preset(name, resolve_mapping(values).spec)


def _list_settings() -> dict[str, tuple[str, str]]:
    """Maps the flat names of Python to (section, field)."""
    found: dict[str, tuple[str, str]] = {}
    for section in _SECTIONS:
        annotation = RunSpec.model_fields[section].annotation
        kind = next(kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields"))
        found |= {field: (section, field) for field in kind.model_fields}
    return found | {f"lora_{field}": place for field, place in found.items() if place[0] == "lora"}
