"""Presets for Python: the same YAML, handed to the libraries' own objects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

from forge_cli.errors import ConfigError, Problem
from forge_cli.resolve.layers import load_preset
from forge_cli.schema.runspec import RunSpec

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig, TrainingArguments

# A preset says how to train, never what: these two sections are the run file's own.
_WHAT = {"model": {"name": "unset"}, "data": {"train": "unset"}}
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
            the prefix ``lora_``, such as ``lora_r=32``.

    Raises:
        ConfigError: No such preset or setting, or a value that is not allowed.
    """
    values: dict[str, object] = {**load_preset(name).data, **_WHAT}
    problems: list[Problem] = []
    for key, value in overrides.items():
        section, field = _find_setting(key)
        if not section:
            problems.append(Problem("get_preset", key, "no such setting", "", _nearest(key)))
            continue
        present = values.get(section)
        values[section] = {**(present if isinstance(present, dict) else {}), field: value}
    if problems:
        raise ConfigError.from_problems(problems)
    try:
        return Preset(name, RunSpec.model_validate(values))
    except ValidationError as error:
        problems = [Problem("get_preset", ".".join(map(str, e["loc"])), e["msg"]) for e in error.errors()]
        raise ConfigError.from_problems(problems) from None


def _settings() -> dict[str, tuple[str, str]]:
    """Maps flat names to (section, field); a name that two sections share is left out."""
    from typing import get_args

    found: dict[str, tuple[str, str]] = {}
    twice: set[str] = set()
    for section in _SECTIONS:
        annotation = RunSpec.model_fields[section].annotation
        kinds = [kind for kind in (annotation, *get_args(annotation)) if hasattr(kind, "model_fields")]
        for field in kinds[0].model_fields:
            if field in found:
                twice.add(field)
            found[field] = (section, field)
            if section == "lora":
                found.setdefault(f"lora_{field}", (section, field))
    return {key: place for key, place in found.items() if key not in twice}


def _find_setting(key: str) -> tuple[str, str]:
    return _settings().get(key, ("", ""))


def _nearest(key: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(key, list(_settings()), n=1)
    return f"did you mean {close[0]}?" if close else "see forge config schema for all settings"
