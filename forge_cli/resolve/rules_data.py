"""Contradictions about data, evaluation and the report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from forge_cli.resolve.effect import has_evaluation
from forge_cli.resolve.scene import Clash, Scene
from forge_cli.resolve.sources import find_embedded_data, is_data_file, is_embedded_data, list_embedded_data
from forge_cli.resolve.wording import printable


def check_files(scene: Scene) -> Iterator[Clash]:
    """Local files and shipped data that a run names are there."""
    for name in ("train", "eval"):
        source = getattr(scene.spec.data, name)
        if source is None:
            continue
        path = f"data.{name}"
        if is_embedded_data(source):
            if find_embedded_data(source) is None:
                known = ", ".join(f"forge:{one}" for one in list_embedded_data())
                yield Clash((path,), f"Forge ships no data {printable(source)}", f"known: {known or 'none'}")
        elif is_data_file(source) and (clash := _check_file(path, source)) is not None:
            yield clash


def _check_file(path: str, source: str) -> Clash | None:
    try:
        file = Path(source).expanduser()
        if file.is_file():
            return None
        exists = file.exists()
    except (OSError, RuntimeError, ValueError):
        return Clash((path,), f"{printable(source)} is not a file name", "name a .jsonl, .json, .csv or .parquet file")
    if exists:
        return Clash((path,), f"{printable(source)} is not a regular file", "name the file with the rows")
    from forge_cli.resolve.nearness import find_near_file

    near = find_near_file(file)
    fix = f"did you mean {printable(near)}?" if near else f"paths start at {printable(str(Path.cwd()))}"
    return Clash((path,), f"no such file: {printable(source)}", fix)


def check_evaluation_source(scene: Scene) -> Iterator[Clash]:
    """The evaluation rows come from one place, and not from the training rows."""
    data = scene.spec.data
    for name in ("eval", "eval_split"):
        if data.eval_fraction is not None and getattr(data, name) is not None:
            what = f"data.eval_fraction and data.{name} both say where the evaluation rows come from"
            yield Clash(("data.eval_fraction", f"data.{name}"), what, "keep one of them")
            return
    local = is_data_file(data.train) or is_embedded_data(data.train)
    if data.eval is None and data.eval_split == data.train_split and not local:
        what = f"the split {printable(data.train_split)} is both trained on and evaluated on"
        yield Clash(
            ("data.eval_split", "data.train_split", "data.eval"), what, "name another split, or use eval_fraction"
        )


def check_length(scene: Scene) -> Iterator[Clash]:
    """No row is longer than the positions the model knows."""
    facts, length = scene.facts, scene.spec.data.max_length
    positions = facts.max_position_embeddings if facts is not None else None
    if positions is not None and length > positions:
        what = f"data.max_length is {length}, but {printable(scene.spec.model.name)} knows {positions} positions"
        yield Clash(("data.max_length", "model.name"), what, f"write max_length: {positions} or less")


def check_report(scene: Scene) -> Iterator[Clash]:
    """The report generates something, from rows that exist."""
    report = scene.spec.report
    if report is None:
        return
    if report.exact_match and not has_evaluation(scene.spec):
        paths = ("report.exact_match", "data.eval", "data.eval_fraction", "data.eval_split")
        yield Clash(paths, "exact_match needs evaluation rows", "add data.eval or data.eval_fraction")
    if not report.samples and not report.exact_match and not report.prompts:
        paths = ("report.samples", "report.exact_match", "report.prompts")
        yield Clash(paths, "the report generates no answers", "write report: null")


DATA_RULES = (check_files, check_evaluation_source, check_length, check_report)
