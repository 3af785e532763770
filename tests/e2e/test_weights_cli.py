"""`forge merge`, `export` and `push` as a person types them; the hub is a server of this test."""

from __future__ import annotations

import base64
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from forge_cli.resolve.plan import resolve_mapping
from forge_cli.run.execute import train_plan
from forge_cli.run.reporter import QuietReporter


def forge(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "forge_cli", *arguments]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, **variables}
    )


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("weights")
    settings = {
        "name": "lora",
        "model": {"name": "forge-tiny"},
        "data": {"train": "forge:quickstart/train", "max_length": 128},
        "lora": {"r": 4, "lora_alpha": 32},
        "training": {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
        "checkpoint": None,
        "report": None,
        "output_dir": str(root / "runs"),
    }
    train_plan(resolve_mapping(settings), reporter=QuietReporter())
    return root


def test_the_newest_run_is_merged_and_exported(workspace):
    done = forge("merge", cwd=workspace)
    assert done.returncode == 0, done.stderr
    assert "8 training rows" in done.stdout and "bound 1.0e-04" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    done = forge("export", "lora", "--gguf", "f16", "--json", cwd=workspace)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["equal"] + result["ties"] == result["compared"]
    assert (workspace / result["file"]).is_file()


class FakeHub(http.server.BaseHTTPRequestHandler):
    """Answers what `huggingface_hub` asks when a repository is made and a commit is sent."""

    def do_GET(self) -> None:
        self.answer({"id": "me/model", "private": self.server.private, "siblings": [], "tags": []})

    def do_POST(self) -> None:
        body = self.read_body()
        self.server.asked.append((self.path, body))
        if self.path.endswith("/repos/create"):
            self.answer({"url": f"{self.server.url}/me/model", "name": "me/model"})
        elif "/preupload/" in self.path:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        else:
            self.answer({"commitOid": "1" * 40, "commitUrl": f"{self.server.url}/me/model/commit/{'1' * 40}"})

    def read_body(self) -> bytes:
        if length := int(self.headers.get("Content-Length") or 0):
            return self.rfile.read(length)
        body = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *parts: object) -> None:
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.asked, server.private = [], True
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def push(workspace: Path, hub, *options: str) -> subprocess.CompletedProcess:
    variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_abcdefghijklmnopqrst", "HF_HUB_OFFLINE": "0"}
    home = {"HF_HOME": str(workspace / "hub-home")}
    return forge("push", "--repo", "me/model", *options, cwd=workspace, **variables, **home)


def test_a_push_sends_listed_files_to_a_private_repository(workspace, hub):
    done = push(workspace, hub)
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/me/model/commit/" in done.stdout
    created = next(json.loads(body) for path, body in hub.asked if path.endswith("/repos/create"))
    assert created.get("visibility") == "private" or created.get("private") is True
    lines = next(body for path, body in hub.asked if "/commit/" in path).splitlines()
    sent = {one["value"]["path"]: one["value"]["content"] for one in map(json.loads, lines) if one["key"] == "file"}
    adapter = workspace / "runs" / "lora" / "adapter"
    names = {one.name for one in adapter.iterdir()}
    assert set(sent) == names | {"README.md"}
    weights = base64.b64decode(sent["adapter_model.safetensors"])
    assert weights == (adapter / "adapter_model.safetensors").read_bytes()
    everything = b"".join(base64.b64decode(one) for one in sent.values())
    assert str(workspace).encode() not in everything and b"/assets/forge-tiny" not in everything


def test_a_public_repository_needs_the_word(workspace, hub):
    hub.private = False
    done = push(workspace, hub)
    assert done.returncode == 2 and "--public" in done.stderr
    assert not [path for path, _ in hub.asked if "/commit/" in path]


def test_a_dry_run_asks_nothing_of_the_hub(workspace, hub):
    done = push(workspace, hub, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert "adapter_model.safetensors" in json.loads(done.stdout)["files"]
    assert not hub.asked
