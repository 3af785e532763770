"""Live state as plain data and tensors, and back: what a checkpoint holds, without pickle."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import nn

from forge_cli.checkpoints.files import TensorBytes

# Names of formats in safetensors' header.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def flatten(tree: object) -> tuple[object, dict[str, torch.Tensor]]:
    """Takes the tensors out of nested dicts, lists and tuples.

    Args:
        tree: Nested data, as from a ``state_dict``.

    Returns:
        What is left, which is JSON, and the tensors by their place in the tree. One that occurs twice is kept once.

    Raises:
        TypeError: Something is neither of these nor a number, text, truth value or ``None``.
    """
    tensors: dict[str, torch.Tensor] = {}
    places: dict[tuple, str] = {}

    def visit(tree: object, place: str) -> object:
        if isinstance(tree, torch.Tensor):
            # An empty tensor has no address of its own.
            same = (tree.data_ptr() or place, tree.dtype, tree.shape, tree.stride())
            if same not in places:
                name = place.removesuffix("/")
                places[same], tensors[name] = name, tree
            return {"tensor": places[same]}
        if isinstance(tree, Mapping):
            return {"dict": [[key, visit(value, f"{place}{key}/")] for key, value in tree.items()]}
        if isinstance(tree, (list, tuple)):
            kind = "tuple" if isinstance(tree, tuple) else "list"
            return {kind: [visit(value, f"{place}{number}/") for number, value in enumerate(tree)]}
        if tree is None or isinstance(tree, (bool, int, float, str)):
            return tree
        raise TypeError(f"{place}: {type(tree).__name__} has no place in a checkpoint")

    return visit(tree, ""), tensors


def unflatten(tree: object, tensors: Mapping[str, torch.Tensor]) -> object:
    """Puts tensors back into what :func:`flatten` left."""
    if not isinstance(tree, dict):
        return tree
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: unflatten(one, tensors) for key, one in value}
    items = [unflatten(one, tensors) for one in value]
    return tuple(items) if kind == "tuple" else items


def copy_to_host(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies tensors, so that they stay what they are while training goes on; one wait for all of a device's."""
    copies = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if tensor.device.type == "cpu":
            copies[name] = tensor.clone(memory_format=torch.contiguous_format)
        else:
            copies[name] = tensor.contiguous().to("cpu", non_blocking=True)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()
    return copies


def list_bytes(tensors: Mapping[str, torch.Tensor]) -> list[TensorBytes]:
    """Describes tensors for :mod:`forge_cli.checkpoints`, which knows no torch; bytes are read one tensor at a time."""
    return [
        TensorBytes(name, _DTYPES[t.dtype], tuple(t.shape), t.numel() * t.element_size(), lambda t=t: _read(t))
        for name, t in tensors.items()
    ]


def _read(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy())


def find_non_finite(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Returns the names of tensors that hold a NaN or an infinity; one transfer for all of them."""
    real = {name: t for name, t in tensors.items() if t.is_floating_point() and t.numel()}
    if not real:
        return []
    device = next(iter(real.values())).device
    verdicts = torch.stack([torch.isfinite(t).all().to(device, non_blocking=True) for t in real.values()]).tolist()
    return [name for name, is_finite in zip(real, verdicts, strict=True) if not is_finite]


def list_trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Lists what is trained by name, each tensor once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trained(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Puts saved weights into a model; returns what does not fit, and then changes nothing."""
    trained = list_trained(model)
    wrong = [f"{name} is missing" for name in trained.keys() - tensors.keys()]
    wrong += [f"{name} is not trained here" for name in tensors.keys() - trained.keys()]
    for name, parameter in trained.items():
        saved = tensors.get(name)
        if saved is not None and (saved.shape != parameter.shape or saved.dtype != parameter.dtype):
            was, now = (f"{str(one.dtype).removeprefix('torch.')}{list(one.shape)}" for one in (saved, parameter))
            wrong.append(f"{name} was {was} and is {now}")
    if not wrong:
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])
    return sorted(wrong)


def read_random_state() -> dict[str, object]:
    """Reads the state of Python's, NumPy's and torch's random numbers, on the CPU and every visible GPU; JSON."""
    version, internal, gauss = random.getstate()
    name, key, *rest = np.random.get_state()
    devices = [
        torch.random.get_rng_state(),
        *(torch.cuda.random.get_rng_state_all() if torch.cuda.is_available() else []),
    ]
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, key.tolist(), *rest],
        "torch": [bytes(state.numpy()).hex() for state in devices],
    }


def write_random_state(state: Mapping[str, object]) -> None:
    """Sets what :func:`read_random_state` read; GPUs that are not there now are left out."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, key, *rest = state["numpy"]
    np.random.set_state((name, np.array(key, dtype=np.uint32), *rest))
    on_host, *on_gpus = (torch.frombuffer(bytearray.fromhex(one), dtype=torch.uint8) for one in state["torch"])
    torch.random.set_rng_state(on_host)
    for number, one in enumerate(on_gpus[: torch.cuda.device_count()]):
        torch.cuda.random.set_rng_state(one, number)


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Leaves random numbers as they were before the block."""
    state = read_random_state()
    try:
        yield
    finally:
        write_random_state(state)


def count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Adds up the sizes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
