"""What a run needs on the disk is known before it trains, and a log that cannot be written stops nothing."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest

from forge_cli.backend.watching import WatchedTrainer
from forge_cli.errors import MachineError
from forge_cli.resolve.plan import resolve_mapping
from forge_cli.run.execute import train_plan
from forge_cli.run.process import library_logs
from forge_cli.run.reporter import QuietReporter
from forge_cli.run.room import predict_checkpoint


def run(settings: dict):
    return train_plan(resolve_mapping(settings), reporter=QuietReporter())


@pytest.mark.parametrize("optim, ema", [("adamw_torch", {"decay": 0.5}), ("adafactor", None), ("lion_8bit", None)])
def test_a_checkpoint_has_the_size_that_was_predicted(tiny_settings, monkeypatch, optim, ema):
    models, train = [], WatchedTrainer.train
    monkeypatch.setattr(WatchedTrainer, "train", lambda self, **how: (models.append(self.model), train(self, **how))[1])
    lora = None if optim == "lion_8bit" else {"r": 4, "lora_alpha": 8}
    training = {"optim": optim, "max_steps": 1, "gradient_accumulation_steps": 1}
    result = run(tiny_settings(lora=lora, ema=ema, training=training, checkpoint={"save_steps": 1}))
    written = sum(path.stat().st_size for path in (result.folder / "checkpoints" / "step-00000001").iterdir())
    assert predict_checkpoint(models[0], optim, has_ema=ema is not None) == pytest.approx(written, rel=0.05)


def test_a_run_that_will_not_fit_is_refused_before_it_trains(tiny_settings, tmp_path):
    many = tiny_settings(
        name="big",
        training={"max_steps": 1_000_000},
        checkpoint={"save_steps": 1, "save_total_limit": 1_000_000},
    )
    with pytest.raises(MachineError, match=r"too little room.*it needs .*, and .* are free.*checkpoints of 18\.. MiB"):
        run(many)
    assert not (tmp_path / "runs" / "big").exists()


def test_a_log_on_a_full_disk_stops_nothing(capfd):
    with library_logs(Path("/dev/full")):
        for _ in range(200):
            logging.getLogger("transformers").warning("x" * 1000)
        warnings.warn("something", stacklevel=1)
    assert capfd.readouterr().err == ""
