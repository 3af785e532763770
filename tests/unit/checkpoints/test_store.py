"""Checkpoints on disk: whole or absent, every damage found, the right ones kept. Torch-free, so quick."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from forge_cli.checkpoints.files import MANIFEST_FILE, TensorBytes
from forge_cli.checkpoints.store import Broken, Checkpoint, CheckpointStore, verify

RUN = "a" * 32


def content(step: int) -> dict:
    numbers = bytes([step % 256]) * 16
    tensor = TensorBytes("w", "F32", (2, 2), 16, lambda: memoryview(numbers))
    return {"weights.safetensors": [tensor], "state.json": json.dumps({"step": step}).encode()}


def write(store: CheckpointStore, *steps: int, losses: dict[int, float] | None = None) -> None:
    for step in steps:
        store.write(step, content(step), eval_loss=(losses or {}).get(step))


def steps_of(store: CheckpointStore) -> list[int]:
    return [one.step for one in store.list_sound()]


def test_what_is_written_is_read_by_the_library_and_hashed_as_sha256sum_does(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", RUN)
    write(store, 7)
    folder = tmp_path / "checkpoints" / "step-00000007"
    assert load_file(folder / "weights.safetensors")["w"].tobytes() == b"\x07" * 16
    entries = json.loads((folder / MANIFEST_FILE).read_text())["files"]
    for name, entry in entries.items():
        data = (folder / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "of another step": lambda path: path.write_bytes((path.parents[1] / "step-00000001" / path.name).read_bytes()),
    "a link": lambda path: (path.rename(path.parents[2] / path.name), path.symlink_to(path.parents[2] / path.name)),
}


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", MANIFEST_FILE])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_named_and_stepped_over(tmp_path, name, damage):
    store = CheckpointStore(tmp_path / "checkpoints", RUN)
    write(store, 1, 2)
    DAMAGES[damage](store.root / "step-00000002" / name)
    found = verify(store.root / "step-00000002", RUN)
    assert isinstance(found, Broken) and name in found.reason
    newest, broken = store.find_newest()
    assert newest.step == 1 and [one.step for one in broken] == [2]
    store.set_aside(broken)
    write(store, 2)
    assert store.find_newest()[0].step == 2 and (store.root / ".bad-00000002").is_dir()


def test_a_folder_renamed_to_another_step_is_not_taken(tmp_path):
    store = CheckpointStore(tmp_path, RUN)
    write(store, 1)
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000009")
    assert isinstance(verify(tmp_path / "step-00000009", RUN), Broken)


def test_the_order_comes_from_steps_and_not_from_times(tmp_path):
    store = CheckpointStore(tmp_path, RUN, limit=3)
    write(store, 9, 10, 11)
    for path in store.list_paths():
        os.utime(path, (0, 0))
    assert store.find_newest()[0].step == 11 and steps_of(store) == [11, 10, 9]


def test_rotation_spares_the_newest_the_best_and_the_last_that_was_measured(tmp_path):
    store = CheckpointStore(tmp_path, RUN, limit=1)
    write(store, 1, 2, 3, 4, 5, losses={1: 0.9, 2: 0.5, 3: 0.7, 4: float("nan")})
    assert steps_of(store) == [5, 3, 2]


def test_checkpoints_of_another_run_are_neither_used_nor_deleted(tmp_path):
    write(CheckpointStore(tmp_path, "b" * 32), 50)
    store = CheckpointStore(tmp_path, RUN, limit=1)
    write(store, 1, 2)
    assert store.find_newest()[0].step == 2
    assert (tmp_path / "step-00000050").is_dir() and not (tmp_path / "step-00000001").exists()


def test_leftovers_of_saves_go_and_nothing_else(tmp_path):
    for name in (".tmp-00000003-77", ".trash-00000001-77", ".bad-00000002", ".tmp-mine", "notes"):
        (tmp_path / name).mkdir()
    assert sorted(CheckpointStore(tmp_path, RUN).clear_leftovers()) == [".tmp-00000003-77", ".trash-00000001-77"]
    assert {path.name for path in tmp_path.iterdir()} == {".bad-00000002", ".tmp-mine", "notes"}


def test_a_failed_write_leaves_nothing_and_the_one_before(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, RUN)
    write(store, 1)

    def fail() -> memoryview:
        raise OSError(28, "No space left on device")

    bad = {"weights.safetensors": [TensorBytes("w", "F32", (4,), 16, fail)]}
    with pytest.raises(OSError, match="No space"):
        store.write(2, bad)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["step-00000001"]
    assert isinstance(verify(tmp_path / "step-00000001", RUN), Checkpoint)


def test_everything_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """Power loss: a file, and the folder's list of names, are forced out before the rename, the parent after it."""
    seen = []
    real_sync, real_rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(os.readlink(f"/proc/self/fd/{fd}")), real_sync(fd))[1])
    monkeypatch.setattr(Path, "rename", lambda a, b: (seen.append(f"rename {Path(b).name}"), real_rename(a, b))[1])
    CheckpointStore(tmp_path, RUN).write(4, content(4))
    names = [one if one.startswith("rename") else Path(one).name for one in seen]
    stage = f".tmp-00000004-{os.getpid()}"
    assert names == ["weights.safetensors", "state.json", MANIFEST_FILE, stage, "rename step-00000004", tmp_path.name]
