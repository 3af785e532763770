"""Forge: fine-tune language models from one YAML run file, or from Python under the same names.

Names are imported when they are first used, so that ``import forge_cli`` imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from forge_cli.version import __version__

if TYPE_CHECKING:
    from forge_cli.api.model_info import estimate_model_memory, get_memory_savings_estimate, print_model_info
    from forge_cli.api.preset import Preset, get_preset
    from forge_cli.parts.ema import EMACallback
    from forge_cli.parts.freeze import freeze_layers, setup_lp_lora_style
    from forge_cli.parts.monitor import MonitorCallback
    from forge_cli.run.execute import train

_NAMES = {
    "EMACallback": "forge_cli.parts.ema",
    "MonitorCallback": "forge_cli.parts.monitor",
    "Preset": "forge_cli.api.preset",
    "estimate_model_memory": "forge_cli.api.model_info",
    "freeze_layers": "forge_cli.parts.freeze",
    "get_memory_savings_estimate": "forge_cli.api.model_info",
    "get_preset": "forge_cli.api.preset",
    "print_model_info": "forge_cli.api.model_info",
    "setup_lp_lora_style": "forge_cli.parts.freeze",
    "train": "forge_cli.run.execute",
}

__all__ = [
    "EMACallback",
    "MonitorCallback",
    "Preset",
    "__version__",
    "estimate_model_memory",
    "freeze_layers",
    "get_memory_savings_estimate",
    "get_preset",
    "print_model_info",
    "setup_lp_lora_style",
    "train",
]


def __getattr__(name: str) -> object:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_NAMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
