"""Shared ways to write and to break run files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from forge_cli.errors import ConfigError, Problem
from forge_cli.resolve.plan import Plan, resolve_plan

BASE = "model: {name: forge-tiny}\ndata: {train: forge:quickstart/train, max_length: 128}\n"


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a run file named run.yaml into an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def _write(text: str | bytes, name: str = "run.yaml") -> Path:
        path = Path(name)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return _write


@pytest.fixture
def plan_of(write: Callable[..., Path]) -> Callable[..., Plan]:
    """Resolves a text below the smallest run file."""
    return lambda text="", *overrides: resolve_plan(write(BASE + text), overrides)


@pytest.fixture
def problems_of(write: Callable[..., Path]) -> Callable[..., list[Problem]]:
    """Resolves a whole text that must fail, and returns its problems."""

    def _problems_of(text: str | bytes, *overrides: str) -> list[Problem]:
        with pytest.raises(ConfigError) as caught:
            resolve_plan(write(text), overrides)
        assert caught.value.exit_code == 2
        return list(caught.value.problems)

    return _problems_of
