"""The error family of Forge.

::

    ForgeError
    ├── ConfigError        2   the run file, a preset, a recipe or an override
    ├── DataError          3   rows, labels, lengths
    ├── ModelError         4   weights, tokenizer, module names, self-tests
    ├── MachineError       5   hardware, versions, disk, folders
    ├── DivergedError     10   a non-finite loss or gradient
    ├── MemoryExceeded    11   out of memory, not recoverable
    └── Interrupted      130   stopped by the user

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
        place = " ".join(part for part in (self.where, self.path) if part)
        text = "; ".join(part for part in (self.what, self.why, self.fix) if part)
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


class Interrupted(ForgeError):
    """The user stopped the run (Ctrl-C)."""

    exit_code = 130
