"""Runs a plan's training step on fake tensors and follows its memory: Forge's model, trainer and loop, no numbers."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import datasets
import torch
import transformers.masking_utils
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from transformers import TrainerCallback

from forge_cli.backend import methods
from forge_cli.backend.traced_kernels import cuda_loss
from forge_cli.build import compute
from forge_cli.build.adapter import prepare_trainable
from forge_cli.build.callbacks import build_ema, build_monitor
from forge_cli.build.fake_model import build_fake_model, cuda_int8, list_held
from forge_cli.build.tokenizer import load_tokenizer
from forge_cli.facts.shape import ModelFacts
from forge_cli.parts.cuda_likeness import (
    CudaAutocast,
    KnownValues,
    convert_fake,
    cpu_workspaces,
    cuda_workspaces,
    keep_cuda_autocast,
)
from forge_cli.parts.layers import find_decoder_layers, unwrap_model
from forge_cli.parts.memory_trace import CUDA_GRANULE, LiveBytes
from forge_cli.schema.runspec import RunSpec

NUM_STEPS = 2
# Smaller states are not paged. Source: bitsandbytes 0.50, Optimizer8bit.get_state_buffer.
PAGED_ELEMENTS = 100_000


@dataclass(frozen=True)
class Scene:
    """What is traced.

    Attributes:
        spec: The run file.
        facts: The model's shape.
        num_layers: Decoder layers to build.
        num_frozen: How many of them ``freeze.first`` freezes.
        device: ``cuda`` or ``cpu``: whose number formats, kernels and rounding.
        masked: Whether attention needs a mask that is written out: rows of different lengths, or packed rows without
            flash attention.
    """

    spec: RunSpec
    facts: ModelFacts
    num_layers: int
    num_frozen: int = 0
    device: str = "cuda"
    masked: bool = False


def trace_step(scene: Scene, keeps_events: bool = False) -> LiveBytes:
    """Traces two optimizer steps and keeps the peaks of the second, when optimizer states exist.

    Returns:
        The peaks of ``load``, ``forward``, ``loss``, ``backward/loss``, ``backward/last layer``, ``backward/layers``,
        ``backward/first layer``, ``backward/end`` and ``step``.
    """
    spec, on_gpu = shrink(scene), scene.device == "cuda"
    formats = choose_traced_compute(spec, on_gpu)
    live = LiveBytes(CUDA_GRANULE if on_gpu else 1, cuda_workspaces() if on_gpu else cpu_workspaces(), keeps_events)
    with tempfile.TemporaryDirectory() as folder, _pretending(scene):
        model = build_fake_model(spec, scene.facts, formats, scene.num_layers)
        model, _ = prepare_trainable(model, spec)
        for layer in find_decoder_layers(model) if on_gpu else ():
            keep_cuda_autocast(layer)
        live.mark("load")
        live.register(list_held(model), "weight")
        live.mark("set-up")
        trainer = _build_trainer(spec, model, formats, Path(folder), live, on_gpu)
        with live:
            trainer.train()
    return live


def shrink(scene: Scene) -> RunSpec:
    """Leaves of a run file what a step needs: two optimizer steps of at most two micro steps, and nothing saved."""
    spec = scene.spec
    training = {
        "max_steps": NUM_STEPS,
        "gradient_accumulation_steps": min(spec.training.gradient_accumulation_steps, 2),
    }
    changes: dict[str, object] = {
        "model": spec.model.model_copy(update={"adapter": None, "chat_template": None, "name": "forge-tiny"}),
        "training": spec.training.model_copy(update=training),
        "logging": spec.logging.model_copy(update={"report_to": [], "logging_steps": NUM_STEPS}),
        "checkpoint": None,
        "report": None,
    }
    if scene.num_frozen:
        changes["freeze"] = spec.freeze.model_copy(update={"first": scene.num_frozen})
    if scene.device == "cuda" and spec.ema and spec.ema.device == "cpu":
        changes["ema"] = None  # it is in the host's memory
    return spec.model_copy(update=changes)


def choose_traced_compute(spec: RunSpec, on_gpu: bool) -> compute.Compute:
    """Chooses the formats that :func:`forge_cli.build.compute.choose_compute` would, on a GPU that has bfloat16."""
    place = ("cuda:0", "traced GPU") if on_gpu else ("cpu", "CPU")
    with (
        mock.patch.object(compute, "_find_device", lambda *_: place),
        mock.patch.object(torch.cuda, "is_bf16_supported", lambda **_: True),
    ):
        return replace(compute.choose_compute(spec), device="cpu")


@contextlib.contextmanager
def _pretending(scene: Scene) -> Iterator[None]:
    """Makes tensors fake, and on a GPU's behalf mends everything that would notice the CPU."""
    ask, masked = torch.is_autocast_enabled, scene.masked
    with contextlib.ExitStack() as stack:
        # With fake tensors transformers writes every mask out, as a graph that is traced needs it.
        stack.enter_context(mock.patch.object(transformers.masking_utils, "is_tracing", lambda *_: masked))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(KnownValues())
        stack.enter_context(mock.patch.object(torch.nn.Module, "to", convert_fake))
        if scene.device == "cuda":
            # PEFT asks about CUDA, by asking about nothing.
            stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", lambda device="cpu": ask(device)))
            stack.enter_context(cuda_loss())
            if scene.spec.quantization and scene.spec.quantization.bits == 8:
                stack.enter_context(cuda_int8())
            stack.enter_context(CudaAutocast())
        yield


