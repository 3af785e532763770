"""`forge report` and `forge runs` as a person types them, on a run that was really made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from forge_cli.checkpoints.lock import RunLock

RUN_FILE = """\
preset: lora
model: {name: forge-tiny}
data: {train: "forge:quickstart/train", eval: "forge:quickstart/heldout", max_length: 128}
lora: {r: 4}
training: {max_steps: 3, per_device_train_batch_size: 2, gradient_accumulation_steps: 1}
report: {samples: 1, max_new_tokens: 8}
"""


def forge(*arguments: str, cwd: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "forge_cli", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "80", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == code, done.stderr
    assert "\x1b" not in done.stdout + done.stderr and "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A finished run, and a copy of it as a kill after step 2 would have left it, with another rank."""
    folder = tmp_path_factory.mktemp("runs-cli")
    (folder / "run.yaml").write_text(RUN_FILE)
    forge("train", "run.yaml", "--quiet", cwd=folder)
    early = folder / "runs/early"
    shutil.copytree(folder / "runs/run", early, ignore=shutil.ignore_patterns("adapter*", "report.*", ".lock"))
    plan = (early / "plan.yaml").read_text()
    (early / "plan.yaml").write_text(plan.replace("r: 4 ", "r: 8 "))
    lines = (early / "metrics.jsonl").read_text().splitlines()
    (early / "metrics.jsonl").write_text("\n".join(lines[:3]) + '\n{"step": 3, "lo')
    facts = json.loads((early / "run.json").read_text())
    del facts["finished"]
    (early / "run.json").write_text(json.dumps({**facts, "created": "2001-02-03T04:05:06+00:00"}))
    return folder


def test_report_writes_the_page_of_the_newest_run(workspace):
    page = workspace / "runs/run/report.html"
    page.unlink(missing_ok=True)
    done = forge("report", cwd=workspace)
    assert (done.stdout, done.stderr) == ("runs/run/report.html\n", "")
    report = json.loads((workspace / "runs/run/report.json").read_text())
    assert f"held-out loss {report['losses']['eval_before']:.4f} before" in page.read_text(encoding="utf-8")


def test_report_of_a_run_that_has_not_ended_says_so(workspace):
    said = json.loads(forge("report", "early", "--json", cwd=workspace).stdout)
    assert (said["state"], said["steps"]) == ("stopped at step 2", 2)
    page = (workspace / said["page"]).read_text(encoding="utf-8")
    assert said["verdict"][0] == "not finished, step 2 of 3: stopped" and said["verdict"][0] in page
    assert "forge resume runs/early" in page and "preset lora (lora.yaml:11)" in page


def test_list_shows_the_newest_first_and_who_holds_a_run(workspace):
    lines = forge("runs", "list", cwd=workspace).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "run", "early"]  # a header, then two runs
    assert lines[1].endswith("finished") and lines[2].endswith("stopped") and max(map(len, lines)) <= 80
    lock = RunLock(workspace / "runs/early")
    try:
        listed = json.loads(forge("runs", "list", "--json", cwd=workspace).stdout)
    finally:
        lock.release()
    assert [one["state"] for one in listed] == ["finished", "running"]
    report = json.loads((workspace / "runs/run/report.json").read_text())
    assert listed[0]["eval_before"] == report["losses"]["eval_before"]
    assert listed[0]["eval_after"] == report["losses"]["eval_raw"]
    assert (listed[1]["steps"], listed[1]["eval_before"]) == (2, report["losses"]["eval_before"])


def test_list_of_nothing_is_empty(tmp_path):
    done = forge("runs", "list", cwd=tmp_path)
    assert done.stdout == "" and "forge train" in done.stderr
    assert json.loads(forge("runs", "list", "--json", cwd=tmp_path).stdout) == []


def test_list_leaves_older_runs_out(workspace, tmp_path):
    for number in range(22):
        shutil.copytree(workspace / "runs/early", tmp_path / f"runs/copy-{number}")
    done = forge("runs", "list", cwd=tmp_path)
    assert len(done.stdout.splitlines()) == 21 and "2 older runs are left out" in done.stderr
    assert len(forge("runs", "list", "--all", cwd=tmp_path).stdout.splitlines()) == 23


def test_show_names_files_checkpoints_and_what_comes_next(workspace):
    text = forge("runs", "show", "run", cwd=workspace).stdout
    for wanted in ("sft · forge-tiny · finished", "held-out loss", "adapter/", "step 3  whole", "forge chat runs/run"):
        assert wanted in text
    shown = json.loads(forge("runs", "show", "runs/run", "--json", cwd=workspace).stdout)
    assert shown["checkpoints"][0]["reason"] is None and shown["figures"]["steps"] == 3
    sizes = {one["name"]: one["bytes"] for one in shown["files"]}
    assert sizes["plan.yaml"] == (workspace / "runs/run/plan.yaml").stat().st_size


def test_compare_shows_only_what_differs(workspace, tmp_path):
    page = tmp_path / "both.html"
    said = json.loads(forge("runs", "compare", "run", "early", "--output", str(page), "--json", cwd=workspace).stdout)
    assert said["settings"] == [{"path": "lora.r", "values": {"run": "4", "early": "8"}}]
    assert said["figures"]["early"]["steps"] == 2 and said["page"] == str(page)
    assert "1 setting differs" in page.read_text(encoding="utf-8")
    text = forge("runs", "compare", "run", "early", cwd=workspace).stdout
    assert "lora.r" in text and text.endswith("page  runs/compare-run-early.html\n")


def test_mistakes_are_explained(workspace):
    assert "runs here: run, early" in forge("report", "nothing", cwd=workspace, code=2).stderr
    assert "two runs or more" in forge("runs", "compare", "run", cwd=workspace, code=2).stderr
    refused = forge("runs", "compare", "run", "early", "--output", "no/such/x.html", cwd=workspace, code=5).stderr
    assert "cannot be written" in refused
