"""Averages the trained weights of the newest checkpoints, and compares the average with the last of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

from forge_cli.checkpoints.store import Checkpoint, CheckpointStore, verify
from forge_cli.errors import CheckpointError, ForgeError, MachineError
from forge_cli.parts.state import find_non_finite
from forge_cli.results.card import write_card
from forge_cli.results.evaluate import Row, measure_loss
from forge_cli.results.find import Run
from forge_cli.results.load import LoadedRun, load_run
from forge_cli.results.rows import prepare_rows
from forge_cli.run.artifacts import save_weights
from forge_cli.run.folder import RunFolder

_WEIGHTS_FILE = "weights.safetensors"


def average_run(
    run: Run, last: int = 3, output: Path | None = None, say: Callable[[str], None] = lambda text: None
) -> dict[str, object]:
    """Averages the newest checkpoints of a run and saves the result like its weights.

    Args:
        run: A run that has saved its weights.
        last: How many checkpoints, at least 2; fewer are taken where fewer are sound.
        output: Folder to write; default ``adapter-average`` or ``model-average`` inside the run.
        say: Receives what is being done, and what a user should know.

    Returns:
        ``folder``, ``steps``, and ``losses`` of the last checkpoint and of the average on the evaluation rows, in nats
        a trained token; None without such rows.

    Raises:
        CheckpointError: Fewer than two sound checkpoints, or they hold other tensors than the model.
        MachineError: The folder to write is there already.
    """
    if output is not None and output.exists():
        raise MachineError(
            "this exists already", where=str(output), why="it would be lost", fix="choose another --output"
        )
    checkpoints = find_checkpoints(run, last, say)
    say("loading the model ...")
    loaded = load_run(run, which="raw")
    newest = _read_weights(checkpoints[0])
    mean = average_tensors(checkpoints)
    rows = _read_rows(run, loaded, say)
    losses = None
    if rows:
        say(f"evaluating on {len(rows)} rows ...")
        _put(loaded.model, newest)
        losses = {"last": _measure(loaded, rows)}
    _put(loaded.model, mean)
    if losses is not None:
        losses["average"] = _measure(loaded, rows)
    target = output or run.path / f"{run.kind}-average"
    # Saving asks a run folder for its path alone; the run itself is over, and its lock is not needed.
    place = RunFolder(target.parent, str(run.facts.get("run_id", "")), lock=None)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_weights(loaded.model, loaded.tokenizer, place, target.name, loaded.system_prompt)
    steps = [one.step for one in checkpoints]
    write_card(target, run, average={"steps": steps, "losses": losses})
    return {"run": run.path.name, "folder": str(target), "steps": steps, "tensors": len(mean), "losses": losses}


def find_checkpoints(run: Run, last: int, say: Callable[[str], None]) -> list[Checkpoint]:
    """Returns the newest checkpoints that are whole to the last byte, the latest first.

    Raises:
        CheckpointError: There are fewer than two.
    """
    run_id = str(run.facts.get("run_id", ""))
    sound = []
    for path in CheckpointStore(run.path / "checkpoints", run_id).list_paths():
        found = verify(path, run_id)
        if isinstance(found, Checkpoint):
            sound.append(found)
        else:
            say(f"note: {path.name} is left out: {found.reason}")
        if len(sound) == last:
            break
    if len(sound) < 2:
        raise CheckpointError(
            f"an average needs two sound checkpoints or more, and this run has {len(sound)}",
            where=str(run.path / "checkpoints"),
            fix="train with a lower checkpoint.save_steps and checkpoint.save_total_limit: 3 or more",
        )
    if len(sound) < last:
        say(f"note: {len(sound)} of {last} checkpoints are there; checkpoint.save_total_limit keeps more")
    return sound


def average_tensors(checkpoints: list[Checkpoint]) -> dict[str, torch.Tensor]:
    """Averages trained tensors in float64, and returns them in their own formats; others are the newest's.

    Raises:
        CheckpointError: The checkpoints hold different tensors, or values that are not finite.
    """
    newest = _read_weights(checkpoints[0])
    sums = {name: one.double() for name, one in newest.items() if one.is_floating_point()}
    for checkpoint in checkpoints[1:]:
        tensors = _read_weights(checkpoint)
        if {name: one.shape for name, one in tensors.items()} != {name: one.shape for name, one in newest.items()}:
            raise CheckpointError(
                f"{checkpoint.path.name} holds other tensors than {checkpoints[0].path.name}",
                where=str(checkpoint.path.parent),
                why="they were not trained with the same settings",
                fix="use --last with fewer checkpoints",
            )
        for name, total in sums.items():
            total += tensors[name]
    mean = {name: (total / len(checkpoints)).to(newest[name].dtype) for name, total in sums.items()}
    if bad := find_non_finite(mean):
        raise CheckpointError(f"{len(bad)} averaged tensors are not finite, {bad[0]} first")
    return {**newest, **mean}


def _read_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.path / _WEIGHTS_FILE)


@torch.no_grad()
def _put(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        place = parameters.get(name)
        if place is None or place.shape != tensor.shape:
            raise CheckpointError(f"the model has no tensor {name} of shape {list(tensor.shape)}")
        place.copy_(tensor)


def _read_rows(run: Run, loaded: LoadedRun, say: Callable[[str], None]) -> list[Row]:
    """Reads the evaluation rows of supervised fine-tuning; none for other methods and without such rows."""
    if run.plan.spec.method != "sft":
        say(f"note: not evaluated: the loss of {run.plan.spec.method} is not measured here")
        return []
    try:
        rows = prepare_rows(run, run.plan.spec, loaded.tokenizer).eval
    except (ForgeError, OSError) as error:
        say(f"note: not evaluated: {str(error).splitlines()[0]}")
        return []
    if rows is None:
        say("note: not evaluated: the run has no evaluation rows")
        return []
    return sorted((Row(one["input_ids"], one["labels"]) for one in rows), key=lambda row: -len(row.ids))


def _measure(loaded: LoadedRun, rows: list[Row]) -> float:
    with loaded.autocast():
        return measure_loss(loaded.model, rows, loaded.tokenizer.pad_token_id)
