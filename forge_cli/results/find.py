"""Finds the run that a command means, and what it left behind; needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from forge_cli.errors import CheckpointError, ConfigError, DataError, ForgeError
from forge_cli.resolve.plan import Plan, read_plan, resolve_plan
from forge_cli.run.folder import ASKING_FILE, METRICS_FILE, PLAN_FILE, REPORT_FILE, RUN_FILE
from forge_cli.run.resume import read_records

RUNS_FOLDER = "runs"
DEFAULT_RUN_FILE = "run.yaml"
_WEIGHTS = ("adapter", "model")


@dataclass(frozen=True)
class Run:
    """A run folder, read only.

    Attributes:
        path: The folder.
    """

    path: Path

    @cached_property
    def plan(self) -> Plan:
        """The plan that it carried out."""
        return read_plan(self.path / PLAN_FILE)

    @cached_property
    def facts(self) -> dict:
        """What ``run.json`` says: ``run_id``, ``created``, ``finished`` and more; empty if it cannot be read."""
        return _read_json(self.path / RUN_FILE)

    @cached_property
    def report(self) -> dict:
        """Content of ``report.json``; empty for a run that has not ended."""
        return _read_json(self.path / REPORT_FILE)

    @cached_property
    def records(self) -> list[dict]:
        """The lines of ``metrics.jsonl``; a last line that is half written is left out."""
        return read_records(self.path / METRICS_FILE)

    @property
    def home(self) -> Path:
        """The folder that the run was started in, from which its plan's paths go; else the present one."""
        home, place = (str(self.facts.get(name, "")) for name in ("started_in", "path"))
        # Moved, the run may have taken its data along.
        stayed = bool(home) and Path(home).is_dir() and place == str(self.path.resolve())
        return Path(home) if stayed else Path.cwd()

    @property
    def kind(self) -> str:
        """``adapter`` or ``model``: what was trained; empty as long as nothing was saved."""
        return next((name for name in _WEIGHTS if (self.path / name).is_dir()), "")

    def weights(self, which: str = "ema") -> Path:
        """Returns the folder of the trained weights.

        Args:
            which: ``ema`` for the ones to use (averaged, if the run averaged), ``raw`` for the last step's.

        Raises:
            CheckpointError: The run saved no such weights.
        """
        if not self.kind:
            raise CheckpointError(
                "this run has saved no weights yet",
                where=str(self.path),
                why="it was stopped before its end, or is still going on",
                fix=f"go on with it: forge resume {self.path}",
            )
        raw = self.path / f"{self.kind}-raw"
        return raw if which == "raw" and raw.is_dir() else self.path / self.kind

    def asking(self) -> dict:
        """Returns how the model is asked: ``system_prompt`` and ``end_token_ids``; empty for a run without."""
        return _read_json(self.weights() / ASKING_FILE)


def list_runs(root: Path | None = None) -> list[Run]:
    """Lists runs, the newest first.

    Args:
        root: Folder that holds runs; ``None`` takes ``./runs`` and the ``output_dir`` of ``./run.yaml``.
    """
    roots = [root] if root else list(_usual_roots())
    found = {
        path.parent.resolve(): Run(path.parent) for one in roots for path in one.glob(f"*/{RUN_FILE}") if _is_run(path)
    }
    return sorted(found.values(), key=lambda run: str(run.facts.get("created", "")), reverse=True)


def choose_run(path: Path | None = None, *, with_weights: bool = False) -> Run:
    """Finds the run that a command means.

    Args:
        path: Run folder, or the name of one in the usual places; ``None`` means the newest run.
        with_weights: Of the newest runs, take one that has saved weights.

    Raises:
        ConfigError: There is none.
    """
    if path is None:
        runs = list_runs()
        runs = [run for run in runs if run.kind] if with_weights else runs
        if not runs:
            raise ConfigError(
                "there is no run here" + (" that has saved weights" if with_weights else ""),
                where=", ".join(str(one) for one in _usual_roots()),
                fix="name a run folder, or start a run: forge train run.yaml",
            )
        return runs[0]
    for place in (path, *(root / path for root in _usual_roots() if not path.is_absolute())):
        if _is_there(place / RUN_FILE):
            return Run(place)
    names = [run.path.name for run in list_runs()]
    raise ConfigError(
        f"this is no run folder: it has no {RUN_FILE}",
        where=str(path),
        fix=f"runs here: {', '.join(names[:8])}" if names else "name the folder of a run, as in runs/NAME",
    )


def check_eval_rows(run: Run) -> None:
    """Refuses a run that holds no rows back.

    Raises:
        DataError: Names what to do instead.
    """
    data = run.plan.spec.data
    if data.eval is data.eval_fraction is data.eval_rows is None:
        raise DataError(
            "this run has no evaluation rows",
            where=str(run.path),
            why="its plan names neither data.eval nor a share of the training rows",
            fix=f"name rows: forge eval {run.path} --data FILE",
        )


def _usual_roots() -> Iterator[Path]:
    yield Path(RUNS_FOLDER)
    file = Path(DEFAULT_RUN_FILE)
    if file.is_file():
        try:
            root = Path(resolve_plan(file, ()).spec.output_dir).expanduser()
        except ForgeError:
            return
        if root != Path(RUNS_FOLDER):
            yield root


def _is_there(file: Path) -> bool:
    try:
        return file.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _is_run(path: Path) -> bool:
    return not path.parent.name.startswith(".") and "run_id" in _read_json(path)


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