def _build_trainer(
    spec: RunSpec, model: torch.nn.Module, formats: compute.Compute, folder: Path, live: LiveBytes, on_gpu: bool = False
):
    """Builds Forge's own trainer around rows of full length, and marks the phases of its step."""
    length, batch = spec.data.max_length, spec.training.per_device_train_batch_size
    row = {"input_ids": [1] * length, "labels": [1] * length, "row": 0}
    if spec.data.packing:
        row["seq_lengths"] = [length - length // 2, length // 2]
    args = methods.build_training_args(
        spec, output_dir=folder, compute_dtype=formats.autocast_dtype, device="cpu", has_eval=False
    )
    trainer = methods.build_trainer(
        spec,
        model=model,
        tokenizer=load_tokenizer(spec),
        args=args,
        train_dataset=datasets.Dataset.from_list([row]),
        eval_dataset=None,
        monitor=build_monitor(spec),
        ema=build_ema(spec),
        callbacks=[_StepMarks(live, pages=on_gpu and spec.training.optim.startswith("paged"))],
    )
    if on_gpu:
        _group_updates(trainer)
    num_batches = NUM_STEPS * spec.training.gradient_accumulation_steps
    trainer.get_train_dataloader = lambda: _Batches(trainer.data_collator, [row] * batch, num_batches)
    _mark_phases(trainer, model, live, spec.freeze.first or 0 if spec.freeze else 0)
    return trainer


def _group_updates(trainer) -> None:
    """Lets optimizers without a choice update all weights at once, as they do by default on CUDA alone."""
    create = trainer.create_optimizer

    def create_optimizer(*args, **kwargs):
        optimizer = create(*args, **kwargs)
        for group in optimizer.param_groups:
            if "foreach" in group and not group.get("fused"):
                group["foreach"] = True
        return optimizer

    trainer.create_optimizer = create_optimizer


class _Batches:
    """Stands for a data loader: the same full rows again and again."""

    def __init__(self, collator, rows: list[dict], num_batches: int) -> None:
        self.collator, self.rows, self.num_batches = collator, rows, num_batches

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[dict]:
        for _ in range(self.num_batches):
            with _disable_current_modes():  # collators read values
                batch = self.collator(self.rows)
            yield {key: torch.ones_like(one) if torch.is_tensor(one) else one for key, one in batch.items()}


class _StepMarks(TrainerCallback):
    """Marks the optimizer's phase, and forgets the first step."""

    def __init__(self, live: LiveBytes, pages: bool) -> None:
        self.live = live
        self.pages = pages

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == NUM_STEPS - 1:
            self.live.forget_peaks(but="load")
        self.live.mark("forward")

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.live.mark("step")

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.live.mark("between steps")
        if self.pages:
            states = [one[name] for one in optimizer.state.values() for name in ("state1", "state2")]
            self.live.leave_out(one for one in states if one.numel() >= PAGED_ELEMENTS)


def _mark_phases(trainer, model: torch.nn.Module, live: LiveBytes, num_frozen: int) -> None:
    """Marks where the layers begin and end, and in the backward pass how far it has come.

    Layers are told apart as the peak may lie at either end: with what all layers saved, or with all gradients.
    """
    body, layers = unwrap_model(model).base_model, find_decoder_layers(model)
    body.register_forward_pre_hook(lambda *_: live.mark("forward"))
    body.register_forward_hook(lambda *_: live.mark("loss"))
    backward = trainer.accelerator.backward

    def marked_backward(*args, **kwargs) -> None:
        live.mark("backward/loss")
        backward(*args, **kwargs)

    trainer.accelerator.backward = marked_backward
    names = ["backward/layers"] * len(layers)
    names[-1] = "backward/last layer"
    names[num_frozen] = names[0] = "backward/first layer"
    for index, layer in enumerate(layers):
        layer.register_forward_hook(_mark_gradient(live, names[index]))
    layers[0].register_forward_pre_hook(_mark_end(live), with_kwargs=True)


def _mark_gradient(live: LiveBytes, phase: str):
    def hook(module, inputs, output) -> None:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        if hidden.requires_grad and live.phase == "forward":
            hidden.register_hook(lambda _: live.mark(phase))

    return hook


def _mark_end(live: LiveBytes):
    def hook(module, args, kwargs) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.requires_grad and live.phase == "forward":
            hidden.register_hook(lambda _: live.mark("backward/end"))

    return hook
