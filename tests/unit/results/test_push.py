"""Which files of a run may leave this machine, and what is taken out of them."""

from __future__ import annotations

import json

import pytest

from forge_cli.errors import ConfigError, MachineError, ModelError
from forge_cli.resolve.plan import dump_plan, resolve_mapping
from forge_cli.results.find import Run
from forge_cli.results.push import collect_uploads, push_run


@pytest.fixture
def run(tmp_path) -> Run:
    path = tmp_path / "my-run"
    adapter = path / "adapter"
    adapter.mkdir(parents=True)
    plan = {
        "model": {"name": "forge-tiny"},
        "data": {"train": "forge:quickstart/train", "max_length": 128},
        "lora": {"r": 4},
    }
    (path / "plan.yaml").write_text(dump_plan(resolve_mapping(plan)))
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path), "r": 4}))
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "README.md").write_text(f"by peft, in {tmp_path}")
    for name in ("optimizer.pt", "training_args.bin", "forge.log", "plan.yaml", ".env", "merge.json"):
        (adapter / name).write_text("x")
    (adapter / "special_tokens_map.json").symlink_to(path / "plan.yaml")
    return Run(path)


def test_only_listed_plain_files_are_uploaded(run, tmp_path):
    uploads, left_out = collect_uploads(run)
    assert list(uploads) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
    assert {"optimizer.pt", "training_args.bin", "forge.log", "plan.yaml", ".env"} <= set(left_out)
    assert "special_tokens_map.json" in left_out  # a link to elsewhere
    texts = {name: one.decode() for name, one in uploads.items() if isinstance(one, bytes)}
    assert json.loads(texts["adapter_config.json"]) == {"base_model_name_or_path": "forge-tiny", "r": 4}
    assert not [name for name, text in texts.items() if str(tmp_path) in text]
    sizes = push_run(run, "me/model", dry_run=True)["files"]
    assert sizes["adapter_model.safetensors"] == 7 and sizes["adapter_config.json"] == len(texts["adapter_config.json"])


def test_a_token_in_a_file_stops_the_upload(run):
    (run.path / "adapter" / "tokenizer.json").write_text('{"a": "hf_abcdefghijklmnopqrstuv"}')
    with pytest.raises(ModelError, match="access token"):
        push_run(run, "me/model", dry_run=True)


def test_what_is_missing_is_said_before_anything_is_sent(run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(ConfigError, match="no name of a repository"):
        push_run(run, "model")
    with pytest.raises(ConfigError, match="no merged model"):
        push_run(run, "me/model", merged=True)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(MachineError, match="not logged in"):
        push_run(run, "me/model")
