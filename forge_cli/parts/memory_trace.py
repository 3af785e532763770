"""Counts the bytes of live tensors while any PyTorch code runs, with real or with fake tensors.

A storage counts from the operation that makes it until nothing holds it any more. What operations allocate and free
inside themselves is invisible here; a table of workspaces by operation stands for it.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

CUDA_GRANULE = 512
_NOT_AN_ORIGIN = (os.path.dirname(torch.__file__) + os.sep, __file__, "cuda_likeness.py")
# What autograd calls in these forms only while somebody looks on, and how many of their arguments it would overwrite.
# Source: torch 2.13, InputBuffer::add, index_backward, gather_backward.
_IN_PLACE_ELSEWHERE = {
    torch.ops.aten.add.Tensor: 2,
    torch.ops.aten.index_put.default: 1,
    torch.ops.aten.scatter_add.default: 1,
}
# What an operation needs inside itself, in bytes, from its arguments.
Workspace = Callable[[tuple, dict], int]


@dataclass(frozen=True)
class LiveStorage:
    """One storage that is being counted.

    Attributes:
        num_bytes: Its size, rounded up to the granule.
        op: The operation that made it.
        shape: Shape and format of the tensor it was first seen as.
        where: The line, or in a backward pass the autograd node, that made it.
        phase: The phase it was made in.
    """

    num_bytes: int
    op: str
    shape: str
    where: str
    phase: str


class LiveBytes(TorchDispatchMode):
    """Counts live bytes, their highest value and that of every phase.

    Autograd adds gradients up in place, but not while a dispatch mode or a tensor subclass looks on. Such a sum is
    therefore judged one operation later: where one of its terms is gone by then, it stands in that term's place.

    Args:
        granule: Sizes are rounded up to multiples of this: 512 as CUDA's allocator does, 1 for none.
        workspaces: What operations need inside themselves, by name such as ``aten.mm``.
        keeps_events: Remember every storage ever seen, for :meth:`list_peak`.

    Attributes:
        live_bytes: Bytes that are live now.
        peaks: Highest live bytes of each phase, in order of first entry.
    """

    def __init__(
        self, granule: int = CUDA_GRANULE, workspaces: Mapping[str, Workspace] | None = None, keeps_events: bool = False
    ) -> None:
        super().__init__()
        self.granule = granule
        self.workspaces = workspaces or {}
        self.live_bytes = 0
        self.peaks: dict[str, int] = {}
        self.phase = ""
        self._sizes: dict[int, int] = {}
        self._watches: dict[int, weakref.ref] = {}
        self._left_out: dict[int, weakref.ref] = {}
        self._doubtful: tuple[weakref.ref, list[weakref.ref]] | None = None
        self._events: list[tuple[int, LiveStorage, str]] | None = [] if keeps_events else None
        self._peak_events: dict[str, tuple[int, int]] = {}
        self._seen: dict[int, LiveStorage] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise every operation passes through frames of the compiler.
        return False

    # What the caller does ----------------------------------------------------------------------------------

    def register(self, tensors: Iterable[torch.Tensor], name: str) -> None:
        """Counts tensors that were made before, such as weights."""
        for tensor in tensors:
            self._count(tensor, name)

    def leave_out(self, tensors: Iterable[torch.Tensor]) -> None:
        """Stops counting tensors, such as those that are in another memory where this stands for."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            self._drop(key)
            self._left_out[key] = weakref.ref(tensor.untyped_storage(), lambda _, key=key: self._left_out.pop(key))

    def mark(self, phase: str) -> None:
        """Begins a phase, or goes on with one that has been left."""
        self._judge_sum()
        self.phase = phase
        self._raise_peak()

    def forget_peaks(self, but: str = "") -> None:
        """Starts the highest values anew, except that of one phase; what is live stays counted."""
        self._judge_sum()
        self.peaks = {name: peak for name, peak in self.peaks.items() if name == but}

    @property
    def peak_bytes(self) -> int:
        """The highest live bytes of all phases."""
        return max(self.peaks.values(), default=0)

    def list_peak(self, phase: str | None = None) -> list[LiveStorage]:
        """Lists what was live at the highest point, in the order it was made; a workspace comes last.

        Args:
            phase: Of this phase; ``None`` takes the highest one.
        """
        if self._events is None:
            raise ValueError("nothing was kept: LiveBytes(keeps_events=True)")
        phase = max(self.peaks, key=self.peaks.__getitem__) if phase is None else phase
        until, workspace = self._peak_events[phase]
        live: dict[int, LiveStorage] = {}
        for sign, storage, _ in self._events[:until]:
            if sign > 0:
                live[id(storage)] = storage
            else:
                live.pop(id(storage))
        inside = [LiveStorage(workspace, "workspace", "", "", phase)] if workspace else []
        return [*live.values(), *inside]

    def list_events(self, phase: str) -> list[tuple[int, LiveStorage]]:
        """Lists what was made (1) and freed (-1) during a phase, in order, all of its occurrences."""
        return [(sign, one) for sign, one, when in self._events or () if when == phase]

    # What PyTorch calls ------------------------------------------------------------------------------------

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._judge_sum()
        kwargs = kwargs or {}
        for tensor in _tensors_in((args, kwargs)):
            self._count(tensor, "from before")
        result = function(*args, **kwargs)
        num_terms = _IN_PLACE_ELSEWHERE.get(function, 0)
        if num_terms and _is_called_by_autograd(sys._getframe(1)) and self._doubt_sum(args[:num_terms], result):
            return result
        name = str(function.overloadpacket) if hasattr(function, "overloadpacket") else str(function)
        for tensor in _tensors_in(result):
            self._count(tensor, name)
        if name in self.workspaces:
            self._raise_peak(self.workspaces[name](args, kwargs))
        return result

    # Counting ----------------------------------------------------------------------------------------------

    def _count(self, tensor: torch.Tensor, op: str) -> None:
        try:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
        except (NotImplementedError, RuntimeError):  # sparse and other tensors without a storage of their own
            return
        size = -(-size // self.granule) * self.granule
        before = self._sizes.get(key)
        if before == size or key in self._left_out:
            return
        if before is not None:  # resized
            self._drop(key)
        self._sizes[key] = size
        self.live_bytes += size
        self._watches[key] = weakref.ref(storage, lambda _, key=key: self._drop(key))
        if self._events is not None:
            seen = LiveStorage(size, op, _describe(tensor), _find_origin(), self.phase)
            self._seen[key] = seen
            self._events.append((1, seen, self.phase))
        self._raise_peak()

    def _drop(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key, 0)
        self._watches.pop(key, None)
        if self._events is not None and key in self._seen:
            self._events.append((-1, self._seen.pop(key), self.phase))

    def _raise_peak(self, workspace: int = 0) -> None:
        if self.live_bytes + workspace > self.peaks.get(self.phase, -1):
            self.peaks[self.phase] = self.live_bytes + workspace
            if self._events is not None:
                self._peak_events[self.phase] = (len(self._events), workspace)

    def _doubt_sum(self, terms: tuple, result: torch.Tensor) -> bool:
        """Puts a sum of gradients off until it is known whether autograd would have made it in place."""
        size = result.untyped_storage().nbytes()
        same = [t for t in terms if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes() == size]
        if not same or result.untyped_storage()._cdata in self._sizes:
            return False
        watches = [weakref.ref(term.untyped_storage()) for term in same]
        self._doubtful = (weakref.ref(result), watches)
        return True

    def _judge_sum(self) -> None:
        """Counts the sum that was put off; if one of its terms is gone, the sum stands in its place."""
        if self._doubtful is None:
            return
        watch, terms = self._doubtful
        self._doubtful = None
        result = watch()
        if result is None:
            return
        in_place = any(term() is None for term in terms)
        self._count(result, "sum in place" if in_place else "sum")


def _tensors_in(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors_in(one)
    elif isinstance(value, dict):
        yield from _tensors_in(tuple(value.values()))


def _is_called_by_autograd(frame) -> bool:
    """Whether the engine itself, and no Python code that it runs, called the operation."""
    return frame.f_code.co_name == "_engine_run_backward"


def _describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _find_origin() -> str:
    """Names the nearest line of code outside torch and this file, and the autograd node that is running."""
    frame = sys._getframe(1)
    while frame is not None and any(part in frame.f_code.co_filename for part in _NOT_AN_ORIGIN):
        frame = frame.f_back
    place = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} {frame.f_code.co_name}" if frame else ""
    node = torch._C._current_autograd_node()
    return f"{place} in {node.name()}" if node is not None else place
