"""What all decoder layers of a model read: rotary positions and attention masks."""

from __future__ import annotations

from typing import NamedTuple

from forge_cli.estimate.operations import FP32, Operations
from forge_cli.estimate.setting import Setting
from forge_cli.estimate.tape import Tensor
from forge_cli.facts.families import FALCON_SEQUENTIAL, find_family

# Share of a head that is rotated (0 to 1). Source: transformers 5.23, the configurations' defaults, which the
# published models have.
ROTARY_SHARES = {"phi": 0.5, "gpt_neox": 0.25}
_TWO_ROTARIES = ("gemma3_text", "olmo3")


class Reading(NamedTuple):
    """What a layer reads beside its input.

    Attributes:
        rotary: cos and sin; None for learned or added positions.
        mask: Attention mask; None where the kernel needs none.
    """

    rotary: tuple[Tensor, Tensor] | None
    mask: Tensor | None


def make_positions(ops: Operations, setting: Setting) -> Tensor | None:
    """Makes the table of learned positions, which GPT-2 alone has."""
    facts = setting.facts
    if facts.model_type != "gpt2":
        return None
    family = find_family(facts)
    trains = setting.adapters is None and f"{family.body}.{family.positions}" not in setting.frozen
    size = setting.trained_bytes if setting.adapters is None else setting.weight_bytes
    return ops.tape.leaf((facts.max_position_embeddings or setting.sequence_length) * facts.hidden_size, size, trains)


def make_embedding_adapter(ops: Operations, setting: Setting) -> tuple[Tensor, Tensor]:
    """Makes the two matrices of the input embeddings' adapter."""
    facts, rank = setting.facts, setting.adapters.rank
    down, up = (
        ops.tape.leaf(rank * rows, setting.trained_bytes, True) for rows in (facts.vocab_size, facts.hidden_size)
    )
    return down, up


def embed(
    ops: Operations,
    setting: Setting,
    embedding: Tensor,
    positions: Tensor | None,
    adapter: tuple[Tensor, Tensor] | None = None,
    *,
    asks_gradient: bool,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Looks the tokens up.

    Args:
        ops: Operations on the tape.
        setting: The step.
        embedding: The table.
        positions: The table of positions; None where they are rotary.
        adapter: The table's adapter.
        asks_gradient: The result of the table is made to need a gradient.

    Returns:
        The first layer's input, and what the model's forward pass holds to its end.

    Source: transformers 5.23, the models' ``forward``; PEFT 0.21, ``lora/layer.py`` (``Embedding``).
    """
    facts, tokens = setting.facts, setting.num_sequences * setting.sequence_length
    inputs_embeds = _look_up(ops, embedding, tokens * facts.hidden_size)
    if adapter is not None:
        rank, expected = setting.adapters.rank, inputs_embeds.itemsize
        output = ops.linear(_look_up(ops, adapter[0], tokens * rank), adapter[1], None, rank, facts.hidden_size)
        inputs_embeds = ops.cast(ops.add(inputs_embeds, ops.scale(output)), expected)
        del output
    if asks_gradient:
        inputs_embeds.needs_grad = True
    if facts.model_type == "granite":
        inputs_embeds = ops.scale(inputs_embeds)
    if positions is None:
        return inputs_embeds, (inputs_embeds,)
    position_embeds = _look_up(ops, positions, setting.sequence_length * facts.hidden_size)
    hidden_states = ops.drop_tenth(ops.add(inputs_embeds, position_embeds))
    return hidden_states, (inputs_embeds, position_embeds)


def _look_up(ops: Operations, table: Tensor, numel: int) -> Tensor:
    rows, size = table.numel, table.itemsize
    (y,) = ops.tape.apply((table,), [(numel, size)], lambda g: [ops.new(rows, size)])
    return y


def make_readings(ops: Operations, setting: Setting, itemsize: int) -> dict[bool, Reading]:
    """Makes positions and masks as the model's forward pass does, by whether a layer's attention has a window.

    Args:
        ops: Operations on the tape.
        setting: The step.
        itemsize: Bytes per number of the embeddings.

    Source: transformers 5.23, ``masking_utils.py`` and the models' ``RotaryEmbedding``.
    """
    # A model with layers of both kinds makes the masks of both, even if it is too shallow to use them.
    alike = find_family(setting.facts).full_attention_every == 1
    kinds = [has_window(setting, 0)] if alike else [False, True]
    masks = [_make_mask(ops, setting, itemsize, kind) for kind in kinds]
    present = {has_window(setting, index) for index in range(setting.facts.num_hidden_layers)}
    rotaries = [_make_rotary(ops, setting, itemsize)]
    if setting.facts.model_type in _TWO_ROTARIES and len(present) > 1:
        rotaries.append(_make_rotary(ops, setting, itemsize))
    rotaries += rotaries * (len(kinds) - len(rotaries))
    return {kind: Reading(rotary, mask) for kind, rotary, mask in zip(kinds, rotaries, masks, strict=True)}


def _make_rotary(ops: Operations, setting: Setting, itemsize: int) -> tuple[Tensor, Tensor] | None:
    facts = setting.facts
    if facts.model_type == "gpt2":
        return None
    width = round(facts.head_dim * ROTARY_SHARES.get(facts.model_type, 1.0))
    width //= 2 if facts.model_type == "gpt_oss" else 1
    # OLMo leaves them in fp32.
    size = FP32 if facts.model_type in ("olmo2", "olmo3") else itemsize
    return ops.new(setting.sequence_length * width, size), ops.new(setting.sequence_length * width, size)


def has_window(setting: Setting, index: int) -> bool:
    """Whether a layer is one of those whose attention has a window, be it longer than the rows."""
    every = find_family(setting.facts).full_attention_every
    return setting.facts.sliding_window is not None if every == 1 else (index + 1) % every != 0


def count_layer_pattern(setting: Setting) -> int:
    """Returns after how many layers the memory of a layer repeats: 1 where all need the same.

    Units: layers. Source: where windows are shorter than rows, sdpa has a mask in layers with a window only.
    """
    if not _has_short_windows(setting) or setting.attention != "sdpa" or setting.padded or setting.packed:
        return 1
    return find_family(setting.facts).full_attention_every


def _has_short_windows(setting: Setting) -> bool:
    """Whether windows are no longer than the rows: otherwise they are none."""
    window = setting.facts.sliding_window
    return window is not None and window <= setting.sequence_length


def _make_mask(ops: Operations, setting: Setting, itemsize: int, has_window: bool) -> Tensor | None:
    """Makes one mask: true or false for sdpa, and only where it is more than causal; numbers for eager attention."""
    facts, length = setting.facts, setting.sequence_length
    cells = setting.num_sequences * length * length
    if setting.attention == "flash":
        return None
    if setting.attention == "sdpa":
        is_short = has_window and _has_short_windows(setting)
        if not (setting.padded or setting.packed or is_short or facts.model_type == "falcon"):
            return None
    mask = ops.new(cells, 1)
    if facts.layout == FALCON_SEQUENTIAL:
        # Positions are added to the mask, so every head has its own.
        return ops.new(cells * facts.num_attention_heads, itemsize)
    return mask if setting.attention == "sdpa" else ops.new(cells, itemsize)
