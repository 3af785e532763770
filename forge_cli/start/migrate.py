"""From a training file of Axolotl, LLaMA-Factory, TRL or torchtune to a run file, with an account of every key."""

from __future__ import annotations

import tempfile
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from forge_cli.errors import ForgeError, Problem
from forge_cli.resolve.plan_text import write_value
from forge_cli.resolve.schema_tree import find_sections
from forge_cli.resolve.wording import show
from forge_cli.start.migrate_data import read_rows
from forge_cli.start.migrate_draft import DIFFERS, UNNEEDED, Draft, Line
from forge_cli.start.migrate_method import settle_method
from forge_cli.start.migrate_rules import settle
from forge_cli.start.migrate_source import read_source, recognise, show_key

_COMMENT_COLUMN = 48
_WIDEST = 118


class Migration(NamedTuple):
    """A run file, and what became of every key.

    Attributes:
        tool: Name of the other tool.
        told_by: The keys that tell; ``--from`` when the user said it.
        text: The run file.
        lines: One line for each key of the source.
        notes: Values that mean something else here, and defaults of the other tool that are written out.
        warnings: What Forge says about the plan.
        problems: Why the run file does not validate; empty if it does.
    """

    tool: str
    told_by: str
    text: str
    lines: tuple[Line, ...]
    notes: tuple[Line, ...]
    warnings: tuple[str, ...]
    problems: tuple[Problem, ...]


def migrate(path: Path, tool: str | None = None, method: str | None = None) -> Migration:
    """Turns a file of another tool into a run file.

    Args:
        path: The file.
        tool: Its tool, one of ``TOOLS``; ``None``: told by its keys.
        method: For TRL, the command the file is for; ``None``: told by its keys.

    Raises:
        ConfigError: The file cannot be read, its tool cannot be told, or its method is not one of Forge's.
    """
    source = read_source(path)
    tool, told_by = (tool, "--from") if tool else recognise(source)
    draft = Draft(source, tool)
    settle_method(draft, method)
    settle(draft)
    read_rows(draft)
    _add_defaults(draft)
    _settle_clashes(draft)
    _drop_idle(draft)
    _note_differences(draft)
    for fact in list(draft.facts):  # a fact nobody asked for would be silent otherwise
        draft.leave(draft.facts.pop(fact)[1], UNNEEDED, f"{draft.name} does not use it here")
    text = _write(draft)
    warnings, problems = _check(draft, text)
    lines = tuple(draft.lines[key] for key in source.leaves)
    return Migration(draft.name, told_by, text, lines, tuple(draft.notes), warnings, problems)


def _add_defaults(draft: Draft) -> None:
    """Writes out what the other tool does when its file does not say."""
    rank = draft.values.get("lora.r", 8)
    if draft.tool == "llama-factory" and draft.values.get("lora") is not None and isinstance(rank, int):
        draft.table["defaults"]["lora.lora_alpha"] = [2 * rank, "lora_alpha, twice the rank"]
    if draft.tool == "axolotl" and "training.per_device_train_batch_size" in draft.values:
        rows = draft.values["training.per_device_train_batch_size"]
        draft.table["defaults"]["evaluation.per_device_eval_batch_size"] = [rows, "eval_batch_size, that of training"]
    for path, (value, key) in draft.table["defaults"].items():
        section = path.partition(".")[0]
        off = (section == "lora" and draft.values.get("lora") is None) or (
            section == "quantization" and draft.values.get("quantization.bits") != 4
        )
        unsaid = path == "data.on_overlong" and draft.tool == "torchtune" and "data.max_length" not in draft.values
        if path in draft.values or off or unsaid or (section == "checkpoint" and "checkpoint" in draft.values):
            continue
        draft.values[path] = value
        draft.notes.append(
            Line(path, DIFFERS, f"{draft.name}'s default {show(value)} is written out ({key})", "", (path,))
        )


def _settle_clashes(draft: Draft) -> None:
    """Takes back what Forge does not do together."""
    values = draft.values
    if "checkpoint" in values:
        for path in [one for one in values if one.startswith("checkpoint.")]:
            draft.drop(path, UNNEEDED, "no checkpoint is kept")
    if values.get("data.packing") and values.get("training.train_sampling_strategy") == "group_by_length":
        draft.drop("training.train_sampling_strategy", UNNEEDED, "packed rows are of one length")
    for path in ("data.packing", "data.padding_free"):
        if values.get(path) and values.get("method", "sft") != "sft":
            draft.drop(path, UNNEEDED, "rows of answers are not packed")
    if values.get("data.streaming"):
        for path in ("data.packing", "data.eval_fraction", "data.eval_rows"):
            draft.drop(path, DIFFERS, "streamed rows are not packed or held back") if path in values else None
    if values.get("data.streaming") and not values.get("training.max_steps"):
        draft.drop("data.streaming", DIFFERS, "streaming needs max_steps; all rows are read before training")
    if values.get("data.on_overlong") == "split" and values.get("data.format") != "text":
        values["data.on_overlong"] = "truncate"
    rows, steps = "training.per_device_train_batch_size", "training.gradient_accumulation_steps"
    if values.get("method") == "kto":
        count = values.get(steps, 1)
        if values.get(rows) == 1:
            values[rows] = 2  # and half the steps: as many rows as before
            if isinstance(count, int) and count > 1:
                values[steps] = (count + 1) // 2
            draft.note(
                rows, f"kto compares rows of a batch: 2 rows x {values.get(steps, 1)} steps instead of 1 x {count}"
            )
        if values.get("evaluation.per_device_eval_batch_size") == 1:
            values["evaluation.per_device_eval_batch_size"] = 2


