"""The error family of Forge.

::

    ForgeError
    ├── ConfigError        2   the run file, a preset, a recipe or an override
    ├── DataError          3   rows, labels, lengths
    ├── ModelError         4   weights, tokenizer, module names, self-tests
    ├── MachineError       5   hardware, versions, disk, folders
    ├── DivergedError     10   a non-finite loss or gradient
    ├── MemoryExceeded    11   out of memory, not recoverable
    ├── NoProgress        12   no step for far too long
    ├── CheckpointError   13   no checkpoint to go on from, or none can be written
    ├── WorkerDied        14   another process of the run ended
    └── Stopped        128+n   stopped by signal n: 130 Ctrl-C, 143 SIGTERM, 138 SIGUSR1

Every failure that Forge foresees is one of these; it says what is wrong, where, why it matters and
what to type instead. ``forge_cli.cli.app.main`` is the only place that turns them into an exit code.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, in four parts.

    Attributes:
        where: ``file:line:column``, ``--set``, ``file row 12``; empty if there is no place to name.
        path: Dotted path of the setting (``training.learning_rate``); empty if none.
        what: What is wrong.
        why: Why it matters; may be empty when ``what`` already says so.
        fix: What to type instead; may be empty.
    """

    where: str
    path: str
    what: str
    why: str = ""
    fix: str = ""

    def __str__(self) -> str:
        """Returns everything in one line."""
        return "; ".join(part for part in (self.describe(), self.fix) if part)

    def describe(self) -> str:
        """Returns where, what and why, without the fix."""
        place = " ".join(part for part in (self.where, self.path) if part)
        text = "; ".join(part for part in (self.what, self.why) if part)
        return f"{place}: {text}" if place else text


class ForgeError(Exception):
    """Base of every foreseen failure.

    Args:
        what: What is wrong, in one sentence.
        where: File, row, module or folder it concerns.
        why: Why it matters.
        fix: What to type or change.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        self.problems: tuple[Problem, ...] = (Problem(where=where, path="", what=what, why=why, fix=fix),)
        super().__init__(str(self.problems[0]))

    @classmethod
    def from_problems(cls, problems: list[Problem] | tuple[Problem, ...]) -> ForgeError:
        """Builds one error that carries several problems, so that a user sees all of them at once."""
        error = cls(problems[0].what)
        error.problems = tuple(problems)
        error.args = ("\n".join(str(problem) for problem in problems),)
        return error


class ConfigError(ForgeError):
    """The run file, a preset, a recipe or an override is wrong."""

    exit_code = 2


class DataError(ForgeError):
    """The training or evaluation rows are wrong."""

    exit_code = 3


class ModelError(ForgeError):
    """The model, its tokenizer or a self-test of them is wrong."""

    exit_code = 4


class MachineError(ForgeError):
    """The machine cannot do it: hardware, versions, disk, permissions, an existing folder."""

    exit_code = 5


class DivergedError(ForgeError):
    """A loss or a gradient is not finite; the update was not made."""

    exit_code = 10


class MemoryExceeded(ForgeError):
    """The device ran out of memory and nothing smaller is left to try."""

    exit_code = 11


class NoProgress(ForgeError):
    """No optimizer step, evaluation or save was finished for far longer than they take."""

    exit_code = 12


class CheckpointError(ForgeError):
    """There is no checkpoint that a run can go on from, or none can be written."""

    exit_code = 13


class WorkerDied(ForgeError):
    """Another process of the run ended, so this one cannot go on."""

    exit_code = 14


class Stopped(ForgeError):
    """A signal stopped the run; the exit code is 128 plus its number.

    Args:
        signal_number: The signal.
        what: What happened to the run.
        exit_code: Exit code to use instead (``--preempt-exit-code``).
        at_once: The process is not to wait for anything.
        **parts: ``where``, ``why`` and ``fix``, as for every error.
    """

    def __init__(
        self, signal_number: int, what: str, *, exit_code: int | None = None, at_once: bool = False, **parts: str
    ) -> None:
        super().__init__(what, **parts)
        self.signal_number = signal_number
        self.at_once = at_once
        self.exit_code = 128 + signal_number if exit_code is None else exit_code
