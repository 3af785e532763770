"""Live bytes against sequences counted by hand, and against torch's own allocator where the order is autograd's."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from forge_cli.parts.memory_trace import LiveBytes

# x [128, 32] -> h [128, 64] -> y [128, 10], float32.
X, H, Y, W1, W2 = 4 * 128 * 32, 4 * 128 * 64, 4 * 128 * 10, 4 * 64 * 32, 4 * 10 * 64
SCALAR = 4


@pytest.fixture(params=["real", "fake"])
def tensors(request):
    with FakeTensorMode() if request.param == "fake" else contextlib.nullcontext():
        yield request.param


def make_mlp():
    w1 = torch.nn.Parameter(torch.randn(64, 32))
    w2 = torch.nn.Parameter(torch.randn(10, 64))
    return w1, w2, torch.randn(128, 32)


def test_a_step_of_two_layers(tensors):
    w1, w2, x = make_mlp()
    live = LiveBytes(granule=1)
    live.register([w1, w2], "weight")
    live.register([x], "input")
    base = W1 + W2 + X
    assert live.live_bytes == base
    with live:
        live.mark("forward")
        loss = (torch.relu(x @ w1.t()) @ w2.t()).sum()
        live.mark("backward")
        loss.backward()
        live.mark("second forward")
        loss = (torch.relu(x @ w1.t()) @ w2.t()).sum()
        live.mark("second backward")
        loss.backward()
        del loss
        live.mark("end")
    # relu(h) is made while h is there, and kept for the backward pass; h is not.
    assert live.peaks["forward"] == base + 2 * H
    # Gradient of relu(h) and then of h, beside relu(h), the first weight gradient, the loss and its gradient.
    assert live.peaks["backward"] == base + W2 + 3 * H + 2 * SCALAR
    gradients = W1 + W2
    assert live.peaks["second forward"] == base + gradients + SCALAR + 2 * H
    # The second weight gradient is added to the first in place and gone before relu's turn.
    assert live.peaks["second backward"] == base + gradients + 3 * H + 2 * SCALAR
    assert live.live_bytes == base + gradients


def test_sums_of_gradients_are_made_in_place(tensors):
    x = torch.randn(64, 64, requires_grad=True)
    live = LiveBytes(granule=1)
    live.register([x], "x")
    size = 4 * 64 * 64
    with live:
        loss = (x * 2 + x * 3 + x * 4).sum()
        live.mark("backward")
        loss.backward()
        live.mark("end")
    # An expanded scalar is the gradient of all three; the running sum and one new term at a time.
    assert live.peaks["backward"] == size + 2 * size + 2 * SCALAR


def test_a_sum_whose_terms_live_on_is_counted(tensors):
    x = torch.randn(64, 64)
    live = LiveBytes(granule=1)
    live.register([x], "x")
    kept = []

    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            kept.append(gradient)
            return gradient

    start = torch.zeros(64, 64, requires_grad=True)
    size = 4 * 64 * 64
    with live:
        loss = (Both.apply(start) * x + Both.apply(start) * x).sum()
        live.mark("backward")
        loss.backward()
        live.mark("end")
    # x, start, its gradient, the two gradients that somebody kept, and the loss.
    assert live.peaks["end"] == 5 * size + SCALAR


def test_views_and_operations_in_place_cost_nothing(tensors):
    whole = torch.zeros(100, 100)
    live = LiveBytes(granule=1)
    with live:
        live.register([whole], "whole")
        part = whole[:1].t().reshape(-1)
        whole.add_(1).relu_()
        torch.add(whole, 1, out=whole)
        assert live.peak_bytes == 40_000
        del whole
        assert live.live_bytes == 40_000, "a view holds the whole storage"
        del part
        assert live.live_bytes == 0


def test_checkpointing_keeps_inputs_and_recomputes(tensors):
    w1, w2, x = make_mlp()
    x.requires_grad_()
    live = LiveBytes(granule=1)
    live.register([w1, w2, x], "before")
    base = W1 + W2 + X

    def run(value):
        return torch.relu(value @ w1.t()) @ w2.t()

    with live:
        y = checkpoint(run, x, use_reentrant=False)
        assert live.live_bytes == base + Y
        live.mark("backward")
        y.backward(torch.ones_like(y))
        live.mark("end")
    # Recomputed up to relu(h) only: the output is not needed. Then as without checkpointing.
    assert live.peaks["backward"] == base + 2 * Y + W2 + 3 * H
    assert live.live_bytes == base + Y + X + W1 + W2


def test_sizes_are_rounded_up_to_the_granule():
    live = LiveBytes(granule=512)
    with live:
        one, two = torch.zeros(1), torch.zeros(129)
        assert live.live_bytes == 512 + 1024
    assert one.numel() + two.numel() == 130


def test_a_storage_that_grows_counts_anew():
    live = LiveBytes(granule=1)
    with live:
        tensor = torch.zeros(10)
        tensor.resize_(1000)
        assert live.live_bytes == 4000
        tensor.untyped_storage().resize_(0)
        tensor.detach()
        assert live.live_bytes == 0


def test_a_workspace_counts_while_its_operation_runs():
    live = LiveBytes(granule=1, workspaces={"aten.mm": lambda args, kwargs: 1000 * args[0].shape[0]})
    with live:
        a = torch.zeros(4, 4)
        b = a @ a
        assert live.live_bytes == 128
        assert live.peak_bytes == 128 + 4000
        a + b
    assert live.peak_bytes == 4128


def test_phases_have_peaks_of_their_own_and_can_be_forgotten():
    live = LiveBytes(granule=1)
    with live:
        live.mark("load")
        kept = torch.zeros(100)
        live.mark("work")
        torch.zeros(1000)
        live.mark("rest")
        assert live.peaks == {"load": 400, "work": 4400, "rest": 400} | {k: 0 for k in live.peaks if not k}
        live.forget_peaks(but="load")
        assert live.peaks == {"load": 400}
        live.mark("work")
        assert live.peaks["work"] == 400 == kept.nbytes


def test_the_list_of_the_peak_adds_up_and_says_where_from(tensors):
    w1, w2, x = make_mlp()
    live = LiveBytes(granule=1, workspaces={"aten.relu": lambda args, kwargs: 7}, keeps_events=True)
    live.register([w1, w2, x], "before")
    with live:
        live.mark("forward")
        loss = (torch.relu(x @ w1.t()) @ w2.t()).sum()
        live.mark("backward")
        loss.backward()
    for phase in ("forward", "backward"):
        assert sum(one.num_bytes for one in live.list_peak(phase)) == live.peaks[phase]
    first = live.list_peak("forward")
    assert [one.op for one in first] == ["before"] * 3 + ["aten.mm", "aten.relu", "workspace"]
    assert first[3].where.startswith("test_memory_trace.py:")
    assert live.list_peak("backward")[-1].where.endswith("in ReluBackward0")
    made = sum(sign * one.num_bytes for sign, one in live.list_events("forward"))
    assert made == H + SCALAR, "relu(h) and the loss stay"


class Block(torch.nn.Module):
    """A layer with what makes autograd's order matter: three readers of one norm, residuals, a product."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(48)
        self.parts = torch.nn.ModuleList(torch.nn.Linear(48, 96) for _ in range(3))
        self.down = torch.nn.Linear(96, 48)

    def forward(self, x):
        y = self.norm(x)
        a, b, c = (part(y) for part in self.parts)
        return x + self.down(torch.nn.functional.silu(a) * b + torch.tanh(c))


