"""Peak memory of this process by phase, on the GPU if there is one; and what it is to run out of it."""

from __future__ import annotations

import errno
import gc
import resource
import sys

import torch
from transformers import TrainerCallback

# How torch's own allocators and NVIDIA's libraries say it where they raise no error of a kind of its own.
_OUT_OF_MEMORY = ("out of memory", "defaultcpuallocator", "cublas_status_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a failure is one of memory, of a GPU or of this machine."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):  # torch.OutOfMemoryError is one
        return isinstance(error, torch.OutOfMemoryError) or any(w in str(error).lower() for w in _OUT_OF_MEMORY)
    return isinstance(error, MemoryError)


def free_memory() -> None:
    """Gives back what nothing holds any more; to be called where no handled error holds tensors in its frames."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def has_counter() -> bool:
    """Whether torch counts allocated memory here; without a GPU only the whole process's is known."""
    return torch.cuda.is_available()


class MemoryCallback(TrainerCallback):
    """Reads torch's counters at the borders of a run's phases; reading them costs no synchronisation.

    Attributes:
        phases: Phase to its highest allocated bytes (``load``, ``preparation``, ``forward and backward``,
            ``optimizer step``, ``evaluation``); empty without a GPU.
    """

    def __init__(self) -> None:
        self.phases: dict[str, int] = {}

    def mark(self, phase: str) -> None:
        """Ends a phase: its highest point is kept, and a new one begins."""
        if has_counter():
            self.phases[phase] = max(self.phases.get(phase, 0), torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        """Returns the training's peak: allocated on the GPU, else resident bytes of this process."""
        if has_counter():
            in_training = [size for phase, size in self.phases.items() if phase not in ("load", "preparation")]
            return max([*in_training, torch.cuda.max_memory_allocated()])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def describe_device(self) -> dict[str, object]:
        """Returns ``gpu``, and the bytes that torch has reserved and the driver has given out; empty without one."""
        if not has_counter():
            return {}
        free, total = torch.cuda.mem_get_info()
        return {
            "gpu": torch.cuda.get_device_name(0),
            "allocated_bytes": self.peak_bytes(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "device_bytes": total - free,
            "total_bytes": total,
        }

    # What the Trainer calls -----------------------------------------------------------------------------------

    def on_substep_end(self, args, state, control, **kwargs):
        """A micro step that is no update yet."""
        self.mark("forward and backward")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """The last micro step before an update."""
        self.mark("forward and backward")

    def on_step_end(self, args, state, control, **kwargs):
        """An update is made."""
        self.mark("optimizer step")

    def on_evaluate(self, args, state, control, **kwargs):
        """An evaluation is over."""
        self.mark("evaluation")
