"""Measures one case of ``estimate_gpu.py`` in a process of its own.

Reads a request as one line of JSON on stdin, once all libraries are loaded, and writes the answer to a file. The run is
``forge train``'s own, from the reading of the rows to the end of the training; only the reading of weights from disk is
replaced by drawing them on the device.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from estimate_gpu_cases import NUM_STEPS, write_rows
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback

from forge_cli.backend import methods  # noqa: F401  (TRL and PEFT are loaded before the request comes)
from forge_cli.build import model as loading
from forge_cli.errors import ForgeError
from forge_cli.parts import memory as memories
from forge_cli.parts.cuda_likeness import cpu_workspaces
from forge_cli.parts.memory_trace import LiveBytes
from forge_cli.resolve.plan import resolve_mapping
from forge_cli.run import execute

# Free memory has to exceed the prediction by this (ratio).
ROOM = 1.10


class Drawn:
    """A weight in a file that does not exist: drawn when it is read, as transformers reads slices of safetensors."""

    def __init__(self, number: int, shape: torch.Size, dtype: torch.dtype, device: str) -> None:
        self.number, self.shape, self.dtype, self.device = number, shape, dtype, device

    def __getitem__(self, index) -> torch.Tensor:
        # Threads read in any order; a second copy of the model has to be the same.
        chance = torch.Generator(self.device).manual_seed(self.number)
        weight = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return weight.normal_(0.0, 0.02, generator=chance) if len(self.shape) > 1 else weight.fill_(1.0)


def draw_model(place: str, *, dtype: torch.dtype, device_map: dict, **options) -> torch.nn.Module:
    """Stands for ``from_pretrained``: the same loading, into the same formats and 4-bit layers, without a file."""
    config = AutoConfig.from_pretrained(place)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    weights = {
        name: Drawn(number, one.shape, dtype, device_map[""])
        for number, (name, one) in enumerate(skeleton.state_dict().items())
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    for name in ("revision", "use_safetensors", "trust_remote_code"):
        options.pop(name)
    model = type(skeleton).from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, device_map=device_map, **options
    )
    model.name_or_path = model.config.name_or_path = place
    return model


class RealBytes(LiveBytes):
    """Leaves out what takes no memory: transformers makes every model on the meta device first."""

    def _count(self, tensor: torch.Tensor, op: str) -> None:
        if not tensor.is_meta:
            super()._count(tensor, op)


class LiveMemory(memories.MemoryCallback):
    """Marks the same phases on the CPU, by following live tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.live = RealBytes(1, cpu_workspaces())
        self.live.mark("now")

    def mark(self, phase: str) -> None:
        """Ends a phase: its highest point is kept, and a new one begins."""
        self.phases[phase] = max(self.phases.get(phase, 0), self.live.peak_bytes)
        self.live.forget_peaks()
        self.live.mark("now")


class LastStep(TrainerCallback):
    """Times the last optimizer step, when all kernels are loaded, between two synchronisations."""

    seconds: float | None = None
    _began = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == NUM_STEPS - 1:
            self._began = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == NUM_STEPS:
            self.seconds = self._now() - self._began

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


class Enough(BaseException):
    """Ends a run after its training: nothing is saved, and nobody takes it for an error."""


class Silence:
    """A reporter that says nothing."""

    def __getattr__(self, name: str):
        return lambda *args, **kwargs: None


def measure(settings: dict) -> dict:
    """Trains a run file and returns what was measured."""
    plan, timer, train = resolve_mapping(settings), LastStep(), execute._run_training
    memory = memories.MemoryCallback() if torch.cuda.is_available() else LiveMemory()
    found: dict = {}

    def train_and_look(plan, trainer, reporter) -> None:
        trainer.add_callback(timer)
        train(plan, trainer, reporter)
        found.update(memory.describe_device(), phases=dict(memory.phases), step_seconds=timer.seconds)
        raise Enough

    with (
        mock.patch.object(loading.AutoModelForCausalLM, "from_pretrained", draw_model),
        mock.patch.object(memories, "MemoryCallback", lambda: memory),
        mock.patch.object(execute, "_run_training", train_and_look),
        # In the order of the file, so that every batch has a long row.
        mock.patch.object(
            Trainer, "_get_train_sampler", lambda self, *_: torch.utils.data.SequentialSampler(self.train_dataset)
        ),
        getattr(memory, "live", contextlib.nullcontext()),
        contextlib.suppress(Enough),
    ):
        execute.train_plan(plan, overwrite=True, reporter=Silence())
    return {"status": "measured", **found}


def answer(request: dict) -> dict:
    """Measures a request if there is room for it; what goes wrong is part of the answer."""
    needed = request["predicted_bytes"] * ROOM
    if torch.cuda.is_available() and needed > (free := torch.cuda.mem_get_info()[0]):
        return {"status": "skipped", "reason": f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"}
    settings = request["settings"]
    try:
        write_rows(settings, request["uneven"], AutoTokenizer.from_pretrained(settings["model"]["name"]))
        return measure(settings)
    except ForgeError as error:
        reason = "; ".join(f"{one.what} ({one.why})" if one.why else one.what for one in error.problems)
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if "--debug" in sys.argv:
            raise
    return {"status": "failed", "reason": reason[:300]}


def main() -> None:
    """Answers one request."""
    line = sys.stdin.readline()
    if not line.strip():
        return
    # If importing alone takes memory of the GPU, so does the process that waits for the next case.
    has_context = getattr(torch._C, "_cuda_hasPrimaryContext", lambda device: True)
    is_alone = torch.cuda.is_available() and not has_context(0)
    request = json.loads(line)
    found = answer(request)
    if not is_alone:
        found.pop("device_bytes", None)
    Path(request["answer"]).write_text(json.dumps(found))
    sys.stdout.flush()
    # Threads of libraries must not keep the GPU's memory from the next case.
    os._exit(0)


if __name__ == "__main__":
    main()
