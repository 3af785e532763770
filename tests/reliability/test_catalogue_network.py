"""D12, I02 and the network: refusals of the hub are told apart, no token is printed, and a run calls nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http

from forge_cli.build.tokenizer import load_tokenizer
from forge_cli.errors import ForgeError
from forge_cli.redaction import printable
from forge_cli.schema.runspec import RunSpec

TOKEN = "hf_" + "abcdEFGH" * 4
RUN_FILE = """
extends: quickstart
training: {max_steps: 2, per_device_train_batch_size: 2}
data: {eval: null, eval_rows: 2}
report: {samples: 1, exact_match: false, max_new_tokens: 3}
"""
# The audit hook sees every connection and look-up of this process, whichever library makes it.
GUARD = """
import sys
calls = []
sys.addaudithook(lambda event, args: calls.append((event, str(args[-1]))) if event in (
    "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto") else None)
from forge_cli.cli.app import run_app
try:
    run_app(["train", "run.yaml"])
except SystemExit as end:
    import json, socket
    with socket.socket() as one:
        one.connect_ex(("127.0.0.1", 1))  # so that a hook which hears nothing is found out
    print(json.dumps({"code": end.code, "calls": calls}))
"""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine that answers with a status and repeats the header that holds the token."""

    class Refusing(BaseHTTPRequestHandler):
        status, code = 401, ""

        def do_HEAD(self):
            self.send_response(self.status)
            self.send_header("X-Error-Code", self.code)
            self.send_header("X-Error-Message", f"you sent {self.headers.get('authorization')}")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_):
            pass

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # between the client's five attempts
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield Refusing
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "code", "exit_code", "words"),
    [
        (401, "", 4, "its name or the token is wrong (401)"),
        (403, "GatedRepo", 4, "private or gated"),
        (404, "RepoNotFound", 4, "not a valid model identifier"),
        (429, "", 5, "too many requests (429)"),
        (503, "", 5, "out of order (503)"),
    ],
)
def test_refusals_of_the_hub_are_told_apart_and_hold_no_token(hub, status, code, exit_code, words):
    hub.status, hub.code = status, code
    spec = RunSpec(model={"name": "org/name"}, data={"train": "forge:quickstart/train"}, lora={})
    with pytest.raises(ForgeError) as caught:
        load_tokenizer(spec)
    (problem,) = caught.value.problems
    assert caught.value.exit_code == exit_code and words in problem.what, problem
    assert problem.where == "model.name" and problem.fix
    error: BaseException | None = caught.value
    while error is not None:  # what a traceback would show
        assert TOKEN not in printable(str(error))
        error = error.__cause__ or error.__context__


def test_a_run_that_has_everything_here_calls_nobody(tmp_path):
    (tmp_path / "run.yaml").write_text(RUN_FILE)
    free = {key: value for key, value in os.environ.items() if "OFFLINE" not in key and "TELEMETRY" not in key}
    done = subprocess.run(
        [sys.executable, "-c", GUARD], capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={**free, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["code"] == 0, done.stderr[-2000:]
    assert result["calls"] == [["socket.connect", "('127.0.0.1', 1)"]]
    written = [one for one in tmp_path.rglob("*") if one.is_file()]
    assert any(one.name == "report.json" for one in written)
    assert not [one for one in written if TOKEN.encode() in one.read_bytes()]
