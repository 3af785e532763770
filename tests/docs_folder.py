"""A folder that holds what the commands of a page name: run files, rows, finished runs, files of other tools."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from forge_cli.schema.runspec import RunSpec

ROOT = Path(__file__).parents[1]
RUN_FILE = """preset: lora
model: {name: forge-tiny}
data: {train: data/train.jsonl, eval_fraction: 0.25, max_length: 128, on_overlong: drop, max_lost_ratio: 1}
lora: {r: 4}
ema: {decay: 0.5}
training: {max_steps: 3, per_device_train_batch_size: 2, gradient_accumulation_steps: 1}
checkpoint: {save_steps: 1, save_total_limit: 3}
report: {samples: 1, max_new_tokens: 8}
"""
# The tokenizer of a hub model is not on a machine that runs tests; that of the embedded model is.
TINY = ("--set", "model.name=forge-tiny", "--set", "model.revision=null", "--set", "data.max_length=128")
_ROWS = {
    "messages": {
        "messages": [{"role": "user", "content": "Which colour, {n}?"}, {"role": "assistant", "content": "Blue {n}."}]
    },
    "prompt_completion": {"prompt": "Which colour, {n}?", "completion": "Blue {n}."},
    "preference": {"prompt": "Which colour, {n}?", "chosen": "Blue {n}.", "rejected": "I will not say {n}."},
    "unpaired_preference": {"prompt": "Which colour, {n}?", "completion": "Blue {n}.", "label": True},
    "text": {"text": "The colour of creature {n} is blue."},
    "prompts": {"prompt": "Which colour, {n}?"},
}
_METHODS = {**dict.fromkeys(("dpo", "orpo", "cpo", "simpo", "reward"), "preference"), "kto": "unpaired_preference"}


def read_settings(text: str) -> dict | None:
    """Returns the settings of a text in YAML, ``None`` for one that is no run file and no part of one."""
    settings = yaml.safe_load(text)
    return settings if isinstance(settings, dict) and set(RunSpec.model_fields) & set(settings) else None


def complete(settings: dict) -> dict:
    """Puts the sections of a fragment over a small run file."""
    base: dict = {"model": {"name": "mistral-7b"}, "data": {"train": "data/train.jsonl"}}
    if "preference" in settings and not {"preset", "method"} & set(settings):
        base["preset"] = "dpo"
    if "quantization" in settings and "preset" not in settings:
        base["lora"] = {}
    if "evaluation" in settings and not {"eval", "eval_rows"} & set(settings.get("data") or {}):
        base["data"]["eval_fraction"] = 0.1
    for key, value in settings.items():
        base[key] = {**base[key], **value} if isinstance(base.get(key), dict) and isinstance(value, dict) else value
    return base


class PageFolder:
    """A folder that holds what the commands of a page name.

    Args:
        path: The folder, made anew.
        finished: A run folder to copy wherever a run is named.
    """

    def __init__(self, path: Path, finished: Path) -> None:
        self.path, self.finished = path, finished
        path.mkdir(parents=True)
        for shared in ("recipes", "configs", "docs"):
            (path / shared).symlink_to(ROOT / shared)
        (path / "run.yaml").write_text(RUN_FILE, encoding="utf-8")
        self.write_rows("data/train.jsonl")
        self.add_run("run")

    def prepare(self, command: str, params: dict[str, Any]) -> None:
        """Makes what a command needs, and takes away what it would refuse to overwrite."""
        run_file = params.get("run_file")
        if run_file is not None and not (self.path / run_file).exists():
            self._place(run_file).write_text(RUN_FILE, encoding="utf-8")
        runs = params.get("runs") or ()
        for run in [params.get("run"), *(runs if isinstance(runs, list | tuple) else ())]:
            self.add_run(run)
        for name in ("data", "prompts"):
            if isinstance(value := params.get(name), str | Path):
                self.write_rows(str(value))
        written = {"init": "output", "migrate": "output", "recipes copy": "destination"}.get(command)
        if written and params.get(written) and (self.path / params[written]).is_file():
            (self.path / params[written]).unlink()
        if command == "migrate" and not (self.path / params["file"]).exists():
            self._add_foreign_file(params)

    def name_trained_model(self, params: dict[str, Any]) -> tuple[str, ...]:
        """Says what to add for a run file that goes on from an adapter: those here are of the embedded model."""
        file = self.path / (params.get("run_file") or "")
        return TINY if file.is_file() and "adapter:" in file.read_text(encoding="utf-8") else ()

    def add_run(self, name: str | Path | None) -> None:
        """Puts the finished run where a run is named; a bare name lies in ``runs``."""
        if name is None:
            return
        place = self.path / (name if "/" in str(name) else f"runs/{name}")
        if not place.exists():
            shutil.copytree(self.finished, place)

    def write_rows(self, name: str, method: str = "", columns: dict[str, str] | None = None) -> None:
        """Writes eight rows where a page names a file of them; hub names and shipped data are left alone."""
        if "://" in name or name.startswith("forge:") or "." not in Path(name).name:
            return
        file = self._place(name.replace("*", "part"))
        if file.exists() or file.suffix in (".zst", ".gz", ".parquet", ".arrow"):
            file.touch()
            return
        kind = _METHODS.get(method) or _guess_kind(file)
        kind = "prompt_completion" if kind == "messages" and file.suffix != ".jsonl" else kind
        plain = json.dumps({(columns or {}).get(key, key): value for key, value in _ROWS[kind].items()})
        rows = [json.loads(plain.replace("{n}", str(number))) for number in range(8)]
        with open(file, "w", encoding="utf-8", newline="") as stream:
            if file.suffix == ".csv":
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            elif file.suffix == ".txt":
                stream.writelines(f"{' '.join(map(str, row.values()))}\n" for row in rows)
            elif file.suffix == ".json":
                json.dump(rows, stream)
            else:
                stream.writelines(json.dumps(row) + "\n" for row in rows)

    def _add_foreign_file(self, params: dict[str, Any]) -> None:
        tool = str(params.get("tool") or "")
        folders = sorted((ROOT / "tests" / "fixtures" / "migrate").iterdir())
        named = [one for one in folders if one.name in (tool, Path(params["file"]).stem)]
        examples = sorted((named or folders)[0].glob("*.y*ml"))
        shutil.copy(examples[0], self._place(params["file"]))
        for rows in (examples[0].parent / "data").glob("*"):  # a file that is carried over names rows that are there
            if not (self.path / "data" / rows.name).exists():
                shutil.copy(rows, self._place(f"data/{rows.name}"))

    def _place(self, name: str | Path) -> Path:
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        return file


def _guess_kind(file: Path) -> str:
    words = {
        "pair": "preference",
        "pref": "preference",
        "rat": "unpaired_preference",
        "prompt": "prompts",
        "question": "prompts",
    }
    words |= {"text": "text", "book": "text", "corpus": "text", "article": "text"}
    return next((kind for word, kind in words.items() if word in file.stem), "messages")
