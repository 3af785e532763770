"""What one layer keeps per token: the replay against counts of autograd's saved tensors on the real model."""

from __future__ import annotations

import pytest

from forge_cli.estimate.setting import Adapters, Setting
from forge_cli.estimate.step import run_layers
from forge_cli.facts.model_facts import find_model_facts

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENS = 4096
H, A, B, F, N = 4096, 4096, 1024, 14336, 32  # Llama-3-8B: hidden, queries, keys, feed-forward, heads


def kept_per_layer(**changes) -> dict[str, int]:
    """Bytes that a fourth layer adds to what is alive when the loss begins."""
    values = {"trained_bytes": 2, "activation_checkpointing": False, **changes}
    setting = Setting(find_model_facts("llama-3-8b"), 1, TOKENS, weights_bytes=0, **values)
    three, four = (run_layers(setting, 0, count)["loss"][1] for count in (3, 4))
    return {part: size - three.get(part, 0) for part, size in four.items() if size != three.get(part, 0)}


@pytest.mark.parametrize(
    ("changes", "bytes_per_token"),
    [
        # Counted on transformers 5.23 and PEFT 0.21 with saved-tensor hooks; the sums are their explanation.
        ({"autocast": False, "embeddings_train": True, "head_trains": True}, 200_840),
        ({"adapters": Adapters(16, ALL)}, 184_680),
        ({"adapters": Adapters(16, ALL), "trained_bytes": 4, "autocast": False}, 295_496),
        ({"adapters": Adapters(16, ALL), "quantized_bits": 4, "trained_bytes": 4}, 184_680),
        # Forge leaves out PEFT's casts of adapters' inputs: with them it would be 217,448, and 12 H below.
        ({"adapters": Adapters(16, ALL), "trained_bytes": 4}, 184_680),
        (
            {"adapters": Adapters(32, ("q_proj", "v_proj")), "trained_bytes": 4},
            10 * H + 4 * A + 4 * B + 6 * F + 4 * N + 136,
        ),
        ({"embeddings_train": True, "head_trains": True, "trained_bytes": 4}, 241_800),
    ],
)
def test_bytes_per_token_and_layer(changes, bytes_per_token):
    assert kept_per_layer(**changes)["activations"] == bytes_per_token * TOKENS


def test_autocast_copies_are_the_layers_weights_in_16_bit():
    copies = kept_per_layer(embeddings_train=True, head_trains=True, trained_bytes=4)["autocast copies"]
    assert copies == 2 * (2 * H * A + 2 * H * B + 3 * H * F)


def test_checkpointing_keeps_the_input_alone():
    kept = kept_per_layer(adapters=Adapters(16, ALL), activation_checkpointing=True)
    assert kept == {"activations": 2 * H * TOKENS}


def test_dropout_keeps_a_mask_and_the_dropped_copy_but_not_the_input():
    plain = kept_per_layer(adapters=Adapters(16, ALL))["activations"]
    dropped = kept_per_layer(adapters=Adapters(16, ALL, dropout=0.1))["activations"]
    inputs = 5 * H + A + F  # of all seven adapters
    # Norm outputs and the product before down_proj were kept for adapters alone; attention's output is its own.
    assert dropped - plain == (3 * inputs - 2 * (2 * H + F)) * TOKENS
