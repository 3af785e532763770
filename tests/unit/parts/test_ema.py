"""EMA against a numpy loop, and its behaviour around swaps, checkpoints and skipped steps."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from forge_cli.errors import ModelError
from forge_cli.parts.ema import EMACallback, WeightAverage


def random_walk(model: nn.Module, steps: int, average: WeightAverage | None = None) -> list[list[np.ndarray]]:
    """Moves the weights at random; returns their history in float64, the start first."""
    torch.manual_seed(3)
    history = [[p.detach().double().numpy().copy() for p in model.parameters() if p.requires_grad]]
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape).to(parameter.dtype) * 0.1)
        if average is not None:
            average.update()
        history.append([p.detach().double().numpy().copy() for p in model.parameters() if p.requires_grad])
    return history


def numpy_ema(history: list[list[np.ndarray]], decay: float, warmup: bool, every: int = 1) -> list[np.ndarray]:
    """The definition, in float64."""
    average = [array.copy() for array in history[0]]
    for n, weights in enumerate(history[1:], 1):
        d = (min(decay, (1 + n) / (10 + n)) if warmup else decay) ** every
        average = [d * a + (1 - d) * w for a, w in zip(average, weights, strict=True)]
    return average


@pytest.mark.parametrize("decay", [0.5, 0.99, 0.999])
@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("every", [1, 3])
def test_equals_a_numpy_loop(decay, warmup, every):
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    model[0].bias.requires_grad_(False)
    average = WeightAverage(model, decay, decay_warmup=warmup, update_every=every)
    expected = numpy_ema(random_walk(model, 50, average), decay, warmup, every)
    assert len(average.averages) == 3
    for got, want in zip(average.averages, expected, strict=True):
        np.testing.assert_allclose(got.double().numpy(), want, atol=1e-6, rtol=0)


def test_average_of_bfloat16_weights_moves():
    """At decay 0.999 a bfloat16 average would stay where it is."""
    model = nn.Linear(4, 4).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    average = WeightAverage(model, 0.999, decay_warmup=False)
    with torch.no_grad():
        model.weight.fill_(1.0625)
    for _ in range(100):
        average.update()
    assert average.averages[0].dtype is torch.float32
    expected = 1.0625 - 0.0625 * 0.999**100
    assert average.averages[0][0, 0].item() == pytest.approx(expected, abs=1e-6)


def test_swap_is_bitwise_and_survives_an_exception():
    model = nn.Linear(6, 6)
    average = WeightAverage(model, 0.9)
    random_walk(model, 5, average)
    raw = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match="evaluation failed"), average.applied():
        assert torch.equal(model.weight, average.averages[0])
        assert not torch.equal(model.weight, raw)
        raise RuntimeError("evaluation failed")
    assert torch.equal(model.weight, raw) and not average.is_applied


def test_update_while_swapped_in_is_refused():
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.9)
    average.apply()
    with pytest.raises(ModelError, match="swapped in"):
        average.update()


def test_nothing_trainable_is_an_error():
    with pytest.raises(ModelError, match="nothing to average"):
        WeightAverage(nn.Linear(2, 2).requires_grad_(False))


def test_save_and_load_round_trip(tmp_path):
    model = nn.Linear(3, 3)
    average = WeightAverage(model, 0.9)
    random_walk(model, 4, average)
    average.save(tmp_path)
    other = WeightAverage(model, 0.9)
    other.load(tmp_path)
    assert other.num_updates == 4
    assert all(torch.equal(a, b) for a, b in zip(average.averages, other.averages, strict=True))
    with pytest.raises(ModelError, match="other settings"):
        WeightAverage(model, 0.99).load(tmp_path)
    with pytest.raises(ModelError, match=r"no ema\.safetensors"):
        other.load(tmp_path / "elsewhere")


def run_callback(callback: EMACallback, model: nn.Module, steps: int, skipped: set[int] = frozenset()) -> list:
    """Plays the Trainer's events around a random walk; returns the weights after each real step."""
    state = SimpleNamespace(global_step=0)
    callback.on_train_begin(None, state, None, model=model)
    history = [model.weight.detach().double().numpy().copy()]
    for step in range(1, steps + 1):
        if step not in skipped:
            random_walk(model, 1)
        optimizer = SimpleNamespace(step_was_skipped=step in skipped)
        callback.on_optimizer_step(None, state, None, optimizer=optimizer)
        state.global_step = step
        if step not in skipped:
            history.append(model.weight.detach().double().numpy().copy())
    return history


def test_skipped_steps_are_not_averaged():
    model = nn.Linear(3, 3, bias=False)
    callback = EMACallback(0.9)
    history = run_callback(callback, model, 6, skipped={2, 5})
    expected = numpy_ema([[w] for w in history], 0.9, warmup=True)[0]
    assert callback.average.num_updates == 4
    np.testing.assert_allclose(callback.average.averages[0].double().numpy(), expected, atol=1e-6)


def test_until_update_after_step_the_average_follows_the_weights():
    model = nn.Linear(3, 3, bias=False)
    callback = EMACallback(0.9, update_after_step=4)
    history = run_callback(callback, model, 6)
    assert callback.average.num_updates == 2
    expected = numpy_ema([[w] for w in history[4:]], 0.9, warmup=True)[0]
    np.testing.assert_allclose(callback.average.averages[0].double().numpy(), expected, atol=1e-6)


def test_apply_before_training_or_to_another_model_is_refused():
    callback = EMACallback(0.9)
    with pytest.raises(ModelError, match="no average yet"):
        callback.apply_ema(nn.Linear(2, 2))
    model = nn.Linear(2, 2, bias=False)
    run_callback(callback, model, 1)
    with pytest.raises(ModelError, match="not the model"):
        callback.apply_ema(nn.Linear(2, 2))
