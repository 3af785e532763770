"""What ``forge estimate`` is asked about: a run file, or a model with sensible defaults."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from forge_cli.errors import ConfigError, ForgeError, ModelError
from forge_cli.estimate.budget import Device
from forge_cli.estimate.devices import check_device, choose_device
from forge_cli.estimate.memory import MemoryEstimate, estimate_memory
from forge_cli.estimate.plan_memory import setting_from_plan
from forge_cli.estimate.setting import Setting
from forge_cli.estimate.sharding import Sharding, read_sharding, shard
from forge_cli.facts.model_facts import find_model_facts
from forge_cli.resolve.plan import Plan, resolve_mapping, resolve_plan
from forge_cli.schema.data import DataSection

# Memory does not depend on the rows; they only have to be there for a plan to hold.
_STAND_INS = {"data.train": "forge:quickstart/train", "data.eval": "forge:quickstart/heldout"}
_LENGTHS = [2**n for n in range(8, 14)]
_VARIED = ("preset", "method", "extends", "lora", "quantization", "quantization.bits", "model.adapter")


@dataclass(frozen=True)
class Question:
    """What is asked about: a run file, or a model with the qlora preset.

    Attributes:
        run_file: The run file.
        model: Name of a model, in its place.
        overrides: ``--set``.
        gpu: ``--gpu``.
        memory: ``--memory``.
        spread: ``--sharding``.
        json: ``--json``.
        needs_rows: The rows are read; else missing files are no obstacle.
    """

    run_file: Path | None
    model: str | None
    overrides: tuple[str, ...] = ()
    gpu: str | None = None
    memory: str | None = None
    spread: str | None = None
    json: bool = False
    needs_rows: bool = False
    _missing: dict[str, str] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for text in self.overrides if self.model is not None else ():
            if text.partition("=")[0].strip() == "model.name":
                raise ConfigError("--model and --set model.name both name the model", fix="give one of them")
        # Read here, so that every question refuses what it cannot read.
        _ = self.sharding

    @cached_property
    def sharding(self) -> Sharding | None:
        """How the run is spread over devices; ``None`` for one device."""
        return None if self.spread is None else read_sharding(self.spread)

    def resolve(self, more: Sequence[str] = ()) -> Plan:
        """Resolves the plan with further overrides on top."""
        try:
            plan = self._resolve([*self._missing.values(), *more])
        except ConfigError as error:
            missing = {one.path for one in error.problems if one.what.startswith("no such file")} & set(_STAND_INS)
            if self.needs_rows or not missing:
                raise
            self._missing.update({path: f"{path}={_STAND_INS[path]}" for path in sorted(missing)})
            print(
                f"note: {' and '.join(self._missing)} {'are' if len(self._missing) > 1 else 'is'} not there yet: "
                "rows are taken at full length",
                file=sys.stderr,
            )
            plan = self._resolve([*self._missing.values(), *more])
        # A plan with other rows is another plan.
        return plan._replace(digest="") if self._missing else plan

    def _resolve(self, more: Sequence[str]) -> Plan:
        if self.run_file is not None:
            return resolve_plan(self.run_file, [*self.overrides, *more])
        data: dict[str, object] = {"train": _STAND_INS["data.train"], "packing": True}
        length = DataSection.model_fields["max_length"].default
        if self._positions and self._positions < length:
            data["max_length"] = self._positions
        values = {"preset": "qlora", "model": {"name": self.model}, "data": data}
        return resolve_mapping(values, [*self.overrides, *more])

    @cached_property
    def _positions(self) -> int | None:
        try:
            facts = find_model_facts(self.model or "")
        except (ForgeError, OSError, RuntimeError, ValueError):  # said when the plan is resolved
            return None
        return facts.max_position_embeddings if facts else None

    def estimate(self, plan: Plan) -> MemoryEstimate:
        """Estimates a plan, on one rank if it is spread; see :meth:`read_setting`."""
        return self.estimate_setting(self.read_setting(plan))

    def estimate_setting(self, setting: Setting) -> MemoryEstimate:
        """Estimates a step, on one rank if it is spread."""
        found = estimate_memory(setting)
        return found if self.sharding is None else shard(found, self.sharding)

    def read_setting(self, plan: Plan) -> Setting:
        """Returns what the memory of a plan depends on.

        Raises:
            ModelError: The model's shape is not known, or its architecture cannot be replayed.
            ConfigError: The GPU that is asked about cannot compute it.
        """
        setting = setting_from_plan(plan)
        if setting is None:
            refuse(plan)
        if (device := self.device) and device.gpu:
            check_device(plan.spec, device.gpu)
        return setting

    @cached_property
    def device(self) -> Device | None:
        """The device asked about, or the visible one; ``None`` without either."""
        return choose_device(self.gpu, self.memory)

    def need_device(self) -> Device:
        """Returns the device.

        Raises:
            ConfigError: None is named and none is visible.
        """
        if self.device is None:
            raise ConfigError("no GPU is visible here", fix="name one: --gpu rtx-4090, or --memory 24GiB")
        return self.device

    def list_lengths(self) -> list[str]:
        """Lists lengths for a picture, as far as the model's positions go."""
        facts = self.resolve().facts
        most = facts.max_position_embeddings if facts else None
        found = [length for length in _LENGTHS if not most or length <= most] or [most]
        return [str(length) for length in found]

    def as_method(self, preset: str) -> Question:
        """Returns the same question about one method of the table.

        Settings of sections that the method does not have are left out: they would switch the section on.

        Raises:
            ConfigError: ``--set`` names what the table varies.
        """
        paths = [text.partition("=")[0].strip() for text in self.overrides]
        for path in paths:
            if path in _VARIED or path == "training.activation_checkpointing":
                raise ConfigError(
                    f"--set {path}: the table of methods varies it",
                    fix="leave it out, or write a run file and estimate that",
                )
        off = {"sft": ("lora", "quantization"), "lora": ("quantization",), "qlora": ()}[preset]
        kept = [
            text
            for path, text in zip(paths, self.overrides, strict=True)
            if not path.startswith(tuple(f"{one}." for one in off))
        ]
        return replace(self, overrides=(f"preset={preset}", *kept, *(f"{one}=null" for one in off)))


def refuse(plan: Plan) -> None:
    """Says why a plan cannot be estimated.

    Raises:
        ModelError: Always.
    """
    facts = plan.facts
    if facts is None:
        raise ModelError(
            f"the shape of {plan.spec.model.name} is not known here",
            why="it is a hub model that is not on Forge's shelf, and no network is used for an estimate",
            fix="download its config.json into a folder and give that folder as model.name",
        )
    raise ModelError(
        f"the architecture {facts.model_type} cannot be replayed",
        why="Forge does not know which of its tensors autograd keeps, and does not guess",
        fix="`forge estimate --trace` traces the real model on this CPU",
    )
