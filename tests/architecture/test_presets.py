"""Presets: every value is allowed, reasoned and sourced, and none names a model or data."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from forge_cli.cli.preset_text import parse_preset
from forge_cli.paths import data_root
from forge_cli.schema.runspec import RunSpec

PRESETS = sorted((data_root() / "configs" / "presets").glob("*.yaml"))


def leaves(mapping, prefix=""):
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_the_shelf_is_there():
    assert {"sft", "lora", "qlora", "memory_efficient"} <= {path.stem for path in PRESETS}


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
class TestPreset:
    def test_schema_takes_it(self, path: Path):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert not {"model", "data", "name", "output_dir", "preset", "extends"} & set(values)
        RunSpec.model_validate({"model": {"name": "gpt2"}, "data": {"train": "rows.jsonl"}, **values})

    def test_every_value_has_a_reason_and_a_source(self, path: Path):
        text = path.read_text(encoding="utf-8")
        preset = parse_preset(text)
        assert [(v["path"], v["value"]) for v in preset["values"]] == list(leaves(yaml.safe_load(text)))
        for value in preset["values"]:
            assert value["reason"] and value["source"], value["path"]

    def test_first_line_is_the_summary(self, path: Path):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# ") and 10 < len(first) < 80


def test_presets_update_with_the_same_number_of_rows():
    # So that a result can be compared with the next preset's.
    rows = set()
    for path in PRESETS:
        training = yaml.safe_load(path.read_text(encoding="utf-8"))["training"]
        rows.add(training["per_device_train_batch_size"] * training["gradient_accumulation_steps"])
    assert rows == {16}
