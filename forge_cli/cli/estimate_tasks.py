"""What ``forge estimate`` can be asked, one function per question."""

from __future__ import annotations

import sys
from pathlib import Path

from forge_cli.cli import estimate_json as plain
from forge_cli.cli import estimate_text as text
from forge_cli.cli.estimate_options import read_axes
from forge_cli.cli.estimate_question import Question
from forge_cli.cli.render import print_json, print_table
from forge_cli.errors import ConfigError, DataError, MachineError
from forge_cli.estimate.budget import Budget, Device, make_budget
from forge_cli.estimate.devices import find_obstacle, list_devices
from forge_cli.estimate.plan_memory import estimate_from_plan
from forge_cli.resolve.plan import Plan

# The methods of the table, and the sensible defaults they are compared at.
METHODS = {"full": "sft", "LoRA": "lora", "QLoRA": "qlora"}


def answer_methods(question: Question) -> None:
    """Prints the table of methods for a model, and which GPUs hold each."""
    device, rows = question.device, []
    for method, preset in METHODS.items():
        plan = question.as_method(preset).resolve()
        setting = question.read_setting(plan)
        for checkpointing in (True, False):
            varied = setting._replace(activation_checkpointing=checkpointing)
            rows.append((method, checkpointing, question.estimate_setting(varied)))
    # The methods differ in nothing that decides which GPUs can compute them.
    known = list_devices(plan.spec)
    if question.json:
        print_json([plain.describe_method(*row, device, known) for row in rows])
        return
    text.print_methods(question.model or "", rows, device, known)


def answer_run(question: Question, *, price: str | None, tokens: int | None, data: bool, explain: bool) -> None:
    """Prints the estimate of one run: peak, parts, instants, verdict, advice, time and cost."""
    from forge_cli.estimate.advice import advise
    from forge_cli.estimate.plan_time import estimate_plan_run, estimate_plan_step, read_price

    per_hour = read_price(price)
    plan, device = question.resolve(), question.device
    if (price or tokens or data) and not (device and device.gpu):
        raise ConfigError("time and price need a GPU, and none is known here", fix="name one: --gpu rtx-4090")
    estimate = question.estimate(plan)
    budget = make_budget(estimate, device) if device else None
    advice = advise(plan, question.resolve, device, estimate=question.estimate) if budget and not budget.fits else []
    step = None
    if device and device.gpu and question.sharding is None:
        step = estimate_plan_step(plan, estimate.setting, device.gpu)
    steps = None
    if data:
        tokens, steps = _count_data(plan)
    whole = (
        estimate_plan_run(plan, step, tokens_per_epoch=tokens, steps_per_epoch=steps, price=per_hour) if step else None
    )
    note = _note_lengths(plan, tokens, counted=data)
    if question.json:
        time = plain.describe_time(step, whole, note)
        print_json(plain.describe_run(plan, estimate, budget, advice) | {"time": time})
        return
    text.print_run(plan, estimate, budget)
    if question.sharding is not None:
        print("no time: the ranks' communication is not estimated")
    text.print_time(step, whole, explain=explain, note=note)
    if explain:
        text.print_explanations(estimate)
    if budget and not budget.fits:
        text.print_advice(budget, advice)


def _note_lengths(plan: Plan, tokens: int | None, *, counted: bool) -> str:
    """Says what the duration takes for granted about the rows' lengths."""
    if counted:
        return "steps are timed at full length"
    if tokens is None or plan.spec.data.packing:
        return ""
    return "assuming every sequence is full; --data counts the steps of a run file's rows"


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
    plan = question.resolve()
    estimate = question.estimate(plan)
    budgets = sorted(
        (make_budget(estimate, device) for device in list_devices()), key=lambda one: one.device.usable_bytes
    )
    verdicts = [_judge(plan, one) for one in budgets]
    if question.json:
        print_json(
            [plain.describe_budget(one) | {"verdict": said} for one, said in zip(budgets, verdicts, strict=True)]
        )
        return
    print_table(
        [text.fit_row(one, said) for one, said in zip(budgets, verdicts, strict=True)],
        header=("GPU", "usable", "must have", "verdict"),
        right=(1, 2),
    )


def _judge(plan: Plan, budget: Budget) -> str:
    gpu = budget.device.gpu
    return (gpu and find_obstacle(plan.spec, gpu)) or budget.verdict


def answer_largest(question: Question, what: str) -> None:
    """Prints the largest batch, length or rank that fits.

    Raises:
        ConfigError: There is no such question, or the plan has no adapters whose rank could grow.
        MachineError: Not even the smallest fits.
    """
    from forge_cli.estimate.reverse import QUESTIONS, find_largest

    if what not in QUESTIONS:
        raise ConfigError(f"--max {what} is not known", fix=f"write --max {' or --max '.join(QUESTIONS)}")
    plan, device = question.resolve(), question.need_device()
    if what == "rank" and plan.spec.lora is None:
        raise ConfigError("--max rank: this plan trains no adapters", fix="add a lora section, or --set preset=lora")
    found = find_largest(plan, device, what, question.estimate)
    if question.json:
        print_json(
            {"path": found.path, "value": found.value, "limited_by": found.limited_by}
            | plain.describe_budget(found.budget)
        )
    if not found.value:
        raise MachineError(
            f"not even the smallest {what} fits {device.name}: {text.sum_up(found.budget)}",
            fix="ask without --max: `forge estimate` says what makes it fit",
        )
    if not question.json:
        print(f"--set {found.path}={found.value}   {text.sum_up(found.budget)}; limited by {found.limited_by}")


def answer_sweep(question: Question, texts: list[str], picture: Path | None) -> None:
    """Prints a table over values, or draws it."""
    from forge_cli.estimate.reverse import sweep

    axes = read_axes(texts) or [("data.max_length", question.list_lengths())]
    device = question.device
    rows = list(sweep(question.resolve, device or Device("no GPU", 0), axes, question.estimate))
    paths = [path for path, _ in axes]
    if picture is not None:
        from forge_cli.cli.estimate_plot import draw_sweep

        draw_sweep(picture, text.name_run(question.resolve(), paths), paths, rows, device)
        print(picture)
        return
    if question.json:
        print_json([dict(zip(paths, values, strict=True)) | plain.describe_budget(one) for values, one in rows])
        return
    print_table(
        [(*values, *text.sweep_cells(one, device is not None)) for values, one in rows],
        header=(*paths, "allocated", "must have", "verdict" if device else ""),
        right=tuple(range(len(paths) + 2)),
    )


def answer_trace(question: Question) -> None:
    """Traces the real model on the CPU and prints it beside the estimate."""
    from forge_cli.run.trace import trace_plan

    print("tracing the model on the CPU ...", file=sys.stderr)
    plan = question.resolve()
    text.print_trace(trace_plan(plan), estimate_from_plan(plan), as_json=question.json)


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
