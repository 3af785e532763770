"""Real signals to real processes; ``tests/campaign/signals.py`` sends many more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).parents[1] / "campaign" / "signals.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the campaign forks")
def test_a_run_that_is_stopped_or_hangs_says_so_and_goes_on_to_the_same_bytes():
    done = subprocess.run([sys.executable, str(CAMPAIGN), "--short"], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|")[1:6] for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["SIGTERM, train", "1", "143: 1", "1 + 0", "1"],
        ["SIGTERM, evaluation", "1", "143: 1", "1 + 0", "1"],
        ["Ctrl-C twice", "1", "130: 1", "1 + 0", "1"],
        ["hang", "1", "12: 1", "1 + 0", "1"],
    ]
