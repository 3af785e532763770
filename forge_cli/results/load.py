"""Loads what a run trained, the way it was trained: the same base, format, tokenizer and prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from forge_cli.build.adapter import load_adapter
from forge_cli.build.compute import Compute, choose_compute
from forge_cli.build.model import load_model
from forge_cli.build.tokenizer import load_tokenizer
from forge_cli.errors import ModelError
from forge_cli.results.find import Run
from forge_cli.schema.runspec import RunSpec


@dataclass(frozen=True)
class LoadedRun:
    """A trained model, ready to be asked.

    Attributes:
        run: Where it came from.
        model: In evaluation mode; a PEFT model for an adapter, whose ``disable_adapter()`` is the base.
        tokenizer: As saved with the weights, chat template included.
        compute: Device and formats.
        system_prompt: What all training conversations began with; ``None`` if they did not.
        end_token_ids: Where an answer ends.
    """

    run: Run
    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    compute: Compute
    system_prompt: str | None
    end_token_ids: list[int]

    def autocast(self) -> torch.autocast:
        """Returns the context that the run's evaluations were computed in."""
        dtype = self.compute.autocast_dtype
        return torch.autocast(self.compute.device.partition(":")[0], dtype=dtype, enabled=dtype is not torch.float32)


def load_run(run: Run, *, which: str = "ema", quantized: bool = True) -> LoadedRun:
    """Loads the trained model of a run.

    Args:
        run: The run.
        which: ``ema`` (the weights to use) or ``raw`` (the last step's), as for :meth:`Run.weights`.
        quantized: Load a quantised run's base as it was trained on; ``False`` loads it in the compute format.

    Raises:
        ForgeError: Weights are missing or do not fit, or the machine cannot hold or run them.
    """
    folder = run.weights(which)
    spec = run.plan.spec
    if spec.method == "reward":
        raise ModelError("a reward model scores answers and writes none", where=str(run.path), fix="name another run")
    if not quantized:
        spec = spec.model_copy(update={"quantization": None})
    own = _change_model(spec, name=str(folder), revision=None, chat_template=None)
    if run.kind == "model":
        compute = choose_compute(own)
        model, tokenizer = load_model(own, compute), load_tokenizer(own)
    else:
        compute = choose_compute(spec)
        model = load_adapter(load_model(spec, compute), str(folder), PeftConfig.from_pretrained(str(folder)))
        tokenizer = load_tokenizer(_change_model(spec, adapter=str(folder), chat_template=None))
    model.eval()
    model.config.use_cache = True
    asking = run.asking()
    ends = asking.get("end_token_ids") or [tokenizer.eos_token_id]
    return LoadedRun(run, model, tokenizer, compute, asking.get("system_prompt"), [int(one) for one in ends])


def _change_model(spec: RunSpec, **changes: object) -> RunSpec:
    return spec.model_copy(update={"model": spec.model.model_copy(update=changes)})
