"""Log probabilities on disk: taken only when they are whole and of the same weights and rows."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file

from forge_cli.build.reference_cache import (
    cache_folder,
    find_cached,
    fingerprint_rows,
    fingerprint_weights,
    store_cached,
)

NAMES = ("ref_chosen_logps", "ref_rejected_logps")
ROWS = {"prompt_ids": [[1], [2, 3]], "chosen_ids": [[4, 5], [6]], "rejected_ids": [[7], [8]], "row": [1, 2]}


@pytest.fixture
def columns(tmp_path, monkeypatch) -> dict[str, torch.Tensor]:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    return {name: torch.arange(3.0) + place for place, name in enumerate(NAMES)}


def test_what_was_kept_comes_back_exactly(columns, tmp_path):
    assert find_cached("key", NAMES, 3) is None
    assert store_cached("key", columns) == f"kept in {tmp_path / 'cache' / 'reference'}"
    found = find_cached("key", NAMES, 3)
    assert all(torch.equal(found[name], columns[name]) for name in NAMES)
    assert [path.name for path in cache_folder().iterdir()] == ["key.safetensors"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-9]),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("not one of ours"),
        lambda path: save_file({"something": torch.zeros(3)}, path),
        lambda path: save_file(load_file(path), path),
        lambda path: path.rename(path.with_name("other.safetensors")).rename(path.with_name("key2.safetensors")),
    ],
    ids=["cut", "flipped bit", "empty", "text", "foreign", "without checksum", "under another key"],
)
def test_a_damaged_file_is_none(columns, damage):
    store_cached("key", columns)
    damage(cache_folder() / "key.safetensors")
    assert find_cached("key", NAMES, 3) is None
    assert find_cached("key2", NAMES, 3) is None


def test_other_rows_columns_and_lost_values_do_not_count(columns):
    store_cached("key", columns)
    assert find_cached("key", NAMES, 4) is None
    assert find_cached("key", ("ref_logps",), 3) is None
    store_cached("key", {name: column / 0 for name, column in columns.items()})
    assert find_cached("key", NAMES, 3) is None


def test_a_folder_that_cannot_be_written_is_said(columns, tmp_path):
    (tmp_path / "cache").write_text("a file in the way")
    assert "could not be kept" in store_cached("key", columns)


def test_the_key_follows_tokens_and_weights():
    rows = Dataset.from_dict(ROWS)
    key = fingerprint_rows(rows, "weights")
    assert fingerprint_rows(Dataset.from_dict({**ROWS, "row": [5, 6]}), "weights") == key
    assert fingerprint_rows(rows.select([0, 1]), "weights") == key
    others = [
        fingerprint_rows(rows, "other weights"),
        fingerprint_rows(rows.select([1, 0]), "weights"),
        fingerprint_rows(Dataset.from_dict({**ROWS, "rejected_ids": [[7], [9]]}), "weights"),
        # The same tokens, cut elsewhere.
        fingerprint_rows(Dataset.from_dict({**ROWS, "prompt_ids": [[1, 2], [3]]}), "weights"),
    ]
    assert len({key, *others}) == 5

    model = torch.nn.ModuleDict({"base": torch.nn.Linear(2, 2), "default": torch.nn.Linear(2, 2)})
    whole, base = fingerprint_weights(model), fingerprint_weights(model, without="default")
    with torch.no_grad():
        model["default"].weight += 1
    assert fingerprint_weights(model) != whole
    assert fingerprint_weights(model, without="default") == base
    with torch.no_grad():
        model["base"].bias += 1e-6
    assert fingerprint_weights(model, without="default") != base
