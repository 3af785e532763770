"""Saves checkpoints while training goes on: a copy is made at once, and written by a thread."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file

from forge_cli.checkpoints.disk import DISK_ERRORS, count_free_bytes, describe_shortage
from forge_cli.checkpoints.files import Content, count_content
from forge_cli.checkpoints.store import Checkpoint, CheckpointStore, verify
from forge_cli.errors import CheckpointError, MachineError
from forge_cli.parts.state import copy_to_host, find_non_finite, flatten, list_bytes, unflatten

STATE_FILE = "state.json"
MOST_MISSED = 3


class Stateful(Protocol):
    """Something whose state belongs to a checkpoint."""

    def state_dict(self) -> dict[str, object]:
        """Returns its state: nested plain data and tensors."""

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Takes up a state."""


class MissedSave(Exception):
    """A checkpoint that the disk did not take.

    Args:
        what: What happened.
        needed_bytes: Size of the checkpoint.
        root: Where it was to go.
    """

    def __init__(self, what: str, needed_bytes: int, root: Path) -> None:
        self.text = describe_shortage(needed_bytes, root, what)
        super().__init__(self.text)


class Keeper:
    """Writes the checkpoints of a run.

    Args:
        store: Where they go.
        about: Further fields of the manifest: digests, versions.
        say: Receives what a user should know.
        in_background: Write while training goes on; needs room for a copy in host memory.
    """

    def __init__(
        self,
        store: CheckpointStore,
        about: Mapping[str, object],
        say: Callable[[str], None] = lambda text: None,
        *,
        in_background: bool = True,
    ) -> None:
        self.store = store
        self.about = dict(about)
        self.say = say
        self.in_background = in_background
        self.latest: Checkpoint | None = None
        self.num_missed = 0
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._has_proved = False

    def save(
        self,
        step: int,
        trees: Mapping[str, object],
        texts: Mapping[str, object],
        *,
        eval_loss: float | None = None,
        wait: bool = False,
    ) -> None:
        """Saves a step.

        Args:
            step: Optimizer steps done.
            trees: File name without suffix to nested tensors and plain data, each a safetensors file of its own; what
                is no tensor goes to ``state.json``.
            texts: File name to JSON.
            eval_loss: Latest held-out loss.
            wait: Come back when it is on the disk.

        Raises:
            ForgeError, OSError: As :meth:`finish`, for the save before this one, and for this one with ``wait``.
        """
        self.finish()
        flat = {name: flatten(tree) for name, tree in trees.items()}
        wait = wait or not self.in_background or not self._has_proved
        copied = {name: tensors if wait else copy_to_host(tensors) for name, (_, tensors) in flat.items()}
        content = {f"{name}.safetensors": list_bytes(tensors) for name, tensors in copied.items() if tensors}
        skeletons = {name: skeleton for name, (skeleton, _) in flat.items()}
        for name, value in {**texts, STATE_FILE: skeletons}.items():
            content[name] = (json.dumps(value) + "\n").encode()

        def write() -> Checkpoint:
            for name, tensors in copied.items():
                _refuse_non_finite(step, name, tensors)
            return self._write(step, content, eval_loss)

        if wait:
            self._run(write)
            self.finish()
        else:
            self._thread = threading.Thread(target=self._run, args=(write,), name="forge-checkpoint")
            self._thread.start()

    def _write(self, step: int, content: Content, eval_loss: float | None) -> Checkpoint:
        """Writes a checkpoint, or says what it needs.

        Raises:
            MissedSave: The disk does not take it; earlier checkpoints are untouched.
        """
        needed_bytes, root = count_content(content), self.store.root
        try:
            if count_free_bytes(root) < needed_bytes:
                self.store.clear_leftovers()
            if count_free_bytes(root) < needed_bytes:
                raise MissedSave(f"the checkpoint of step {step} does not fit", needed_bytes, root)
            return self.store.write(step, content, eval_loss=eval_loss, **self.about)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            what = f"the checkpoint of step {step} cannot be written ({error.strerror})"
            raise MissedSave(what, needed_bytes, root) from error

    def _run(self, write: Callable[[], Checkpoint]) -> None:
        try:
            self.latest = write()
            self.num_missed = 0
        except Exception as error:
            self._error = error

    def finish(self, *, is_over: bool = False) -> None:
        """Waits for the save in hand. One that the disk did not take is said, and the next one tries again.

        Args:
            is_over: Training is done: the weights come next, whatever was missed.

        Raises:
            MachineError: The disk did not take the first save.
            CheckpointError: It did not take three in a row, or a tensor is not finite.
            OSError: The save failed for another reason.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if isinstance(error, MissedSave):
            self._bear(error, is_over)
        elif error is not None:
            raise error
        elif self.latest is not None and not self._has_proved:
            self._prove(self.latest)

    def has_saved(self, step: int) -> bool:
        """Tells whether a step's checkpoint is on the disk."""
        return self.latest is not None and self.latest.step == step

    def _bear(self, missed: MissedSave, is_over: bool) -> None:
        self.num_missed += 1
        fix = "make room, or set output_dir to another disk and checkpoint.save_total_limit lower"
        if self.latest is None and not self.store.list_sound():
            raise MachineError(
                missed.text,
                where=str(self.store.root),
                why="no checkpoint of this run could ever be saved",
                fix=fix,
            )
        good = self.latest.path.name if self.latest else "the one that the run was resumed from"
        if self.num_missed >= MOST_MISSED and not is_over:
            raise CheckpointError(
                f"{missed.text}; {self.num_missed} saves in a row were missed",
                where=str(self.store.root),
                why=f"whatever is trained on would be lost; the last good checkpoint is {good}",
                fix=f"{fix}; then resume",
            )
        self.say(f"alarm: {missed.text}; training goes on, {good} is whole, the next save tries again")

    def _prove(self, checkpoint: Checkpoint) -> None:
        """Reads the first checkpoint back: what is wrong with the disk or the tensors is found in the first minute."""
        if self._has_proved:
            return
        found = verify(checkpoint.path, self.store.run_id)
        if not isinstance(found, Checkpoint):
            raise CheckpointError(
                f"the first checkpoint cannot be read back: {found.reason}",
                where=str(found.path),
                why="the disk does not give back what was written to it",
                fix="set output_dir to another disk",
            )
        with contextlib.suppress(FileNotFoundError):
            load_tree(checkpoint.path, "weights")
        self._has_proved = True


def _refuse_non_finite(step: int, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    if bad := find_non_finite(tensors):
        raise CheckpointError(
            f"step {step}: {len(bad)} tensors of {name} are not finite, {bad[0]} first",
            why="a run that goes on from them learns nothing; earlier checkpoints are untouched",
            fix="lower training.learning_rate, or use training.precision: bf16 or fp32",
        )


def load_text(folder: Path, name: str) -> object:
    """Reads a JSON file of a verified checkpoint."""
    return json.loads((folder / name).read_text(encoding="utf-8"))


def load_tree(folder: Path, name: str, device: str | torch.device = "cpu") -> object:
    """Reads nested tensors and plain data of a verified checkpoint.

    Raises:
        KeyError: The checkpoint has none of this name.
    """
    skeleton = load_text(folder, STATE_FILE)[name]
    file = folder / f"{name}.safetensors"
    return unflatten(skeleton, load_file(file, device=str(device)) if file.exists() else {})
