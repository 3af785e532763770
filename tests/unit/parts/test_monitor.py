"""The monitor: norms against torch's own, alarms, and the stop before a bad update."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from forge_cli.errors import DivergedError
from forge_cli.parts.layers import ParameterGroups, count_parameters, measure_norms
from forge_cli.parts.monitor import MonitorCallback
from forge_cli.parts.step_records import RecordFile


class SyncCounter(TorchDispatchMode):
    """Counts reads of a tensor's value by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return function(*args, **(kwargs or {}))


def backward(model, batch) -> torch.Tensor:
    loss = model(**batch).loss
    loss.backward()
    return loss.detach()


def play(monitor: MonitorCallback, losses: list[float], *, grad: float = 1.0) -> None:
    """Plays steps with the given losses; the gradient is a constant."""
    parameter = monitor._groups.parameters[0]
    for step, loss in enumerate(losses):
        for p in monitor._groups.parameters:
            p.grad = torch.full_like(p, grad / parameter.numel() ** 0.5)
        monitor.record_micro_step(torch.tensor(loss), [step + 1], 10)
        monitor.measure_step()
        state = SimpleNamespace(global_step=step)
        monitor.on_pre_optimizer_step(None, state, None, optimizer=None)
        monitor.on_step_end(None, state, None)


@pytest.fixture
def started(load_tiny):
    """A monitor at the start of a run."""

    def start(**options) -> MonitorCallback:
        monitor = MonitorCallback(**options)
        arguments = SimpleNamespace(logging_nan_inf_filter=True)
        monitor.on_train_begin(arguments, SimpleNamespace(global_step=0), None, model=load_tiny())
        assert arguments.logging_nan_inf_filter is False
        return monitor

    return start


def test_norms_equal_torchs_own(load_tiny, tiny_batch):
    model = load_tiny()
    backward(model, tiny_batch)
    groups = ParameterGroups(model)
    with SyncCounter() as syncs:
        norms, total = measure_norms(groups)
    assert syncs.count == 0
    assert total.item() == pytest.approx(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item())
    by_hand = [p.grad.norm().item() for _, p in model.named_parameters()]
    assert norms.tolist() == pytest.approx(by_hand)
    assert groups.labels == [f"layer {i}" for i in range(8)] + ["outside layers"]


def test_group_norms_square_to_the_total(load_tiny, tiny_batch):
    model = load_tiny()
    monitor = MonitorCallback()
    state = SimpleNamespace(global_step=0)
    monitor.on_train_begin(SimpleNamespace(), state, None, model=model)
    monitor.record_micro_step(backward(model, tiny_batch), [1, 2], 48)
    monitor.on_pre_optimizer_step(None, state, None)
    monitor.on_step_end(None, state, None)
    monitor.flush()
    record = monitor.records[0]
    layer_3 = [p.grad for n, p in model.named_parameters() if ".layers.3." in n]
    assert record["group_norms"]["layer 3"] == pytest.approx(torch.nn.utils.get_total_norm(layer_3).item(), rel=1e-5)
    squares = sum(norm**2 for norm in record["group_norms"].values())
    assert squares**0.5 == pytest.approx(record["grad_norm"], rel=1e-5)
    assert record["tokens"] == 48


def test_one_sync_per_step_and_one_transfer_per_log_line(started, monkeypatch):
    monitor = started()
    transfers, read = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (transfers.append(len(self)), read(self))[1])
    with SyncCounter() as syncs:
        play(monitor, [1.0] * 10)
    assert transfers == [2] * 10  # loss and gradient norm are judged before each update
    transfers.clear()
    with syncs:
        monitor.flush()
    assert len(transfers) == 1 and syncs.count == 0  # one transfer of all values, no scalar reads
    assert [r["loss"] for r in monitor.records] == [1.0] * 10


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_loss_stops_before_the_update_and_names_the_rows(started, tmp_path, bad):
    monitor = started(metrics_path=tmp_path / "metrics.jsonl")
    with pytest.raises(DivergedError) as error:
        play(monitor, [1.0, bad])
    assert error.value.exit_code == 10
    assert "step 2" in str(error.value) and "row 2" in str(error.value)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["loss"] == 1.0 and records[1]["diverged"] and records[1]["rows"] == [2]


def test_a_bad_gradient_with_a_fine_loss_stops_and_names_the_tensor(started):
    monitor = started()
    play(monitor, [1.0])
    monitor._groups.parameters[5].grad[0] = float("nan")
    monitor.record_micro_step(torch.tensor(1.0), [7], 10)
    monitor.measure_step()
    with pytest.raises(DivergedError) as error:
        monitor.on_pre_optimizer_step(None, SimpleNamespace(global_step=1), None)
    assert monitor._groups.names[5] in str(error.value) and "1 of" in str(error.value)


def test_a_gradient_scaler_may_overflow_but_not_the_loss(started):
    monitor = started()
    for p in monitor._groups.parameters:
        p.grad = torch.full_like(p, float("inf"))
    state, optimizer = SimpleNamespace(global_step=0), SimpleNamespace(scaler=object())
    monitor.record_micro_step(torch.tensor(1.0), [1], 10)
    monitor.measure_step()
    monitor.on_pre_optimizer_step(None, state, None, optimizer=optimizer)
    monitor.record_micro_step(torch.tensor(float("nan")), [1], 10)
    monitor.measure_step()
    with pytest.raises(DivergedError):
        monitor.on_pre_optimizer_step(None, state, None, optimizer=optimizer)


@pytest.mark.parametrize(
    ("losses", "grad", "kinds"),
    [
        ([1.0] * 12, 1.0, set()),
        ([1.0] * 6 + [2.9], 1.0, set()),
        ([1.0] * 6 + [3.1], 1.0, {"spike"}),
        ([3.1, 1.0, 1.0], 1.0, set()),  # no spike before the window is full
        ([0.0], 1.0, {"zero_loss"}),
        ([1.0], 0.0, {"zero_gradient"}),
    ],
)
def test_alarms(started, losses, grad, kinds):
    monitor = started(spike_ratio=3.0, spike_window=5)
    play(monitor, losses, grad=grad)
    monitor.flush()
    assert {alarm["alarm"] for alarm in monitor.alarms} == kinds


def test_a_tensor_without_gradient_raises_an_alarm_at_step_1(load_tiny, tiny_batch):
    model = load_tiny()
    monitor = MonitorCallback()
    state = SimpleNamespace(global_step=0)
    monitor.on_train_begin(SimpleNamespace(), state, None, model=model)
    loss = backward(model, tiny_batch)
    model.model.layers[2].mlp.up_proj.weight.grad = None
    monitor.record_micro_step(loss, [1], 10)
    monitor.on_pre_optimizer_step(None, state, None)
    assert [alarm["alarm"] for alarm in monitor.alarms] == ["no_gradient"]
    assert "layers.2.mlp.up_proj" in monitor.alarms[0]["message"]


def test_count_parameters_unpacks_4_bit_weights(load_tiny):
    assert count_parameters(load_tiny(four_bit=True))[0] == count_parameters(load_tiny())[0]


def test_half_a_line_spoils_nothing_and_a_lost_record_is_told_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert RecordFile(path).append({"step": 3}) == ""
    assert path.read_text().splitlines() == ['{"step": 1}', '{"step": 2, "lo', '{"step": 3}']
    gone = RecordFile(tmp_path / "gone" / "metrics.jsonl")
    assert "cannot be written" in gone.append({"step": 1}) and gone.append({"step": 2}) == ""
