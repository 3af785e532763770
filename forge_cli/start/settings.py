"""The value of every key of a new run file, and the measured figure that speaks for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from forge_cli.facts.model_facts import EMBEDDED_MODEL
from forge_cli.facts.shape import ModelFacts
from forge_cli.start.look import Lengths, Rows
from forge_cli.units import count_of, format_count

MOST_KEYS = 12
MANY_CUT = 0.02  # share of rows; fewer are left out, more are cut
_ROWS_PER_UPDATE = 16
_HELD_BACK_FROM = 200  # rows; of fewer, a tenth says too little to be worth losing
_MOST_HELD_BACK = 500
# Formats whose long rows go on in new ones, and the length at which that costs little context.
_SPLIT, _SPLIT_TOKENS = ("text", "tokens"), 2048
_ADAPTERS = ("lora", "qlora", "dora", "memory_efficient")
# What a chat template writes around a short conversation; a guess from characters does not see it.
_TEMPLATE_TOKENS = 32


class Setting(NamedTuple):
    """One key of the run file: dotted path, value, and why it is that."""

    path: str
    value: object
    reason: str


class Variant(NamedTuple):
    """What is varied until it fits, the best first."""

    preset: str
    bits: int | None
    coverage_percent: float
    batch_size: int


def write_settings(
    rows: Rows, lengths: Lengths, model: str, facts: ModelFacts | None, variant: Variant
) -> list[Setting]:
    """Writes the settings of one variant, in the order of the file, each with its reason."""
    parameters = facts.num_parameters if facts else None
    num_sequences = count_sequences(rows, lengths, facts)
    per_update = choose_update(num_sequences)
    evaluation = _write_evaluation(rows)
    settings = [
        Setting("preset", variant.preset, ""),
        Setting("model.name", model, f"{format_count(parameters)} parameters" if parameters else "size not known here"),
        Setting("data.train", rows.path, f"{count_of(rows.count, 'row', 'rows')}, format {rows.scan.kind}"),
    ]
    if num_bad := max(rows.scan.bad.count, lengths.num_bad):
        first = next((f"{one.where}: {one.what}" for one in rows.scan.bad.list_problems()), lengths.bad)
        settings.append(Setting("data.on_bad_row", "skip", f"{count_of(num_bad, 'row', 'rows')} bad: {first}"))
    settings += _write_lengths(rows, lengths, facts, variant, evaluation)
    settings += evaluation
    if variant.bits:
        settings.append(Setting("quantization.bits", variant.bits, "the frozen weights do not fit in 16 bit"))
    settings += _write_rate(parameters, variant.preset)
    settings.append(_write_epochs(rows, num_sequences, model))
    size, steps = variant.batch_size, per_update // variant.batch_size
    updates = count_of(max(1, num_sequences // per_update), "update", "updates")
    reason = f"{size} x {steps} rows per update: about {updates} a pass"
    settings.append(Setting("training.per_device_train_batch_size", size, "rows at once"))
    settings.append(Setting("training.gradient_accumulation_steps", steps, reason))
    if evaluation and size < 8:
        settings.append(Setting("evaluation.per_device_eval_batch_size", size, "no more memory than training takes"))
    # The preset has a number of passes too.
    return [one for one in settings if len(settings) <= MOST_KEYS or one.path != "training.num_train_epochs"]


def _write_lengths(
    rows: Rows, lengths: Lengths, facts: ModelFacts | None, variant: Variant, evaluation: Sequence[Setting]
) -> list[Setting]:
    longest = lengths.tokens[-1]
    # Of a sample, half of what may be lost is left as a margin.
    percent = 99.5 if lengths.is_sample and variant.coverage_percent == 99 else variant.coverage_percent
    most = lengths.percentile(percent)
    is_whole = variant.coverage_percent == 99 and not lengths.is_sample and longest <= 1.5 * most
    wanted = longest if is_whole else most
    if lengths.guessed:
        wanted = round(1.5 * longest) + _TEMPLATE_TOKENS
    if rows.scan.kind in _SPLIT:
        wanted = min(wanted, _SPLIT_TOKENS)
    length = max(64, -(-wanted // 64) * 64)
    positions = facts.max_position_embeddings if facts else None
    length = min(length, positions or length)
    reason = f"{percent:g} % of your rows have at most {most:,} tokens; the longest has {longest:,}"
    if lengths.is_sample:
        reason = f"{percent:g} % of {len(lengths.tokens):,} rows that were measured have at most {most:,} tokens"
    if lengths.guessed:
        reason = f"the longest row has about {longest:,} tokens (characters / 4), and half more fits"
    if length == positions and length < wanted:
        reason += f"; the model has {positions:,} positions"
    settings = [Setting("data.max_length", length, reason)]
    longer = lengths.count_longer(length) if not lengths.guessed or length == positions else 0
    share = longer / len(lengths.tokens)
    if not longer and not (lengths.is_sample or lengths.guessed):
        return settings
    if rows.scan.kind in _SPLIT:
        return [*settings, Setting("data.on_overlong", "split", "a longer row goes on in a new one")]
    is_many = share > MANY_CUT
    how = "are cut" if is_many else "are left out"
    shown = f"{count_of(longer, 'row', 'rows')} ({100 * share:.1f} %)" if longer else "rows that are longer"
    settings.append(Setting("data.on_overlong", "truncate" if is_many else "drop", f"{shown} {how}"))
    # The rows that are held back are few: chance alone puts a larger share of the long ones among them.
    held = next((round(one.value * rows.count) for one in evaluation if one.path == "data.eval_fraction"), rows.count)
    expected = share * min(held, rows.count)
    allowed = math.ceil(100 * (expected + 3 * math.sqrt(expected) + 1) / max(held, 1)) / 100
    if (allowed := min(1.0, max(allowed, math.ceil(100 * share) / 100))) > 0.01:
        settings.append(Setting("data.max_lost_ratio", allowed, "more than this share of a split ends the run"))
    return settings


def _write_evaluation(rows: Rows) -> list[Setting]:
    if rows.held_out:
        return [Setting("data.eval", rows.held_out, "rows that are not trained, to see what was learned")]
    if rows.count < _HELD_BACK_FROM:
        return []
    share = 0.1 if rows.count <= 10 * _MOST_HELD_BACK else round(_MOST_HELD_BACK / rows.count, 4) or 0.0001
    reason = f"{round(share * rows.count):,} rows are not trained: their loss shows when learning ends"
    return [Setting("data.eval_fraction", share, reason)]


def _write_rate(parameters: int | None, preset: str) -> list[Setting]:
    if preset not in _ADAPTERS or parameters is None:
        return []
    if parameters < 5e7:
        return [Setting("training.learning_rate", 0.001, "so small a model takes larger steps; the preset's is 2e-4")]
    if parameters > 13e9:
        return [Setting("training.learning_rate", 0.0001, "above 13 B half the preset's rate")]
    return []


def _write_epochs(rows: Rows, num_sequences: int, model: str) -> Setting:
    shown = f"passes over {count_of(num_sequences, 'row', 'rows')}"
    if model == EMBEDDED_MODEL and rows.method == "sft" and num_sequences < 500:
        return Setting("training.num_train_epochs", 4, f"{shown}; the embedded model is quick")
    if rows.method != "sft":
        return Setting("training.num_train_epochs", 1, "preferences are learned in one pass")
    passes = next(passes for most, passes in ((200, 5), (2000, 3), (20000, 2), (math.inf, 1)) if num_sequences < most)
    return Setting("training.num_train_epochs", passes, f"{shown}; fewer rows take more")


def count_sequences(rows: Rows, lengths: Lengths, facts: ModelFacts | None) -> int:
    """Returns the rows of a pass: of a text, the pieces that it is split into."""
    if rows.scan.kind not in _SPLIT:
        return rows.count
    most = min(_SPLIT_TOKENS, (facts and facts.max_position_embeddings) or _SPLIT_TOKENS)
    return rows.count * sum(-(-one // most) for one in lengths.tokens) // len(lengths.tokens)


def choose_update(num_rows: int) -> int:
    """Returns the rows of an update: 16, and of a small set the power of two that leaves ten updates a pass."""
    return max(1, min(_ROWS_PER_UPDATE, 2 ** int(math.log2(max(num_rows / 10, 1)))))
