"""Contradictions about data, evaluation and the report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from forge_cli.resolve.effect import EVALUATION_SOURCES, has_evaluation
from forge_cli.resolve.scene import Clash, Scene
from forge_cli.resolve.sources import find_embedded_data, is_data_file, is_embedded_data, is_glob, list_embedded_data
from forge_cli.resolve.wording import printable
from forge_cli.schema.data import list_sources


def check_files(scene: Scene) -> Iterator[Clash]:
    """Local files and shipped data that a run names are there; patterns are looked at with the rows."""
    for name in ("train", "eval"):
        path = f"data.{name}"
        for source in list_sources(getattr(scene.spec.data, name)):
            if is_embedded_data(source.path):
                if find_embedded_data(source.path) is None:
                    known = ", ".join(f"forge:{one}" for one in list_embedded_data())
                    yield Clash((path,), f"Forge ships no data {printable(source.path)}", f"known: {known or 'none'}")
            elif is_data_file(source.path) and not is_glob(source.path) and (clash := _check_file(path, source.path)):
                yield clash


def _check_file(path: str, source: str) -> Clash | None:
    try:
        file = Path(source).expanduser()
        if file.is_file() or file.is_dir():  # what is wrong with a folder is said with the rows
            return None
        exists = file.exists()
    except (OSError, RuntimeError, ValueError):
        return Clash((path,), f"{printable(source)} is not a file name", "name a file such as data/train.jsonl")
    if exists:
        return Clash((path,), f"{printable(source)} is not a regular file", "name the file with the rows")
    from forge_cli.resolve.nearness import find_near_file

    near = find_near_file(file)
    fix = f"did you mean {printable(near)}?" if near else f"paths start at {printable(str(Path.cwd()))}"
    return Clash((path,), f"no such file: {printable(source)}", fix)


def check_evaluation_source(scene: Scene) -> Iterator[Clash]:
    """The evaluation rows come from one place, and not from the training rows."""
    data = scene.spec.data
    given = [path for path in EVALUATION_SOURCES if getattr(data, path.rpartition(".")[2]) is not None]
    if len(given) > 1:
        first, second = sorted(given, reverse=True)[:2]
        yield Clash((first, second), f"{first} and {second} both say where the evaluation rows come from", "keep one")
    trained = {(one.path, one.split) for one in list_sources(data.train)}
    for one in list_sources(data.eval):
        if (one.path, one.split) in trained:
            what = f"{printable(one.path)} is both trained on and evaluated on"
            yield Clash(("data.eval", "data.train"), what, "name other rows, or use eval_fraction")


def check_sequences(scene: Scene) -> Iterator[Clash]:
    """Packing and padding-free batches say different things about the same batch; streaming knows no number of rows."""
    data, training = scene.spec.data, scene.spec.training
    if data.packing and data.padding_free:
        yield Clash(("data.padding_free", "data.packing"), "packed sequences are padding-free already", "keep packing")
    if data.packing and training.train_sampling_strategy == "group_by_length":
        what = "packed sequences are of one length, so there is nothing to group"
        yield Clash(("training.train_sampling_strategy", "data.packing"), what, "keep packing")
    if not data.streaming:
        return
    if training.max_steps is None:
        what = "rows that are tokenised while training have no known number of steps"
        yield Clash(("data.streaming", "training.max_steps"), what, "write training: {max_steps: ...}")
    for path in ("data.packing", "data.eval_fraction", "data.eval_rows"):
        if getattr(data, path.rpartition(".")[2]):
            yield Clash((path, "data.streaming"), f"{path} needs all rows before training", "write streaming: false")
    if any(one.rows is not None or one.weight != 1 for one in list_sources(data.train)):
        what = "rows and weight of a source are drawn from all rows, before training"
        yield Clash(("data.train", "data.streaming"), what, "write streaming: false")
    if training.train_sampling_strategy != "random":
        what = "streamed rows are mixed within a buffer, whatever their length"
        yield Clash(("training.train_sampling_strategy", "data.streaming"), what, "remove the line")


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
        paths = ("report.exact_match", *EVALUATION_SOURCES)
        yield Clash(paths, "exact_match needs evaluation rows", "add data.eval or data.eval_fraction")
    if not report.samples and not report.exact_match and not report.prompts:
        paths = ("report.samples", "report.exact_match", "report.prompts")
        yield Clash(paths, "the report generates no answers", "write report: null")


DATA_RULES = (check_files, check_evaluation_source, check_sequences, check_length, check_report)
