"""The hub is asked once and quickly; what is missing without it is said with what to type."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from forge_cli.build.tokenizer import load_tokenizer
from forge_cli.data.hub import hub_answers, hub_or_copies, leave_hub
from forge_cli.data.read_hub import read_hub
from forge_cli.errors import MachineError, ModelError
from forge_cli.schema.runspec import RunSpec

TINY = Path(__file__).parents[3] / "forge_cli" / "assets" / "forge-tiny"
CLOSED = "http://127.0.0.1:1"  # nothing listens there


@pytest.fixture
def online(monkeypatch, tmp_path):
    """The tests' own HF_HUB_OFFLINE is off; the hub is what the test sets, and the cache is empty."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return lambda endpoint: monkeypatch.setattr(constants, "ENDPOINT", endpoint)


def spec_of(model: str, train: object = "forge:quickstart/train") -> RunSpec:
    return RunSpec(model={"name": model}, data={"train": train}, lora={})


class Refusing(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_error(404)

    def log_message(self, *_):
        pass


def test_any_answer_counts_and_silence_does_not(online):
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        online(f"http://127.0.0.1:{server.server_port}")
        assert hub_answers(), "a hub that refuses is there"
        server.shutdown()
    online(CLOSED)
    assert not hub_answers()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        online(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert not hub_answers(0.3)


@pytest.mark.parametrize(
    ("model", "train", "asks"),
    [
        ("forge-tiny", "forge:quickstart/train", False),
        ("forge-tiny", ["rows/*.jsonl", "no-such-file.csv"], False),
        ("forge-tiny", "hf://org/name", True),
        ("forge-tiny", ["forge:quickstart/train", "org/name"], True),
        ("org/name", "forge:quickstart/train", True),
        ("mistral-7b", "forge:quickstart/train", True),
    ],
)
def test_only_a_run_that_needs_the_hub_asks_it_and_each_run_anew(online, model, train, asks):
    online(CLOSED)
    spec = spec_of(model, train)
    said: list[str] = []
    with hub_or_copies(spec, said.append):
        assert constants.HF_HUB_OFFLINE is True, "nothing is there to be asked, or nothing is needed"
    assert said == ([f"{CLOSED} cannot be reached; only what lies on this machine is used"] if asks else [])
    assert constants.HF_HUB_OFFLINE is False


def test_trackers_and_streamed_rows_keep_their_network(online):
    online(CLOSED)
    spec = spec_of("forge-tiny")
    tracked = spec.model_copy(update={"logging": spec.logging.model_copy(update={"report_to": ["trackio"]})})
    streamed = spec_of("forge-tiny", "org/name")
    streamed = streamed.model_copy(update={"data": streamed.data.model_copy(update={"streaming": True})})
    for one, is_offline in ((tracked, False), (streamed, False), (spec_of("org/name"), True), (spec, True)):
        leave_hub(one)
        assert constants.HF_HUB_OFFLINE is is_offline


def keep_copy(folder: Path, *names: str) -> None:
    """Lays files of the embedded model where the hub's client keeps those of org/name."""
    commit = folder / "models--org--name" / "snapshots" / "abc"
    commit.mkdir(parents=True)
    (commit.parents[1] / "refs").mkdir()
    (commit.parents[1] / "refs" / "main").write_text("abc")
    for name in names:
        shutil.copy(TINY / name, commit / name)


def test_copies_are_used_and_what_is_missing_is_the_machines_fault(online, tmp_path):
    online(CLOSED)
    spec = spec_of("org/name")
    with hub_or_copies(spec, lambda text: None):
        with pytest.raises(MachineError) as none:
            load_tokenizer(spec)
        keep_copy(tmp_path / "cache", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        assert len(load_tokenizer(spec)) > 100

        from forge_cli.build.compute import choose_compute
        from forge_cli.build.model import load_model

        with pytest.raises(MachineError) as weights:
            load_model(spec, choose_compute(spec))
        with pytest.raises(MachineError) as rows:
            next(read_hub("hf://org/name", "train"))
    where, there = f"and {CLOSED} cannot be reached; check the network", "where there is a network, and"
    fix = f"or run `hf download org/name --local-dir FOLDER` {there} write model.name: FOLDER"
    for error, what in ((none, "the tokenizer of org/name"), (weights, "the model org/name")):
        text = str(error.value)
        assert text.startswith(f"model.name: {what} is not on this machine, {where}") and text.endswith(fix)
    assert f"`hf download org/name --repo-type dataset --local-dir FOLDER` {there} name its files" in str(rows.value)


def test_code_beside_a_model_of_the_hub_is_refused(online, tmp_path):
    online(CLOSED)
    keep_copy(tmp_path / "cache", "config.json", "tokenizer.json", "tokenizer_config.json")
    (config,) = tmp_path.rglob("config.json")
    config.write_text(config.read_text().replace("{", '{"_attn_implementation_internal": "org/kernel",', 1))
    spec = spec_of("org/name")
    with hub_or_copies(spec, lambda text: None), pytest.raises(ModelError, match="its own Python code"):
        load_tokenizer(spec)


def test_a_switch_that_keeps_the_hub_away_is_named(online, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MachineError, match="and HF_HUB_OFFLINE is set; unset HF_HUB_OFFLINE; or run"):
        load_tokenizer(spec_of("org/name"))


def test_a_broken_folder_is_the_models_fault(tmp_path):
    shutil.copy(TINY / "config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=f"check that {tmp_path} holds a whole model"):
        load_tokenizer(spec_of(str(tmp_path)))


@pytest.mark.parametrize(("model", "train"), [("org/name", "forge:quickstart/train"), ("forge-tiny", "org/name")])
def test_the_command_line_says_it_once(tmp_path, model, train):
    settings = {"model": {"name": model}, "data": {"train": train, "max_length": 128}, "lora": {}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    done = subprocess.run(
        [sys.executable, "-m", "forge_cli", "data", "check", "run.yaml"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        env={**env, "HF_ENDPOINT": CLOSED, "HF_HOME": str(tmp_path / "home")},
    )
    first, error, fix = done.stderr.splitlines()  # and no word of a retry
    assert first == f"{CLOSED} cannot be reached; only what lies on this machine is used"
    assert done.returncode == 5 and error.startswith("error: ") and "org/name" in error
    assert fix.startswith("  fix: check the network")
