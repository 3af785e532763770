"""TRL's loss without a GPU and without numbers: the path of CUDA devices, whose kernels compute in place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

from trl.kernels import chunked_logprob
from trl.trainer import utils


class _NoKernel:
    """Stands for a Triton kernel: takes its grid and its arguments, and does nothing."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@contextlib.contextmanager
def cuda_loss() -> Iterator[None]:
    """Lets TRL's fused head take its CUDA path on fake tensors: same tensors, no kernels.

    Only positions that are trained are scored, tiles are folded in place, and products are added up in float32
    without a copy.
    """
    with contextlib.ExitStack() as patches:
        for owner, name, stand_in in (
            (utils, "_use_triton", lambda device: True),
            (chunked_logprob, "_use_triton", lambda device: True),
            (chunked_logprob, "_forward_kernel", _NoKernel()),
            (chunked_logprob, "_backward_kernel", _NoKernel()),
            (chunked_logprob, "_addmm_fp32", lambda total, a, b: None),
        ):
            patches.enter_context(mock.patch.object(owner, name, stand_in))
        triton = SimpleNamespace(cdiv=lambda a, b: -(-a // b))
        patches.enter_context(mock.patch.object(chunked_logprob, "triton", triton, create=True))
        yield
