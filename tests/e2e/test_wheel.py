"""The wheel, not the checkout: presets, recipes, models and the embedded model travel inside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Builds the wheel and unpacks it far from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    wheel = next(folder.glob("*.whl"))
    assert wheel.stat().st_size < 12e6
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(folder / "site"),
    ]
    done = subprocess.run([*install, str(wheel)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def forge(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    # -P keeps the working directory out of sys.path: the wheel is what answers.
    command = [sys.executable, "-P", "-m", "forge_cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("presets", "list"), "qlora"),
        (("presets", "show", "qlora"), "nf4"),
        (("recipes", "list"), "quickstart"),
        (("models", "list"), "mistral-7b"),
        (("--version",), "forge 0."),
    ],
)
def test_data_travels_in_the_wheel(installed, tmp_path, arguments, text):
    done = forge(installed, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert text in done.stdout


def test_the_quickstart_trains_from_the_wheel(installed, tmp_path):
    assert forge(installed, tmp_path, "recipes", "copy", "quickstart", "mine.yaml").returncode == 0
    small = ("--set", "training.max_steps=1", "--set", "report.exact_match=false", "--quiet")
    done = forge(installed, tmp_path, "train", "mine.yaml", *small)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/mine/adapter/adapter_model.safetensors").is_file()
