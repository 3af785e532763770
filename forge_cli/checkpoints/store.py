"""The checkpoints of one run: written aside and renamed, verified before they are used, deleted with care."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from forge_cli import faults
from forge_cli.checkpoints.files import (
    MANIFEST_FILE,
    Content,
    HashedFile,
    Manifest,
    ManifestError,
    hash_file,
    parse_manifest,
    sync_folder,
    write_content,
)
from forge_cli.errors import CheckpointError

_NAME = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"\.(tmp|trash)-\d{8,}-\d+")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest can be read.

    Attributes:
        path: Its folder.
        manifest: What it consists of.
    """

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest.step


@dataclass(frozen=True)
class Broken:
    """A checkpoint that cannot be used.

    Attributes:
        path: Its folder.
        reason: What is wrong with which file.
    """

    path: Path
    reason: str

    @property
    def step(self) -> int:
        """Optimizer steps done, as its name says."""
        return int(self.path.name.rsplit("-", 1)[-1])


def verify(path: Path, run_id: str | None = None, *, hashes: bool = True) -> Checkpoint | Broken:
    """Checks one checkpoint against its manifest.

    Args:
        path: Its folder.
        run_id: Run that it must belong to; ``None`` takes any.
        hashes: Read and hash all files; without, only names and sizes are compared.
    """
    try:
        descriptor = os.open(path / MANIFEST_FILE, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        return Broken(path, f"{MANIFEST_FILE} cannot be read: {error.strerror}")
    with os.fdopen(descriptor, "rb") as file:
        try:
            manifest = parse_manifest(file.read())
        except ManifestError as error:
            return Broken(path, f"{MANIFEST_FILE} {error}")
    if run_id is not None and manifest.run_id != run_id:
        return Broken(path, f"belongs to another run ({manifest.run_id})")
    if path.name != name_step(manifest.step):
        return Broken(path, f"{MANIFEST_FILE} is of step {manifest.step}")
    try:
        return _compare_files(path, manifest, hashes) or Checkpoint(path, manifest)
    except OSError as error:
        return Broken(path, f"{Path(error.filename or path).name} cannot be read: {error.strerror}")


def _compare_files(path: Path, manifest: Manifest, hashes: bool) -> Broken | None:
    present = {one.name for one in path.iterdir()} - {MANIFEST_FILE}
    for name in sorted(present ^ manifest.files.keys()):
        return Broken(path, f"{name} is missing" if name in manifest.files else f"{name} does not belong there")
    for name, entry in manifest.files.items():
        file = path / name
        if file.is_symlink() or not file.is_file():
            return Broken(path, f"{name} is no regular file")
        if (size := file.stat().st_size) != entry["bytes"]:
            return Broken(path, f"{name} has {size} bytes instead of {entry['bytes']}")
    for name, entry in manifest.files.items():
        if hashes and hash_file(path / name) != entry["sha256"]:
            return Broken(path, f"{name} is not what was written (its SHA-256 differs)")
    return None


def name_step(step: int) -> str:
    """Returns the name of a step's checkpoint."""
    return f"step-{step:08d}"


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        root: Folder that holds them.
        run_id: The run. Checkpoints of others are neither used nor deleted.
        limit: How many of the newest are kept; the best and the last with a finite held-out loss are kept as well.
    """

    def __init__(self, root: Path, run_id: str, limit: int = 2) -> None:
        self.root = root
        self.run_id = run_id
        self.limit = limit

    # Reading --------------------------------------------------------------------------------------------------

    def list_paths(self) -> list[Path]:
        """Lists the folders that are named as checkpoints, the latest step first; times on files do not matter."""
        if not self.root.is_dir():
            return []
        named = [path for path in self.root.iterdir() if _NAME.fullmatch(path.name) and not path.is_symlink()]
        return sorted(named, key=lambda path: int(path.name[len("step-") :]), reverse=True)

    def list_sound(self) -> list[Checkpoint]:
        """Lists this run's checkpoints, the latest step first, without reading what is in their files."""
        found = (verify(path, self.run_id, hashes=False) for path in self.list_paths())
        return [one for one in found if isinstance(one, Checkpoint)]

    def find_newest(self) -> tuple[Checkpoint | None, list[Broken]]:
        """Returns the newest checkpoint that is whole to the last byte, and those before it that are not."""
        broken = []
        for path in self.list_paths():
            found = verify(path, self.run_id)
            if isinstance(found, Checkpoint):
                return found, broken
            broken.append(found)
        return None, broken

    # Writing --------------------------------------------------------------------------------------------------

    def clear_leftovers(self) -> list[str]:
        """Removes what saves left behind that did not come to their end; call it under the run's lock."""
        if not self.root.is_dir():
            return []
        names = [path.name for path in self.root.iterdir() if _LEFTOVER.fullmatch(path.name)]
        for name in names:
            shutil.rmtree(self.root / name, ignore_errors=True)
        return names

    def set_aside(self, broken: Iterable[Broken]) -> None:
        """Renames checkpoints that cannot be used, so that their steps can be saved anew."""
        for one in broken:
            with contextlib.suppress(OSError):
                target = self.root / f".bad-{one.step:08d}"
                shutil.rmtree(target, ignore_errors=True)
                one.path.rename(target)

    def write(self, step: int, content: Content, **about: object) -> Checkpoint:
        """Writes a checkpoint: staged beside the others, manifest last, renamed when all of it is on the disk.

        Args:
            step: Optimizer steps done.
            content: Its files.
            **about: Further fields of :class:`Manifest`.

        Raises:
            OSError: The disk is full, or cannot be written. Nothing of it stays, and earlier checkpoints are untouched.
        """
        earlier = self.list_sound()
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        stage = self.root / f".tmp-{step:08d}-{os.getpid()}"
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(mode=0o700)
        try:
            files = write_content(stage, content, step)
            latest = max(earlier, key=lambda one: one.manifest.sequence, default=None)
            manifest = Manifest(
                step,
                self.run_id,
                latest.manifest.sequence + 1 if latest else 1,
                files,
                sum(len(what) for what in content.values() if not isinstance(what, bytes)),
                parent=latest.manifest.digest if latest else "",
                **about,
            )
            file = HashedFile(stage / MANIFEST_FILE)
            try:
                text = manifest.dump()
                file.write(text[: len(text) // 2])
                faults.reach("save:manifest", step)
                file.write(text[len(text) // 2 :])
            finally:
                file.close()
            sync_folder(stage)
            faults.reach("save:rename", step)
            target = self.root / name_step(step)
            if target.exists():
                self._discard(target)
            stage.rename(target)
        except BaseException:
            shutil.rmtree(stage, ignore_errors=True)
            raise
        sync_folder(self.root)
        faults.reach("save:renamed", step)
        self._rotate(step)
        return Checkpoint(target, manifest)

    def _rotate(self, step: int) -> None:
        """Deletes old checkpoints of this run; never the one just written, the best, or the last finite one."""
        sound = self.list_sound()
        measured = [one for one in sound if is_finite(one.manifest.eval_loss)]
        kept = {one.step for one in sound[: self.limit]} | {step}
        kept |= {one.step for one in measured[:1]}
        if measured:
            kept.add(min(measured, key=lambda one: one.manifest.eval_loss).step)
        for one in sound:
            if one.step not in kept:
                faults.reach("save:rotate", step)
                with contextlib.suppress(OSError):
                    self._discard(one.path)

    def _discard(self, path: Path) -> None:
        """Renames before it deletes: a checkpoint that is half deleted must not look like one."""
        trash = self.root / f".trash-{path.name[len('step-') :]}-{os.getpid()}"
        shutil.rmtree(trash, ignore_errors=True)
        path.rename(trash)
        faults.reach("save:trash")
        shutil.rmtree(trash, ignore_errors=True)


def is_finite(value: float | None) -> bool:
    """Tells whether a held-out loss is a number."""
    return value is not None and abs(value) < float("inf")


def refuse_broken(broken: list[Broken], root: Path) -> CheckpointError:
    """Builds the error of a run none of whose checkpoints can be used."""
    if not broken:
        return CheckpointError(
            "the run has no checkpoint",
            where=str(root),
            why="there is nothing to go on from",
            fix="start again with forge train RUN_FILE --overwrite",
        )
    reasons = "; ".join(f"{one.path.name}: {one.reason}" for one in broken)
    return CheckpointError(
        f"none of the run's {len(broken)} checkpoints can be used: {reasons}",
        where=str(root),
        why="Forge goes on from verified checkpoints only, and never from scratch without being told",
        fix="restore one from a backup, or start again with forge train RUN_FILE --overwrite",
    )
