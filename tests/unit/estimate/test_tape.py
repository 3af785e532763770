"""Autograd's rules by hand: what lives when."""

from __future__ import annotations

from forge_cli.estimate.ledger import Ledger
from forge_cli.estimate.operations import Formats, Operations
from forge_cli.estimate.tape import Tape


def make(granule: int = 1, **options) -> tuple[Ledger, Tape, Operations]:
    ledger = Ledger(granule)
    tape = Tape(ledger, **options)
    return ledger, tape, Operations(tape, Formats(4, autocast=False, cuda=False))


def mean(tape: Tape, x):
    numel = x.numel
    (loss,) = tape.apply((x,), [(1, 4)], lambda g: [tape.new(numel, 4)])
    return loss


def test_sizes_are_rounded_up_to_the_granule():
    ledger, tape, _ = make(granule=512)
    kept = [tape.new(1, 4), tape.new(129, 4)]
    assert ledger.live_bytes == 512 + 1024
    del kept
    assert ledger.live_bytes == 0


def test_a_two_layer_mlp_by_hand():
    ledger, tape, ops = make()
    first, second = tape.leaf(10 * 20, 4, True), tape.leaf(20 * 5, 4, True)
    x = tape.new(8 * 10, 4)
    hidden = ops.linear(x, first, None, 10, 20)
    active = ops.unary(hidden)
    del hidden  # the activation keeps it
    loss = mean(tape, ops.linear(active, second, None, 20, 5))
    del active  # the second layer keeps it
    # x 320, hidden 640, active 640 and the loss; nobody keeps the last output.
    assert ledger.live_bytes == 320 + 640 + 640 + 4
    ledger.enter("step")
    tape.backward(loss)
    assert first.grad.storage.size_bytes == 800 and second.grad.storage.size_bytes == 400
    assert ledger.live_bytes == 320 + 4 + 800 + 400
    # At its highest: the gradient of `active` and of `hidden` beside x, hidden and the second weight's gradient ...
    of_activation = 320 + 4 + 640 + 640 + 640 + 400
    # ... or the gradient of the output beside both results of the second layer.
    of_second = 320 + 4 + 640 + 640 + 160 + 640 + 400
    assert max(size for size, _ in ledger.peaks.values()) == max(of_activation, of_second)


def test_gradients_of_one_tensor_are_added_in_place():
    ledger, tape, ops = make()
    weight = tape.leaf(100, 4, True)
    x = ops.scale(weight)
    loss = mean(tape, ops.add(ops.scale(x), ops.scale(x)))
    del x
    tape.backward(loss)
    # Output's gradient (shared by both branches), one branch's gradient, and the other's: the sum takes no more.
    assert ledger.peaks["backward "][0] == 4 + 3 * 400
    assert weight.grad.storage.size_bytes == 400


def test_earlier_gradients_stay_beside_new_ones():
    ledger, tape, ops = make(has_gradients=True)
    weight = tape.leaf(10 * 10, 4, True)
    assert ledger.parts["gradients"] == 400
    loss = mean(tape, ops.linear(tape.new(50, 4), weight, None, 10, 10))
    tape.backward(loss)
    assert ledger.parts["gradients"] == 400
    assert max(parts.get("workspace", 0) for _, parts in ledger.peaks.values()) >= 400


def test_a_checkpointed_stretch_keeps_its_input_and_runs_again():
    ledger, tape, ops = make()
    weights = [tape.leaf(10 * 10, 4, True) for _ in range(3)]
    calls = []

    def stretch(x):
        calls.append(len(calls))
        for weight in weights:
            x = ops.unary(ops.linear(x, weight, None, 10, 10))
        return x

    x = tape.new(80, 4)
    x.needs_grad = True
    loss = mean(tape, tape.checkpoint(stretch, x))
    assert ledger.live_bytes == 320 + 4
    tape.backward(loss)
    assert calls == [0, 1]
    assert ledger.live_bytes == 320 + 4 + 3 * 400 + x.grad.storage.size_bytes


def test_without_autograd_nothing_is_kept():
    ledger, tape, ops = make()
    weight, x = tape.leaf(100, 4, True), tape.new(80, 4)
    with tape.no_grad():
        y = ops.unary(ops.linear(x, weight, None, 10, 10))
    assert y.node is None and ledger.live_bytes == 320 + 320


def test_every_byte_is_given_back():
    ledger, tape, ops = make()
    weight = tape.leaf(100, 4, True)
    x = tape.new(80, 4)
    parts = ops.split(ops.linear(x, weight, None, 10, 10), [40, 40])
    loss = mean(tape, ops.join([ops.multiply(parts[0], parts[1]), ops.scale(ops.power(parts[0]))]))
    tape.backward(loss)
    del loss, x, weight, parts
    assert ledger.live_bytes == 0 and not any(ledger.parts.values())


def test_a_gradient_that_two_weights_get_is_not_one_tensor():
    ledger, tape, ops = make()
    first, second = tape.leaf(10, 4, True), tape.leaf(10, 4, True)
    loss = mean(tape, ops.add(first, second))
    tape.backward(loss)
    del loss
    assert ledger.parts["gradients"] == ledger.live_bytes == 2 * 10 * 4
    assert first.grad is not second.grad