def _drop_idle(draft: Draft) -> None:
    """Takes back settings without effect, which a run file may not hold."""
    from pydantic import ValidationError

    from forge_cli.resolve.effect import find_idle
    from forge_cli.schema.runspec import RunSpec

    try:
        idle = find_idle(RunSpec.model_validate(_nest(draft.values)))
    except ValidationError:
        return  # said with the problems of the run file
    for path, reason in idle.items():
        if path in draft.values:
            draft.drop(path, UNNEEDED, f"it has no effect: {reason.why}")


def _note_differences(draft: Draft) -> None:
    """Notes what carries over by name and still means something else."""
    values = draft.values
    rank, alpha = values.get("lora.r"), values.get("lora.lora_alpha")
    if (
        isinstance(rank, int)
        and isinstance(alpha, (int, float))
        and rank
        and alpha != 2 * rank
        and not values.get("lora.use_rslora")
    ):
        draft.note(
            "lora.lora_alpha",
            f"the scale alpha / r is {alpha / rank:g}; Forge's presets have 2, so their learning rates do not fit",
        )
    if values.get("lora", 0) == {} and ("lora.r" not in values or "lora.lora_alpha" not in values):
        draft.note("lora", "no rank or alpha is named there; Forge takes r 16 and lora_alpha 32")
    policy = values.get("data.on_overlong")
    if policy in ("drop", "truncate"):
        done = {"drop": "left out", "truncate": "cut"}[policy]
        draft.note(
            "data.on_overlong",
            f"longer rows are {done} as there, but Forge stops above 1 %; max_lost_ratio allows more",
        )
    rows, steps = (
        values.get("training.per_device_train_batch_size"),
        values.get("training.gradient_accumulation_steps", 4),
    )
    if isinstance(rows, int) and isinstance(steps, int):
        draft.note(
            "training.per_device_train_batch_size",
            f"{rows} x {steps} = {rows * steps} rows a step on one GPU; there it is times the number of GPUs",
        )
    if draft.tool in ("llama-factory", "trl") and "evaluation.eval_steps" not in values and _has_evaluation(values):
        draft.note(
            "evaluation.eval_steps", "without eval_strategy nothing is evaluated there; Forge does so each epoch"
        )
    if "data.max_length" not in values:
        draft.note("data.max_length", "no length is named there; Forge stops at rows of more than 2048 tokens")
    if "checkpoint" not in values and "checkpoint.save_total_limit" not in values:
        draft.note("checkpoint.save_total_limit", "all checkpoints are kept there; Forge keeps the last 2")


def _has_evaluation(values: dict[str, object]) -> bool:
    return any(one in values for one in ("data.eval", "data.eval_fraction", "data.eval_rows"))


def _nest(values: dict[str, object]) -> dict:
    nested: dict = {}
    for path in sorted(values, key=lambda one: "." in one):
        section, _, name = path.rpartition(".")
        if not section:
            nested[path] = dict(value) if isinstance(value := values[path], dict) else value
        elif nested.get(section, 0) is not None:
            nested.setdefault(section, {})[name] = values[path]
    return nested


def _write(draft: Draft) -> str:
    """Writes the run file: sections in the schema's order, each line with the keys it came from."""
    lines = [f"# From {Path(draft.source.document.file).name}, a file of {draft.name}."]
    nested = _nest(draft.values)
    for name in find_sections()[""].model_fields:
        if name not in nested:
            continue
        if not isinstance(nested[name], dict) or not nested[name]:
            lines.append(_write_line("", name, nested[name], _comment(draft, name)))
            continue
        comment = _comment(draft, name) if name in draft.keys else ""
        lines.append(f"{name}:{comment and f'  # {comment}'}")
        order = list(find_sections()[name].model_fields)
        for inner in sorted(nested[name], key=order.index):
            lines.append(_write_line("  ", inner, nested[name][inner], _comment(draft, f"{name}.{inner}")))
    return "\n".join(lines) + "\n"


def _write_line(indent: str, name: str, value: object, comment: str) -> str:
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        items = [f"\n{indent}  - {write_value(one)}" for one in value]
        above = textwrap.fill(comment, _WIDEST, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}#   ")
        return f"{above}\n{indent}{name}:" + "".join(items)
    line = f"{indent}{name}: {write_value(value)}"
    if len(line) + len(comment) > _WIDEST:
        return (
            textwrap.fill(comment, _WIDEST, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}#   ")
            + f"\n{line}"
        )
    return line.ljust(_COMMENT_COLUMN) + f"  # {comment}"


def _comment(draft: Draft, path: str) -> str:
    groups: dict[str, list[str]] = {}
    for key in draft.keys.get(path, []):
        groups.setdefault(show_key(key[:-1]), []).append(show_key(key[-1:]))
    parts = [", ".join(names) if not owner else f"{owner}: {', '.join(names)}" for owner, names in groups.items()]
    usual = "the kind of rows" if path == "data.format" else f"{draft.name} does so by itself"
    return "; ".join(parts) or usual


def _check(draft: Draft, text: str) -> tuple[tuple[str, ...], tuple[Problem, ...]]:
    """Resolves the run file before it is written; problems are placed where the other tool's file says it."""
    from forge_cli.resolve.plan import resolve_plan

    with tempfile.TemporaryDirectory(prefix="forge-migrate-") as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(text, encoding="utf-8")
        try:
            return resolve_plan(file).derived.warnings, ()
        except ForgeError as error:
            return (), tuple(_place(draft, one) for one in error.problems)


def _place(draft: Draft, problem: Problem) -> Problem:
    keys = draft.keys.get(problem.path.partition("[")[0], [])
    where = draft.source.where(keys[0]) if keys else draft.source.document.file
    what = f"{problem.what} ({', '.join(show_key(key) for key in keys)})" if keys else problem.what
    return replace(problem, where=where, what=what)
