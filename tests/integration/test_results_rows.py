"""A run's held-out rows are found from anywhere, and never silently replaced by rows that were trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forge_cli.build.tokenizer import load_tokenizer
from forge_cli.errors import DataError
from forge_cli.results.find import Run
from forge_cli.results.rows import prepare_rows
from forge_cli.run.execute import train

RUN_FILE = """\
model: {name: forge-tiny}
data: {train: rows.jsonl, max_length: 64, eval_rows: 3}
lora: {r: 2}
training: {max_steps: 1, per_device_train_batch_size: 1}
checkpoint: null
monitor: null
report: null
"""


def test_rows_of_a_run(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    Path("run.yaml").write_text(RUN_FILE)
    rows = [json.dumps({"prompt": f"number {n}", "completion": f"is {n}"}) for n in range(12)]
    Path("rows.jsonl").write_text("\n".join(rows))
    run = Run(train("run.yaml").folder.resolve())
    spec = run.plan.spec
    tokenizer = load_tokenizer(spec)
    held_back = list(prepare_rows(run, spec, tokenizer).eval["input_ids"])

    monkeypatch.chdir(tmp_path)
    assert list(prepare_rows(run, spec, tokenizer).eval["input_ids"]) == held_back
    assert Path.cwd() == tmp_path

    said: list[str] = []
    own = spec.model_copy(update={"data": spec.data.model_copy(update={"train": "home/rows.jsonl"})})
    prepare_rows(run, own, tokenizer, said.append, data=Path("home/rows.jsonl"))
    assert any("trained on rows of this file" in line for line in said)

    Path("home/rows.jsonl").write_text("\n".join(reversed(rows)))
    with pytest.raises(DataError, match=r"rows\.jsonl changed"):
        prepare_rows(run, spec, tokenizer)
