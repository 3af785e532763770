"""Autograd without numbers: tensors that have a size only, and the rules by which torch keeps and frees them.

Source of the rules: torch 2.13, ``torch/csrc/autograd`` (engine, input buffers, saved variables, gradient
accumulation) and ``torch/utils/checkpoint.py`` (non-reentrant).
"""

from __future__ import annotations

import heapq
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from sys import getrefcount

from forge_cli.estimate.ledger import Ledger, Storage


class Tensor:
    """A tensor's size, and where it comes from.

    Attributes:
        storage: The bytes it looks at; views share them.
        numel: Number of elements.
        itemsize: Bytes per element.
        needs_grad: Whether a gradient flows to it.
        node: The operation that made it and which of its outputs it is; ``None`` for leaves.
        grad: Gradient of a leaf.
    """

    __slots__ = ("grad", "itemsize", "needs_grad", "node", "numel", "storage")

    def __init__(self, storage: Storage, numel: int, itemsize: int) -> None:
        self.storage = storage
        self.numel = numel
        self.itemsize = itemsize
        self.needs_grad, self.node, self.grad = False, None, None

    def alias(self) -> Tensor:
        """Returns another tensor on the same bytes, outside of the graph."""
        return Tensor(self.storage, self.numel, self.itemsize)

    @property
    def is_shared(self) -> bool:
        """Whether something else holds the same bytes; gradients are added in place only where nothing does."""
        return getrefcount(self.storage) > 2  # this tensor's, and the argument


Backward = Callable[[list["Tensor | None"]], Sequence["Tensor | None"]]


class _Node:
    __slots__ = ("backward", "edges", "handles", "num_results", "number", "phase")

    def __init__(self, tape: Tape, inputs: Sequence[Tensor], num_results: int, handles: list, backward: Backward):
        tape.num_nodes += 1
        self.number, self.phase, self.num_results = tape.num_nodes, tape.phase, num_results
        self.handles, self.backward = handles, backward
        self.edges = [(one.node or (one, 0), one.numel, one.itemsize) if one.needs_grad else None for one in inputs]


class _EnoughError(Exception):
    """Ends a recomputation when everything that was saved exists again."""


class _Segment:
    """A checkpointed stretch: keeps its input, and runs again when the first saved tensor is asked for."""

    def __init__(self, function: Callable[[Tensor], Tensor], value: Tensor) -> None:
        self.function, self.value = function, value.alias()
        self.value.needs_grad = value.needs_grad
        self.handles: list[weakref.ref[_Handle]] = []
        self.position = 0
        self.found: dict[int, Storage] | None = None


class _Handle:
    """Stands for a saved tensor of a checkpointed stretch; one whose operation is gone is not saved again."""

    __slots__ = ("__weakref__", "index", "segment")

    def __init__(self, segment: _Segment) -> None:
        self.segment, self.index = segment, len(segment.handles)
        segment.handles.append(weakref.ref(self))


