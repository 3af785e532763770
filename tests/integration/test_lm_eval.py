"""`forge eval --tasks` hands the run's own weights over: its figure is what the model computes without lm-eval."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
from typer.testing import CliRunner

from forge_cli.cli.app import app
from forge_cli.run.execute import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason='pip install "forge-finetune[eval]"'),
]
RUN_FILE = """\
model: {name: forge-tiny}
data: {train: "forge:quickstart/train", max_length: 128}
lora: {r: 4, lora_alpha: 64}
training: {max_steps: 3, learning_rate: 5.0e-3, warmup_steps: 0}
checkpoint: null
report: null
"""
TASK = """\
task: otter
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
target_delimiter: ""
metric_list: [{metric: perplexity}]
"""
QUESTION, ANSWER = "Where does the otter live?", " It lives in the old quarry."


def test_tasks_measure_the_runs_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN_FILE)
    Path("otter.yaml").write_text(TASK)
    Path("rows.jsonl").write_text(json.dumps({"q": QUESTION, "a": ANSWER}) + "\n")
    folder = train("run.yaml").folder
    done = CliRunner().invoke(app, ["eval", str(folder), "--base", "--json", "--tasks", "otter.yaml"])
    assert done.exit_code == 0, done.output
    results = json.loads(done.stdout)["results"]
    found = {one["weights"]: one["tasks"]["otter"]["perplexity,none"] for one in results}

    model = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    ids, asked = tokenizer(QUESTION + ANSWER)["input_ids"], len(tokenizer(QUESTION)["input_ids"])

    def perplexity() -> float:
        with torch.inference_mode():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return math.exp(-sum(scores[i - 1, ids[i]].item() for i in range(asked, len(ids))))

    assert found["trained"] == pytest.approx(perplexity(), rel=1e-3)
    with model.disable_adapter():
        assert found["base"] == pytest.approx(perplexity(), rel=1e-3)
    assert found["trained"] != pytest.approx(found["base"], rel=0.01)
