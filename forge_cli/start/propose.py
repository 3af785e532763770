"""A run file that fits: variants are tried on the estimator, the best first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import NamedTuple

from forge_cli.estimate.budget import Budget, make_budget
from forge_cli.estimate.devices import find_obstacle, list_devices, smallest_that_fit
from forge_cli.estimate.plan_memory import estimate_from_plan
from forge_cli.estimate.plan_time import estimate_plan_run, estimate_plan_step
from forge_cli.facts.model_facts import EMBEDDED_MODEL, find_model_facts
from forge_cli.facts.shape import ModelFacts
from forge_cli.resolve.plan import Plan, resolve_mapping
from forge_cli.start.look import QUICKSTART, Lengths, Rows, Target
from forge_cli.start.settings import MANY_CUT, Setting, Variant, choose_update, count_sequences, write_settings
from forge_cli.units import format_bytes, format_count, format_duration

# Models that answer chats, are open to everybody and come in every size, small ones first.
MODELS = (
    EMBEDDED_MODEL,
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-1.7B",
    "Qwen/Qwen3-4B",
    "Qwen/Qwen3-8B",
    "Qwen/Qwen3-14B",
    "Qwen/Qwen3-32B",
)
# On a CPU without a GPU's many cores, a larger model takes days.
_CPU_PARAMETERS = 1e9


class Proposal(NamedTuple):
    """A run file that fits, or the nearest to it.

    Attributes:
        settings: In the order of the file.
        plan: What it resolves to.
        budget: Its memory beside the device; ``None`` for a model whose shape is not known.
        seconds: Expected duration; ``None`` where it is not known.
        notes: What a user should know.
    """

    settings: tuple[Setting, ...]
    plan: Plan
    budget: Budget | None
    seconds: float | None
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether the device holds it, as far as is known."""
        return self.budget is None or self.budget.fits


def propose(rows: Rows, lengths: Lengths, model: str, target: Target, preset: str | None = None) -> Proposal:
    """Chooses settings for rows, a model and a device.

    Args:
        rows: The rows.
        lengths: How long they are.
        model: Alias, hub name or folder.
        target: What the run has to fit into.
        preset: Preset that was asked for; ``None`` chooses one.

    Raises:
        ConfigError: There is no such model or preset, or the preset's settings do not hold here.
    """
    facts = find_model_facts(model)
    tried: list[tuple[Variant, Budget | None]] = []
    seen: set[str] = set()
    for variant in _list_variants(rows, count_sequences(rows, lengths, facts), target, facts, preset):
        settings = write_settings(rows, lengths, model, facts, variant)
        if (key := str([one[:2] for one in settings])) in seen:  # the longest row is no longer than most
            continue
        seen.add(key)
        plan = _resolve(settings)
        estimate = estimate_from_plan(plan, cuda=target.is_gpu)
        budget = make_budget(estimate, target.device) if estimate else None
        tried.append((variant, budget))
        if budget is None or budget.fits:
            break
    else:
        # The nearest: every row, the smallest batch.
        variant, budget = min(tried, key=lambda one: (-one[0].coverage_percent, one[1].needed_bytes))
        settings = write_settings(rows, lengths, model, facts, variant)
        plan = _resolve(settings)
    settings[0] = settings[0]._replace(reason=_explain_preset(budget, tried, target))
    seconds = _estimate_seconds(plan, budget, target, lengths)
    notes = tuple(_list_notes(plan, budget, target, facts, lengths))
    return Proposal(tuple(settings), plan, budget, seconds, notes)


def list_fitting_models(target: Target) -> list[tuple[str, ModelFacts, str]]:
    """Lists models that a device can train at 1024 tokens a row: name, facts, preset that fits."""
    found = []
    for name in MODELS:
        facts = find_model_facts(name)
        if facts is None or (not target.is_gpu and (facts.num_parameters or 0) > _CPU_PARAMETERS):
            continue
        for preset in ("lora", "qlora") if target.is_gpu else ("lora",):
            data = {"train": QUICKSTART, "max_length": min(1024, facts.max_position_embeddings or 1024)}
            training = {"per_device_train_batch_size": 1}
            plan = resolve_mapping({"preset": preset, "model": {"name": name}, "data": data, "training": training})
            estimate = estimate_from_plan(plan, cuda=target.is_gpu)
            if estimate and make_budget(estimate, target.device).fits:
                found.append((name, facts, preset))
                break
    return found


def choose_model(target: Target, data: str | None) -> str:
    """Returns the model to propose first: the embedded one for its rows or without a GPU, else the best up to 8 B."""
    if not target.is_gpu or (data or "").startswith("forge:"):
        return EMBEDDED_MODEL
    fitting = [name for name, facts, _ in list_fitting_models(target) if (facts.num_parameters or 0) < 9e9]
    return fitting[-1] if fitting else EMBEDDED_MODEL