@pytest.mark.parametrize("recomputes", [False, True])
def test_it_agrees_with_what_the_allocator_tells_the_profiler(recomputes):
    """The profiler needs no dispatch mode, so it sees autograd as it is without one."""
    # States of random generators, 5 kB a layer, are made behind the dispatcher's back.
    options = {"use_reentrant": False, "preserve_rng_state": False}

    def build():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(50, 48), *(Block() for _ in range(3)))
        return model, torch.optim.AdamW(model.parameters(), fused=True)

    def step(model, optimizer):
        for _ in range(2):
            hidden = model[0](torch.arange(40).reshape(2, 20))
            for block in list(model)[1:]:
                hidden = checkpoint(block, hidden, **options) if recomputes else block(hidden)
            hidden.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = build()
    live = LiveBytes(granule=1)
    live.register(model.parameters(), "weight")
    with live:
        step(model, optimizer)
        step(model, optimizer)
    model, optimizer = build()
    gc.collect()
    held = told = sum(p.nbytes for p in model.parameters())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(model, optimizer)
        step(model, optimizer)
    events = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    for event in sorted(events, key=lambda one: one.start_ns()):
        held += event.nbytes()
        told = max(told, held)
    assert len(events) > 100
    assert live.peak_bytes == pytest.approx(told, rel=2e-3)
