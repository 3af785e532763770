"""Leaves the number format of adapters' inputs to mixed precision.

PEFT casts the input of every adapter to the adapter's float32, and autocast casts it back to 16 bit for the
multiplication: two copies and, for each adapter, one that stays for the backward pass. A 16-bit number survives both
casts unchanged, so leaving them out changes no result.
"""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import nn


def leave_inputs_to_autocast(model: nn.Module) -> int:
    """Makes adapters take their input as it is wherever autocast is on; elsewhere PEFT's cast stays.

    DoRA's layers are left alone: they compute norms of weights in the input's format.

    Returns:
        How many layers it concerns.
    """
    layers = [module for module in model.modules() if isinstance(module, LoraLayer) and not module.lora_variant]
    for layer in layers:
        layer._cast_input_dtype = _cast_without_autocast
    return len(layers)


def _cast_without_autocast(x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Casts an input ``[B, T, D]`` unless autocast will."""
    if x is None or x.dtype == dtype or torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(dtype)
