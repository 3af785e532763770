"""The mean of checkpoints: formats, integers, and what does not fit together."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from forge_cli.errors import CheckpointError
from forge_cli.results.average import average_tensors


def save(folder, **tensors):
    folder.mkdir()
    save_file(tensors, folder / "weights.safetensors")
    return SimpleNamespace(path=folder)


def test_the_mean_keeps_formats_and_leaves_integers(tmp_path):
    one = save(tmp_path / "b", w=torch.tensor([1.0, 4.0]).bfloat16(), big=torch.tensor([3e38]), n=torch.tensor([7]))
    two = save(tmp_path / "a", w=torch.tensor([3.0, 5.0]).bfloat16(), big=torch.tensor([3e38]), n=torch.tensor([5]))
    mean = average_tensors([one, two])
    assert mean["w"].dtype == torch.bfloat16 and mean["w"].tolist() == [2.0, 4.5]
    assert mean["big"].item() == pytest.approx(3e38)  # the sum does not fit into float32
    assert mean["n"].tolist() == [7]


def test_checkpoints_of_other_shapes_are_refused(tmp_path):
    one = save(tmp_path / "b", w=torch.ones(2))
    for number, other in enumerate(({"w": torch.ones(3)}, {"v": torch.ones(2)})):
        with pytest.raises(CheckpointError, match="holds other tensors"):
            average_tensors([one, save(tmp_path / f"a{number}", **other)])
