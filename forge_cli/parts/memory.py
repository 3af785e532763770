"""Peak memory of this process, on the GPU if there is one."""

from __future__ import annotations

import resource
import sys

import torch


def reset_peak_memory() -> None:
    """Starts a new peak on the GPU; a process's resident peak cannot be reset."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes() -> int:
    """Returns the peak of the GPU's allocated memory, or of this process's resident memory without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
