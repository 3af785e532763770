"""What torch's operations allocate and what autograd keeps of them, forwards and backwards.

Only sizes: a function takes and returns :class:`~forge_cli.estimate.tape.Tensor`. Source: torch 2.13,
``derivatives.yaml`` and ``autocast_mode.h``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from forge_cli.estimate.tape import Tape, Tensor

FP32 = 4


class Formats(NamedTuple):
    """Number formats, in bytes per number.

    Attributes:
        compute_bytes: Of the multiplications.
        autocast: Whether torch casts the inputs of multiplications to it (mixed precision).
        cuda: Whether kernels and autocast lists are CUDA's.
    """

    compute_bytes: int
    autocast: bool
    cuda: bool


class Operations:
    """Operations on one tape.

    Attributes:
        tape: Where they are recorded.
        formats: Number formats.
    """

    def __init__(self, tape: Tape, formats: Formats) -> None:
        self.tape, self.formats = tape, formats
        self.new = tape.new
        self._casts: dict[int, Tensor] = {}

    def drop_casts(self) -> None:
        """Forgets the weights' casts, as the end of autocast does."""
        self._casts.clear()

    # One input, elementwise -------------------------------------------------------------------------------------

    def cast(self, x: Tensor, itemsize: int) -> Tensor:
        """``x.to(dtype)``: nothing if it has that format."""
        if x.itemsize == itemsize:
            return x
        size = x.itemsize
        (y,) = self.tape.apply((x,), [(x.numel, itemsize)], lambda g: [self.new(g[0].numel, size)])
        return y

    def cast_weight(self, weight: Tensor, itemsize: int) -> Tensor:
        """The copy that autocast makes of a weight once per forward pass, if the weight is trained."""
        if weight.itemsize == itemsize:
            return weight
        if not (weight.needs_grad and self.tape.grad_enabled):
            return self.cast(weight, itemsize)
        if id(weight) not in self._casts:
            part, self.tape.ledger.part = self.tape.ledger.part, "autocast copies"
            self._casts[id(weight)] = self.cast(weight, itemsize)
            self.tape.ledger.part = part
        return self._casts[id(weight)]

    def to_compute(self, x: Tensor) -> Tensor:
        """An input of a multiplication as autocast casts it."""
        return self.cast(x, self.formats.compute_bytes) if self.formats.autocast else x

    def to_full(self, x: Tensor) -> Tensor:
        """An input of what CUDA's autocast computes in fp32; the CPU's list has none of what models use."""
        return self.cast(x, FP32) if self.formats.autocast and self.formats.cuda else x

    def scale(self, x: Tensor) -> Tensor:
        """``x * number``."""
        (y,) = self.tape.apply((x,), [(x.numel, x.itemsize)], lambda g: [self._like(g[0])])
        return y

    def unary(self, x: Tensor, *, saves_output: bool = False) -> Tensor:
        """silu, gelu (keep the input), tanh, sigmoid, rsqrt, softmax (keep the output)."""

        def backward(g):
            return [self._like(g[0])]

        save = () if saves_output else (x,)
        (y,) = self.tape.apply((x,), [(x.numel, x.itemsize)], backward, save, save_output=saves_output)
        return y

    def power(self, x: Tensor) -> Tensor:
        """``x.pow(n)``: ``grad * (n * x.pow(n - 1))`` backwards."""

        def backward(g):
            temporaries = [self._like(g[0]), self._like(g[0])]  # C++ keeps both to the end of the expression
            found = [self._like(g[0])]
            del temporaries
            return found

        x = self.to_full(x)
        (y,) = self.tape.apply((x,), [(x.numel, x.itemsize)], backward, (x,))
        return y

    def dropout(self, x: Tensor, p: float) -> Tensor:
        """Keeps a mask: of one byte per element on CUDA, in the input's format on the CPU."""
        if not p:
            return x
        mask = self.new(x.numel, 1 if self.formats.cuda else x.itemsize)
        (y,) = self.tape.apply((x,), [(x.numel, x.itemsize)], lambda g: [self._like(g[0])], (mask,))
        return y

    def drop_tenth(self, x: Tensor) -> Tensor:
        """What GPT-2's published models drop in training: of the embeddings, and of the output of each half of a layer.

        On the CPU dropout moves attention off the fused kernel, which is not written down here.
        """
        return self.dropout(x, 0.1) if self.formats.cuda and self.tape.grad_enabled else x

    def mean_last(self, x: Tensor, width: int) -> Tensor:
        """``x.mean(-1, keepdim=True)``."""
        numel = x.numel
        (y,) = self.tape.apply((x,), [(numel // width, x.itemsize)], lambda g: [self.new(numel, g[0].itemsize)])
        return y

    # Two inputs ----------------------------------------------------------------------------------------------

    def add(self, a: Tensor, b: Tensor | None) -> Tensor:
        """``a + b``, the smaller one broadcast over the larger; ``None`` stands for a number."""
        inputs = (a,) if b is None else (a, b)
        numel, size = max(one.numel for one in inputs), max(one.itemsize for one in inputs)
        (y,) = self.tape.apply(inputs, [(numel, size)], self._pass_on(inputs))
        return y

    def add_in_place(self, a: Tensor, b: Tensor) -> Tensor:
        """``a += b``."""
        (y,) = self.tape.apply((a, b), [(a.numel, a.itemsize)], self._pass_on((a, b)), view_of=a)
        return y

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """``a * b``, the smaller one broadcast over the larger."""
        numel, size = max(a.numel, b.numel), max(a.itemsize, b.itemsize)
        needs = [one.needs_grad for one in (a, b)]

        def backward(g):
            return [self.new(numel, size) if needed else None for needed in needs]

        save = [*([a] if b.needs_grad else []), *([b] if a.needs_grad else [])]
        (y,) = self.tape.apply((a, b), [(numel, size)], backward, save)
        return y

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, inputs: int, outputs: int, *, view: bool = False
    ) -> Tensor:
        """``F.linear``, the input and the weight cast first under autocast.

        Args:
            x: Input.
            weight: Weight.
            bias: Bias.
            inputs: Width of the input.
            outputs: Width of the output.
            view: The weight is passed as a view, whose cast autocast does not remember.
        """
        if self.formats.autocast:
            to, cast = self.formats.compute_bytes, self.cast if view else self.cast_weight
            x, weight, bias = self.cast(x, to), cast(weight, to), cast(bias, to) if bias else None
        tokens, size = x.numel // inputs, x.itemsize
        needs = (x.needs_grad, weight.needs_grad, bias is not None and bias.needs_grad)
        bias_given = bias is not None

        def backward(g):
            of_x = self.new(tokens * inputs, size) if needs[0] else None
            of_weight = self.new(inputs * outputs, size) if needs[1] else None
            return [of_x, of_weight, self.new(outputs, size) if needs[2] else None][: 3 if bias_given else 2]

        # torch keeps the weight for the gradient of x, and x for the gradient of the weight.
        save = [*([x] if needs[1] else []), *([weight] if needs[0] else [])]
        operands = (x, weight, bias) if bias_given else (x, weight)
        (y,) = self.tape.apply(operands, [(tokens * outputs, size)], backward, save)
        return y

    def matmul(self, a: Tensor, b: Tensor, numel: int) -> Tensor:
        """A product of two batches of matrices, laid out and cast for it."""
        shapes = [(one.numel, one.itemsize) if one.needs_grad else None for one in (a, b)]
        save = [*([a] if b.needs_grad else []), *([b] if a.needs_grad else [])]

        def backward(g):
            return [None if shape is None else self.new(*shape) for shape in shapes]

        (y,) = self.tape.apply((a, b), [(numel, a.itemsize)], backward, save)
        return y

    # Views and copies -------------------------------------------------------------------------------------------

    def split(self, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Views of a tensor; their gradients are joined into one."""
        whole, size = sum(sizes), x.itemsize
        return self.tape.apply((x,), [(n, size) for n in sizes], lambda g: [self.new(whole, size)], view_of=x)

    def slice(self, x: Tensor, numel: int) -> Tensor:
        """A view of a part; its gradient is written into zeros of the whole."""
        whole, size = x.numel, x.itemsize
        (y,) = self.tape.apply((x,), [(numel, size)], lambda g: [self.new(whole, size)], view_of=x)
        return y

    def gather(self, x: Tensor, numel: int) -> Tensor:
        """``x[indices]`` or a repeated copy; its gradient is summed into one of the input's size."""
        whole, size = x.numel, x.itemsize
        (y,) = self.tape.apply((x,), [(numel, size)], lambda g: [self.new(whole, size)])
        return y

    def expand(self, x: Tensor, numel: int) -> Tensor:
        """A view that repeats; its gradient is summed."""
        whole, size = x.numel, x.itemsize
        (y,) = self.tape.apply((x,), [(numel, size)], lambda g: [self.new(whole, size)], view_of=x)
        return y

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """``torch.cat``; gradients are views."""
        sizes = [(one.numel, one.itemsize, one.needs_grad) for one in tensors]
        size = max(one.itemsize for one in tensors)

        def part(g: Tensor, numel: int, itemsize: int) -> Tensor:
            return Tensor(g.storage, numel, size) if itemsize == size else self.new(numel, itemsize)

        def backward(g):
            return [part(g[0], n, one) if needed else None for n, one, needed in sizes]

        (y,) = self.tape.apply(tensors, [(sum(one.numel for one in tensors), size)], backward)
        return y

    def copy(self, x: Tensor) -> Tensor:
        """``x.contiguous()`` or ``x.clone()`` of something that has to be copied; its gradient is passed on."""
        (y,) = self.tape.apply((x,), [(x.numel, x.itemsize)], lambda g: [g[0].alias()])
        return y

    def _like(self, x: Tensor) -> Tensor:
        return self.new(x.numel, x.itemsize)

    def _pass_on(self, inputs: Sequence[Tensor]):
        """Returns the backward pass of a sum: every input gets the gradient itself."""
        needs = [one.needs_grad for one in inputs]
        return lambda g: [g[0].alias() if needed else None for needed in needs]
