"""What ``forge estimate`` can be asked, one function per question."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from forge_cli.cli import estimate_text as text
from forge_cli.cli.render import print_json, print_table
from forge_cli.errors import ConfigError, DataError, ModelError
from forge_cli.estimate.budget import Device, make_budget
from forge_cli.estimate.devices import choose_device, list_devices
from forge_cli.estimate.memory import MemoryEstimate, estimate_memory
from forge_cli.estimate.plan_memory import setting_from_plan
from forge_cli.estimate.setting import Setting
from forge_cli.resolve.plan import Plan, resolve_mapping, resolve_plan

# The methods of the table, and the sensible defaults they are compared at.
METHODS = {"full": "sft", "LoRA": "lora", "QLoRA": "qlora"}
_ROWS = "forge:quickstart/train"


class Question(NamedTuple):
    """What is asked about: a run file, or a model with the qlora preset.

    Attributes:
        run_file: The run file.
        model: Name of a model, in its place.
        overrides: ``--set``.
        gpu: ``--gpu``.
        memory: ``--memory``.
        sharding: ``--sharding``.
        json: ``--json``.
    """

    run_file: Path | None
    model: str | None
    overrides: tuple[str, ...]
    gpu: str | None
    memory: str | None
    sharding: str | None
    json: bool

    def resolve(self, more: Sequence[str] = ()) -> Plan:
        """Resolves the plan with further overrides on top."""
        if self.run_file is not None:
            return resolve_plan(self.run_file, [*self.overrides, *more])
        values = {"preset": "qlora", "model": {"name": self.model}, "data": {"train": _ROWS, "packing": True}}
        return resolve_mapping(values, [*self.overrides, *more])

    def setting(self, more: Sequence[str] = ()) -> Setting:
        """Returns what the memory of the plan depends on.

        Raises:
            ModelError: The model's shape is not known, or its architecture cannot be replayed.
        """
        plan = self.resolve(more)
        found = setting_from_plan(plan)
        if found is None:
            refuse(plan)
        return found

    def estimate(self, more: Sequence[str] = ()) -> MemoryEstimate:
        """Estimates the plan with further overrides on top, on one rank if it is spread."""
        found = estimate_memory(self.setting(more))
        if self.sharding is None:
            return found
        from forge_cli.estimate.sharding import read_sharding, shard

        return shard(found, read_sharding(self.sharding))

    def device(self) -> Device | None:
        """Returns the device asked about, or the visible one; ``None`` without either."""
        return choose_device(self.gpu, self.memory)

    def need_device(self) -> Device:
        """Returns the device.

        Raises:
            ConfigError: None is named and none is visible.
        """
        found = self.device()
        if found is None:
            raise ConfigError("no GPU is visible here", fix="name one: --gpu rtx-4090, or --memory 24GiB")
        return found


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


def answer_methods(question: Question) -> None:
    """Prints the table of methods for a model, and which GPUs hold each."""
    device, rows = question.device(), []
    for method, preset in METHODS.items():
        for checkpointing in (True, False):
            more = [f"preset={preset}", f"training.activation_checkpointing={str(checkpointing).lower()}"]
            rows.append((method, checkpointing, question.estimate(more)))
    if question.json:
        print_json([text.describe_method(*row, device) for row in rows])
        return
    text.print_methods(question.model or "", rows, device)


def answer_run(question: Question, *, price: str | None, tokens: int | None, data: bool, explain: bool) -> None:
    """Prints the estimate of one run: peak, parts, instants, verdict, advice, time and cost."""
    from forge_cli.estimate.advice import advise
    from forge_cli.estimate.plan_time import estimate_plan_run, estimate_plan_step, read_price

    per_hour = read_price(price)
    plan, estimate, device = question.resolve(), question.estimate(), question.device()
    budget = make_budget(estimate, device) if device else None
    advice = advise(plan, question.resolve, device) if budget and not budget.fits else []
    step = estimate_plan_step(plan, estimate.setting, device.gpu) if device and device.gpu else None
    steps = None
    if data:
        tokens, steps = _count_data(plan)
    whole = (
        estimate_plan_run(plan, step, tokens_per_epoch=tokens, steps_per_epoch=steps, price=per_hour) if step else None
    )
    if question.json:
        print_json(text.describe_run(plan, estimate, budget, advice) | {"time": text.describe_time(step, whole)})
        return
    text.print_run(plan, estimate, budget)
    text.print_time(step, whole, explain=explain)
    if explain:
        text.print_explanations(estimate)
    if budget and not budget.fits:
        text.print_advice(budget, advice)


def _count_data(plan: Plan) -> tuple[int, int]:
    """Reads and tokenises the rows (once: they are kept), and returns tokens and optimizer steps of an epoch."""
    from forge_cli.data.hub import hub_or_copies
    from forge_cli.run.data_stage import check_data, torch_hidden

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    with torch_hidden(), hub_or_copies(plan.spec, say):
        report = check_data(plan.spec, say)[0].report
    return sum(split.tokens for split in report.splits if split.name == "train"), report.steps_per_epoch


def answer_fits(question: Question) -> None:
    """Prints which GPUs of the table hold the run."""
    estimate = question.estimate()
    budgets = [make_budget(estimate, device) for device in list_devices()]
    if question.json:
        print_json([text.describe_budget(one) for one in budgets])
        return
    print_table(
        [text.fit_row(one) for one in sorted(budgets, key=lambda one: one.device.usable_bytes)],
        header=("GPU", "usable", "must have", "verdict"),
        right=(1, 2),
    )


def answer_largest(question: Question, what: str) -> None:
    """Prints the largest batch, length or rank that fits.

    Raises:
        ConfigError: There is no such question, or the plan has no adapters whose rank could grow.
    """
    from forge_cli.estimate.reverse import QUESTIONS, find_largest

    if what not in QUESTIONS:
        raise ConfigError(f"--max {what} is not known", fix=f"write --max {' or --max '.join(QUESTIONS)}")
    plan, device = question.resolve(), question.need_device()
    if setting_from_plan(plan) is None:
        refuse(plan)
    if what == "rank" and plan.spec.lora is None:
        raise ConfigError("--max rank: this plan trains no adapters", fix="add a lora section, or --set preset=lora")
    found = find_largest(plan, device, what)
    if question.json:
        print_json(
            {"path": found.path, "value": found.value, "limited_by": found.limited_by}
            | text.describe_budget(found.budget)
        )
    elif found.value:
        print(f"--set {found.path}={found.value}   {text.sum_up(found.budget)}; limited by {found.limited_by}")
    else:
        print(f"not even the smallest {what} fits: {text.sum_up(found.budget)}")


def answer_sweep(question: Question, texts: Sequence[str], picture: Path | None) -> None:
    """Prints a table over values, or draws it."""
    from forge_cli.estimate.reverse import sweep

    axes = [_read_axis(one) for one in texts] or [("data.max_length", [str(2**n) for n in range(8, 14)])]
    device = question.device()
    rows = list(sweep(question.resolve, device or Device("no GPU", 0), axes))
    paths = [path for path, _ in axes]
    if picture is not None:
        from forge_cli.cli.estimate_plot import draw_sweep

        draw_sweep(picture, paths, rows, device)
        print(picture)
        return
    if question.json:
        print_json([dict(zip(paths, values, strict=True)) | text.describe_budget(one) for values, one in rows])
        return
    print_table(
        [(*values, *text.sweep_cells(one, device is not None)) for values, one in rows],
        header=(*paths, "allocated", "must have", "verdict" if device else ""),
        right=tuple(range(len(paths) + 2)),
    )


def _read_axis(written: str) -> tuple[str, list[str]]:
    path, separator, values = written.partition("=")
    found = [one.strip() for one in values.split(",") if one.strip()]
    if not separator or not found:
        raise ConfigError(f"--sweep {written} names no values", fix="write --sweep data.max_length=1024,2048,4096")
    return path.strip(), found


def answer_trace(question: Question) -> None:
    """Traces the real model on the CPU and prints it beside the estimate."""
    from forge_cli.run.trace import trace_plan

    print("tracing the model on the CPU ...", file=sys.stderr)
    plan = question.resolve()
    traced = trace_plan(plan)
    setting = setting_from_plan(plan)
    text.print_trace(traced, estimate_memory(setting) if setting else None, as_json=question.json)


def calibrate(folder: Path, as_json: bool) -> None:
    """Fits context and reserve ratio of each GPU to the reports of finished runs.

    Raises:
        DataError: No report in the folder has measured memory of a GPU.
    """
    from forge_cli.estimate.calibration import calibrate_from_reports

    found = calibrate_from_reports(folder)
    if not found:
        raise DataError(
            "no report here has memory measured on a GPU",
            where=str(folder),
            why="context and reserve are fitted to measured runs",
            fix="run `forge train` on a GPU first, then give the folder of its runs",
        )
    if as_json:
        print_json(found)
    else:
        print_table(
            text.calibration_rows(found),
            header=("GPU", "runs", "context", "reserved beyond allocated"),
            right=(1, 2, 3),
        )
