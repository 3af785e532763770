"""What the processes of one run tell each other. With one process every function answers for itself.

Values travel as bytes of JSON, never as pickles, and wait on the host, so that a signal is still noticed.
"""

from __future__ import annotations

import json
import os
import socket
import time
from datetime import timedelta

import torch
from torch import distributed

# A dead process is noticed at once, a hanging one by the watchdog; tokenising may take the first one hours.
TIMEOUT = timedelta(days=2)
MEETING_SECONDS = 50.0
_NAP_SECONDS = 0.02
# What gloo and NCCL say when the other end is closed.
_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "remote process exited",
)


def count_ranks() -> int:
    """Returns how many processes the run has."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def is_main() -> bool:
    """Tells whether this is the process that writes."""
    return count_ranks() == 1 or distributed.get_rank() == 0


def join_ranks(device: str) -> None:
    """Meets the other processes at the address that their launcher set in the environment.

    Args:
        device: ``cpu`` or ``cuda:N``.

    Raises:
        RuntimeError, ValueError: The others cannot be reached, or the environment does not say where they are.
    """
    if distributed.is_initialized():
        return
    number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = _meet_at_store(number, count)
    backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)


def _meet_at_store(number: int, count: int) -> distributed.Store:
    """Waits until all processes are there; in Python, as native code would wait without noticing a signal.

    Raises:
        RuntimeError: Some do not come, or the port is taken.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    until = time.monotonic() + MEETING_SECONDS
    # torchrun keeps the store itself.
    is_host = number == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    while not is_host:
        try:
            socket.create_connection((host, port), timeout=5).close()
            break
        except OSError as error:
            if time.monotonic() > until:
                raise RuntimeError(f"nobody answers ({error})") from error
            time.sleep(_NAP_SECONDS)
    store = distributed.TCPStore(host, port, is_master=is_host, wait_for_workers=False)
    store = distributed.PrefixStore(f"forge-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    store.set(f"here-{number}", "")
    while missing := [one for one in range(count) if not store.check([f"here-{one}"])]:
        if time.monotonic() > until:
            raise RuntimeError(f"process {missing[0]} of {count} did not come")
        time.sleep(_NAP_SECONDS)
    return store


def is_lost_process(error: Exception) -> bool:
    """Tells whether an exception of a collective call says that another process is gone."""
    text = str(error)
    return isinstance(error, (distributed.DistError, RuntimeError)) and any(word in text for word in _LOST)


def wait_for_all() -> None:
    """Comes back when every process has come here."""
    add_up([0.0])


def add_up(values: list[float]) -> list[float]:
    """Returns the sums over all processes, in float64; whole numbers stay whole."""
    if count_ranks() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64)
    _wait(distributed.all_reduce(total, async_op=True))
    return [int(one) if isinstance(was, int) else one for one, was in zip(total.tolist(), values, strict=True)]


def gather(value: object) -> list[object]:
    """Returns the values (plain data) of all processes, by their rank."""
    if count_ranks() == 1:
        return [value]
    data = json.dumps(value).encode()
    sizes = [torch.zeros((), dtype=torch.int64) for _ in range(count_ranks())]
    _wait(distributed.all_gather(sizes, torch.tensor(len(data)), async_op=True))
    most = max(int(size) for size in sizes)
    # gloo takes tensors of one size only
    padded = torch.frombuffer(bytearray(data.ljust(most)), dtype=torch.uint8)
    rows = [torch.zeros(most, dtype=torch.uint8) for _ in sizes]
    _wait(distributed.all_gather(rows, padded, async_op=True))
    return [json.loads(bytes(row[: int(size)].tolist())) for row, size in zip(rows, sizes, strict=True)]


def share(value: object = None) -> object:
    """Returns the first process's value (plain data) in all of them."""
    return gather(value if is_main() else None)[0]


def _wait(work: distributed.Work) -> None:
    """Waits in Python: in native code a signal would not be noticed before the others came."""
    while not work.is_completed():
        time.sleep(_NAP_SECONDS)
    work.wait()