def _list_variants(
    rows: Rows, num_sequences: int, target: Target, facts: ModelFacts | None, preset: str | None
) -> Iterator[Variant]:
    """Lists what is tried: 16 bit before 4, all rows before most of them, large batches before small ones."""
    if preset is not None:
        kinds: list[tuple[str, int | None]] = [(preset, None)]
    elif rows.method == "sft":
        kinds = [("lora", None), ("qlora", None)]
    else:
        kinds = [(rows.method, None), (rows.method, 4)]
    if not target.is_gpu:
        kinds = kinds[:1]  # 4-bit weights are unpacked with every use: on a CPU that takes the day
    per_update = choose_update(num_sequences)
    smallest = 2 if rows.method == "kto" and per_update > 1 else 1
    sizes = [size for size in (16, 8, 4, 2, 1) if smallest <= size <= per_update]
    if facts is None:  # nothing tells what would be too much
        kinds, sizes = kinds[-1:], sizes[-1:]
    for coverage in (99.0, 95.0, 90.0):
        for kind in kinds:
            for size in sizes:
                yield Variant(*kind, coverage, size)


def _resolve(settings: Sequence[Setting]) -> Plan:
    values: dict[str, object] = {}
    for path, value, _ in settings:
        section, _, name = path.rpartition(".")
        owner = values.setdefault(section, {}) if section else values
        owner[name] = value
    return resolve_mapping(values)


def _explain_preset(budget: Budget | None, tried: Sequence[tuple[Variant, Budget | None]], target: Target) -> str:
    """Says what the last variant needs, and what the first one, in 16 bit, would have needed."""
    if budget is None:
        return "the model's shape is not known here, so its memory was not estimated"
    usable = format_bytes(target.device.usable_bytes)
    need = f"needs {format_bytes(budget.needed_bytes)}; {target.device.name} has {usable} to use"
    if not budget.fits:
        return f"does not fit: {need}"
    others = [one.needed_bytes for other, one in tried if one and other[:2] != tried[-1][0][:2]]
    return f"{need}; weights in 16 bit would need {format_bytes(min(others))}" if others else need


def _estimate_seconds(plan: Plan, budget: Budget | None, target: Target, lengths: Lengths) -> float | None:
    gpu = target.device.gpu
    if budget is None or gpu is None or find_obstacle(plan.spec, gpu):
        return None
    step = estimate_plan_step(plan, budget.estimate.setting, gpu)
    if step is None:
        return None
    per_epoch = -(-lengths.num_rows // plan.derived.effective_batch_size)
    tokens = round(sum(lengths.tokens) / len(lengths.tokens) * lengths.num_rows)
    # Rows are padded to the longest of their batch, not to max_length: steps of full length would be far too many.
    full = -(-tokens // step.num_tokens)
    steps = max(full, min(per_epoch, 2 * full))
    whole = estimate_plan_run(plan, step, tokens_per_epoch=tokens, steps_per_epoch=steps, price=None)
    return whole.seconds if whole else None


def _list_notes(
    plan: Plan, budget: Budget | None, target: Target, facts: ModelFacts | None, lengths: Lengths
) -> Iterator[str]:
    if lengths.guessed:
        yield f"{lengths.guessed}; lengths are characters / 4: `forge data check` measures them before training"
    if plan.spec.quantization and find_spec("bitsandbytes") is None:
        yield "4-bit weights need bitsandbytes: pip install bitsandbytes"
    cut = lengths.count_longer(plan.spec.data.max_length) / len(lengths.tokens)
    if cut > MANY_CUT and plan.spec.data.on_overlong == "truncate":
        yield f"{100 * cut:.0f} % of the rows are cut at {plan.spec.data.max_length:,} tokens and lose their end"
    parameters = facts.num_parameters if facts else None
    if not target.is_gpu and (parameters or 0) > _CPU_PARAMETERS:
        yield f"no GPU is seen here, and {format_count(parameters)} parameters take very long on a CPU"
    if budget is not None and not budget.fits:
        fitting = smallest_that_fit(estimate_from_plan(plan) or budget.estimate, list_devices(plan.spec))
        yield f"this run does not fit {target.device.name}; GPUs that would hold it: {fitting or 'none in the table'}"
    yield from plan.derived.warnings


def describe_duration(seconds: float) -> str:
    """Writes an expected duration, rounded as it deserves."""
    return f"about {format_duration(round(seconds, -1)) if seconds >= 60 else f'{max(round(seconds), 1)} s'}"
