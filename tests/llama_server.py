"""Asks llama.cpp itself, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import json, os, sys
import xllamacpp
questions = json.load(sys.stdin)
answers_to = os.dup(1)
os.dup2(2, 1)  # llama.cpp reports on both
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.warmup = sys.argv[1], 256, False
parameters.cpuparams.n_threads = 1
server = xllamacpp.Server(parameters)
answers = []
for kind, question in questions:
    ask = server.handle_chat_completions if kind == "chat" else server.handle_completions
    answer = ask({"temperature": 0, "cache_prompt": False, **question})
    answers.append(json.loads(answer) if isinstance(answer, str) else answer)
os.write(answers_to, json.dumps(answers).encode())
"""


def ask_llama_cpp(file: Path, questions: list[tuple[str, dict]]) -> list[dict]:
    """Returns what its server answers to ``("chat" or "text", fields of the request)``."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(file)],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)
