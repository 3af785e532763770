"""A disk that takes no checkpoint: what was saved stays, needed and free bytes are said, and a run bears it twice."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest
import torch

from forge_cli.checkpoints.store import Checkpoint, CheckpointStore, verify
from forge_cli.errors import CheckpointError, MachineError
from forge_cli.parts.keeper import Keeper

RUN = "c" * 32
NUM_BYTES = 4 * 50_000


@pytest.fixture
def small_files() -> Iterator[None]:
    """Lets no file of this process grow beyond 100 kB: what a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save(keeper: Keeper, step: int) -> None:
    keeper.save(step, {"weights": {"w": torch.arange(50_000, dtype=torch.float32)}}, {})


def test_a_full_disk_is_borne_twice_and_ends_the_third_save(tmp_path, small_files):
    said: list[str] = []
    keeper = Keeper(CheckpointStore(tmp_path, RUN), {}, said.append)
    save(keeper, 1)
    small_files()
    for step in (2, 3, 4):
        save(keeper, step)
    with pytest.raises(CheckpointError, match="3 saves in a row") as error:
        keeper.finish()
    assert error.value.exit_code == 13 and "step-00000001" in str(error.value)
    assert len(said) == 2 and all("bytes), and" in line and "are free" in line for line in said)
    assert str(NUM_BYTES)[:3] in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert isinstance(verify(tmp_path / "step-00000001", RUN), Checkpoint)


def test_saves_missed_at_the_end_of_a_training_do_not_cost_its_weights(tmp_path, small_files):
    said: list[str] = []
    keeper = Keeper(CheckpointStore(tmp_path, RUN), {}, said.append)
    save(keeper, 1)
    small_files()
    for step in (2, 3, 4):
        save(keeper, step)
    keeper.finish(is_over=True)
    assert len(said) == 3 and not keeper.has_saved(4)


def test_a_save_that_works_again_forgives_the_missed_ones(tmp_path, small_files):
    keeper = Keeper(CheckpointStore(tmp_path, RUN), {})
    save(keeper, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    small_files()
    save(keeper, 2)
    keeper.finish()
    assert keeper.num_missed == 1 and not keeper.has_saved(2)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    save(keeper, 3)
    keeper.finish()
    assert keeper.num_missed == 0 and keeper.has_saved(3)


def test_a_disk_that_takes_not_even_the_first_save_ends_the_run(tmp_path, small_files):
    small_files()
    with pytest.raises(MachineError, match="are free") as error:
        save(Keeper(CheckpointStore(tmp_path, RUN), {}), 1)
    assert error.value.exit_code == 5 and list(tmp_path.iterdir()) == []


def test_a_tensor_that_is_not_finite_is_never_committed(tmp_path):
    keeper = Keeper(CheckpointStore(tmp_path, RUN), {})
    save(keeper, 1)
    keeper.save(2, {"weights": {"w": torch.tensor([1.0, float("nan")])}}, {})
    with pytest.raises(CheckpointError, match="not finite"):
        keeper.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
