"""`forge doctor` on machines that are broken in one way each."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from forge_cli.start.doctor import NOTE, OK, PROBLEM, Check, examine

ANSWERS = """
import sys
print('{{"torch": "2.9", "cuda": {cuda}, "hip": null}}', flush=True)
print('{{"devices": {devices}}}', flush=True)
{then}
"""
SMI = "#!/bin/sh\necho '| NVIDIA-SMI 535.1  Driver Version: 535.104  CUDA Version: 12.2 |'\n"
GPU = '[{"name": "NVIDIA L4", "free": 20000000000, "total": 23000000000, "bf16": true}]'


@pytest.fixture
def look(tmp_path: Path, monkeypatch):
    """Examines this machine with another torch: a package of that name comes first on the path."""

    def run(torch: str, *, smi: bool = False, seconds: float = 20.0) -> dict[str, Check]:
        (tmp_path / "torch.py").write_text(torch, encoding="utf-8")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        if smi:
            tool = tmp_path / "nvidia-smi"
            tool.write_text(SMI, encoding="utf-8")
            tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
            monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return {one.name: one for one in examine(tmp_path / "runs", probe_seconds=seconds)}

    return run


def answer(cuda: str = "null", devices: str = "[]", then: str = "sys.exit(0)") -> str:
    return ANSWERS.format(cuda=cuda, devices=devices, then=then)


@pytest.mark.parametrize(
    ("torch", "reason"),
    [
        ("raise ImportError('libtorch.so: cannot open')", "libtorch.so: cannot open"),
        ("import os; os._exit(7)", "it ended with code 7"),
        ("import os; os.kill(os.getpid(), 11)", "code -11"),
        ("import time; time.sleep(60)", "no answer in 1 s"),
    ],
    ids=["import error", "ends", "crash", "hangs"],
)
def test_a_broken_torch_is_a_problem_and_no_crash(look, torch, reason):
    check = look(torch, seconds=1.0 if "sleep" in torch else 20.0)["torch import"]
    assert check.status == PROBLEM and reason in check.text and "torch" in check.fix


def test_a_torch_for_cpus_beside_a_gpu_is_a_problem(look):
    check = look(answer(), smi=True)["CUDA"]
    assert check.status == PROBLEM and "built for CPUs" in check.text and check.fix


def test_a_driver_that_is_too_old_is_a_problem(look):
    check = look(answer(cuda='"12.8"'), smi=True)["CUDA"]
    assert check.status == PROBLEM and "12.8" in check.text and "12.2" in check.text


def test_a_gpu_is_described(look):
    checks = look(answer(cuda='"12.1"', devices=GPU), smi=True)
    assert checks["GPU 0"] == Check("GPU 0", OK, "NVIDIA L4, 18.63 GiB of 21.42 GiB free, bf16")
    assert checks["CUDA"].status == OK


def test_no_gpu_is_a_note_only(look):
    assert look(answer())["GPU"].status == NOTE


def test_bitsandbytes_that_crashes_is_a_problem_and_what_came_before_is_kept(look):
    checks = look(answer(then="import os; os._exit(3)"))
    assert checks["4-bit weights"].status == PROBLEM and checks["GPU"].status == NOTE


def test_the_token_is_never_shown(look, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "none"))
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    assert look(answer())["hub login"].status == OK
    assert "aaaa" not in str(look(answer()))
    monkeypatch.delenv("HF_TOKEN")
    assert look(answer())["hub login"].status == NOTE


def test_versions_are_compared_with_the_tested_ranges(look, monkeypatch):
    from importlib import metadata

    real = metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return {"trl": "0.9"}.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)
    checks = look(answer())
    assert checks["transformers"].status == OK
    assert checks["trl"].status == checks["peft"].status == PROBLEM
    assert checks["trl"].fix.startswith('pip install "trl>=')


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_a_problem(look, tmp_path):
    (tmp_path / "runs").mkdir(mode=0o500)
    assert look(answer())["disk for runs"].status == PROBLEM


def test_the_runs_folder_is_left_as_it_was(look, tmp_path):
    (tmp_path / "runs").mkdir()
    assert look(answer())["file system"].status == OK
    assert list((tmp_path / "runs").iterdir()) == []