class Tape:
    """Records operations and runs them backwards.

    Attributes:
        ledger: Where bytes are counted.
        grad_enabled: Whether operations are recorded.
        has_gradients: Weights have gradients already, from an earlier micro step.
        tied: A weight that is used twice.
        phase: Label of what is recorded now; its backward pass counts as phase ``backward LABEL``.
        num_nodes: Operations recorded so far.
        attributes: What operations keep as plain attributes, see :meth:`keep`.
    """

    def __init__(self, ledger: Ledger, *, has_gradients: bool = False) -> None:
        self.ledger = ledger
        self.grad_enabled, self.has_gradients = True, has_gradients
        self.phase, self.num_nodes = "", 0
        self.attributes: list[Storage] = []
        self.tied: Tensor | None = None
        self._waiting: Tensor | None = None
        self._segment: _Segment | None = None
        self._again: _Segment | None = None

    @property
    def replaying(self) -> bool:
        """Whether a checkpointed stretch is running again."""
        return self._again is not None

    def new(self, numel: int, itemsize: int) -> Tensor:
        """Allocates a tensor outside of the graph."""
        return Tensor(Storage(self.ledger, numel * itemsize), numel, itemsize)

    def leaf(self, numel: int, itemsize: int, needs_grad: bool) -> Tensor:
        """Makes a weight. Its bytes are not counted: all weights together are, by the caller."""
        tensor = Tensor(Storage(self.ledger, 0), numel, itemsize)
        tensor.needs_grad = needs_grad
        if needs_grad and self.has_gradients:
            part, self.ledger.part = self.ledger.part, "gradients"
            tensor.grad = self.new(numel, itemsize)
            self.ledger.part = part
        return tensor

    def apply(
        self,
        inputs: Sequence[Tensor],
        outputs: Sequence[tuple[int, int]],
        backward: Backward,
        save: Sequence[Tensor] = (),
        *,
        save_output: bool = False,
        view_of: Tensor | None = None,
    ) -> list[Tensor]:
        """Runs one operation.

        Args:
            inputs: What gradients may flow to.
            outputs: Elements and bytes per element of every result.
            backward: Gradients of the results to the gradients of ``inputs``, which are then summed over what was
                broadcast and cast to the inputs' formats.
            save: What the backward pass needs, if there is one.
            save_output: It needs the results too.
            view_of: The results are views of this tensor.
        """
        recorded = self.grad_enabled and any([one.needs_grad for one in inputs])
        handles = [self._pack(one) for one in save] if recorded and save else []
        if view_of is None:
            results = [Tensor(Storage(self.ledger, n * size), n, size) for n, size in outputs]
        else:
            results = [Tensor(view_of.storage, n, size) for n, size in outputs]
        if not recorded:
            return results
        if save_output:
            handles += [self._pack(one) for one in results]
        node = _Node(self, inputs, len(results), handles, backward)
        for index, one in enumerate(results):
            one.needs_grad, one.node = True, (node, index)
        return results

    def keep(self, result: Tensor, tensor: Tensor) -> None:
        """Keeps a tensor as a plain attribute of an operation's node.

        Neither checkpointing nor the backward pass frees it, only the end of the graph: that of the whole step, or
        that of a second run.
        """
        if result.node is not None:
            (result.node[0].handles if self.replaying else self.attributes).append(tensor.storage)

    def backward(self, loss: Tensor) -> None:
        """Runs the graph of a loss backwards; gradients gather in ``grad`` of the leaves."""
        first, index = loss.node
        buffers: dict[_Node, list[Tensor | None]] = {first: [None] * first.num_results}
        buffers[first][index] = self.new(loss.numel, loss.itemsize)
        heap = [(-first.number, first)]  # the latest operation first
        while heap:
            _, node = heapq.heappop(heap)
            self.ledger.enter(f"backward {node.phase}")
            self.ledger.part = "loss" if node.phase == "loss" else "workspace"
            gradients = self._run(node, buffers.pop(node))
            for place, edge in enumerate(node.edges):
                gradient, gradients[place] = gradients[place], None
                if edge is None or gradient is None:
                    continue
                target, slot = edge[0]
                if isinstance(target, Tensor):
                    self._accumulate_leaf(target, gradient)
                    gradient = None
                    continue
                buffer = buffers.get(target)
                if buffer is None:
                    buffer = buffers[target] = [None] * target.num_results
                    heapq.heappush(heap, (-target.number, target))
                buffer[slot] = gradient if buffer[slot] is None else self._add(buffer[slot], gradient)
                gradient = buffer = None  # what a name still holds is counted
            # What waits in the edges would keep the rest of the graph alive.
            node.edges = []

    def checkpoint(self, function: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
        """Runs a function of one tensor, keeps its input only, and runs it again in the backward pass."""
        if not self.grad_enabled:
            return function(value)
        segment = self._segment = _Segment(function, value)
        try:
            return function(value)
        finally:
            self._segment = None
            del segment

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        """Records nothing meanwhile."""
        before, self.grad_enabled = self.grad_enabled, False
        try:
            yield
        finally:
            self.grad_enabled = before

    def _run(self, node: _Node, gradients: list[Tensor | None]) -> list[Tensor | None]:
        saved = [self._unpack(handle) for handle in node.handles]
        results = list(node.backward(gradients))
        # What checkpointing made again is free before gradients get their shapes, what was kept is not.
        del saved
        for place, edge in enumerate(node.edges):
            one = results[place]
            if edge is None or one is None:
                continue
            _, numel, itemsize = edge
            if one.numel != numel:
                one = results[place] = self.new(numel, one.itemsize)
            if one.itemsize != itemsize:
                results[place] = self.new(numel, itemsize)
        node.handles, node.backward = [], None
        return results

    def _accumulate_leaf(self, leaf: Tensor, gradient: Tensor) -> None:
        """Takes the first gradient over, adds later ones in place."""
        if leaf is self.tied:
            # Used at both ends of the model: the first gradient waits for the second.
            if self._waiting is None:
                self._waiting = gradient
                return
            gradient, self._waiting = self._add(self._waiting, gradient), None
        if leaf.storage.size_bytes and (leaf.grad is not None or gradient.is_shared):
            # Embeddings, not a weight: what comes first waits for the rest, as in a node's buffer.
            leaf.grad = gradient if leaf.grad is None else self._add(leaf.grad, gradient)
            return
        if leaf.grad is not None:
            return
        before, self.ledger.part = self.ledger.part, "gradients"
        size = gradient.storage.size_bytes
        if not gradient.is_shared:
            self.ledger.add(gradient.storage._part, -size)  # the same bytes under the gradients' name
            self.ledger.add("gradients", size)
            gradient.storage._part = "gradients"
            leaf.grad = gradient
        else:
            leaf.grad = self.new(gradient.numel, gradient.itemsize)
        self.ledger.part = before

    def _add(self, old: Tensor, new: Tensor) -> Tensor:
        """Adds in place where nobody else looks at the bytes."""
        return self.new(old.numel, max(old.itemsize, new.itemsize)) if old.is_shared else old

    def _pack(self, tensor: Tensor) -> Storage | _Handle:
        again = self._again
        if again is not None:
            index, again.position = again.position, again.position + 1
            if again.handles[index]() is not None:
                again.found[index] = tensor.storage
            if again.position == len(again.handles):
                raise _EnoughError
        elif self._segment is not None:
            return _Handle(self._segment)
        # The graph of a second run holds its tensors as any other does, for as long as it lasts.
        return tensor.storage

    def _unpack(self, handle: Storage | _Handle) -> Storage:
        if isinstance(handle, Storage):
            return handle
        segment = handle.segment
        if segment.found is None:
            self._run_again(segment)
        return segment.found.pop(handle.index)

    def _run_again(self, segment: _Segment) -> None:
        segment.found = {}
        value = segment.value.alias()
        value.needs_grad = segment.value.needs_grad
        label, part = self.phase, self.ledger.part
        self._again, self.ledger.part = segment, "activations"
        try:
            with suppress(_EnoughError):
                segment.function(value)
        finally:
            self._again = None
            self.phase, self.ledger.part = label, part
