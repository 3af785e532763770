"""The ``forge`` command: which commands there are, and how failures become text and an exit code."""

from __future__ import annotations

import errno
import gc
import os
import sys
from typing import Annotated, Any

import typer

from forge_cli.cli.group import LazyGroup, build_command, build_group
from forge_cli.errors import ConfigError, ForgeError, Problem, Stopped, WorkerDied
from forge_cli.version import __version__

# Each module holds FUNCTIONS, from command name to function. It is imported when its command is called, so that
# `forge --help` pays for none of them.
COMMANDS = {
    "init": ("forge_cli.cli.init", "Write a run file for your rows and your GPU."),
    "train": ("forge_cli.cli.train", "Carry out a run file."),
    "resume": ("forge_cli.cli.resume", "Go on with a run that was stopped."),
    "watch": ("forge_cli.cli.watch", "Follow a run from another terminal."),
    "runs": ("forge_cli.cli.runs", "List, show and compare runs."),
    "report": ("forge_cli.cli.report", "Write the page of a run."),
    "chat": ("forge_cli.cli.chat", "Talk to what a run trained."),
    "generate": ("forge_cli.cli.generate", "Answer the prompts of a file."),
    "eval": ("forge_cli.cli.evaluate", "Measure what a run trained: loss, perplexity, exact match."),
    "merge": ("forge_cli.cli.merge", "Merge a run's adapter into its base, and prove it."),
    "export": ("forge_cli.cli.export", "Write a GGUF file of a run, and prove it."),
    "average": ("forge_cli.cli.average", "Average the newest checkpoints of a run."),
    "push": ("forge_cli.cli.push", "Upload a run's weights to the hub."),
    "verify": ("forge_cli.cli.verify", "Check a run's checkpoints to the last byte."),
    "chaos": ("forge_cli.cli.chaos", "Try what a run survives: kills, signals, full disks, NaN."),
    "estimate": ("forge_cli.cli.estimate", "Predict the GPU memory, time and cost of a run."),
    "data": ("forge_cli.cli.data", "Check and show the rows of a run file."),
    "config": ("forge_cli.cli.config", "Show, explain and check run files."),
    "presets": ("forge_cli.cli.presets", "Starting values, each with its reason."),
    "recipes": ("forge_cli.cli.recipes", "Complete run files to start from."),
    "migrate": ("forge_cli.cli.migrate", "Turn a run file of another tool into one of Forge's."),
    "doctor": ("forge_cli.cli.doctor", "Check whether a run can train on this machine."),
    "completion": ("forge_cli.cli.completion", "Complete commands, models and settings in your shell."),
    "models": ("forge_cli.cli.models", "Models whose shape is known without loading them."),
}

_INTERRUPTED = 130
UsageError: type[Exception] = typer.BadParameter.__bases__[0]


class RootGroup(LazyGroup):
    """The top group: it imports a command's module when that command is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = dict.fromkeys(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Imports the module and builds its command or group; None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        import importlib

        module, summary = COMMANDS[cmd_name]
        functions = importlib.import_module(module).FUNCTIONS
        if list(functions) == [cmd_name]:
            return build_command(cmd_name, functions[cmd_name])
        return build_group(cmd_name, summary, functions)

    def list_summaries(self) -> list[tuple[str, str]]:
        """Lists names and summaries without importing a module."""
        return [(name, summary) for name, (_, summary) in COMMANDS.items()]


app = typer.Typer(
    cls=RootGroup, add_completion=False, rich_markup_mode=None, no_args_is_help=True, pretty_exceptions_enable=False
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"forge {__version__}")
        raise typer.Exit()


@app.callback()
def forge(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.")] = False,
) -> None:
    """Fine-tune language models from one YAML run file."""


def run_app(arguments: list[str] | None = None) -> None:
    """Runs the command line and ends the process.

    This is the only place where an exception becomes text and an exit code. Results go to stdout, everything
    else to stderr.

    Args:
        arguments: What follows ``forge``; default: the process's own arguments.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments  # accepted in any place: it is typed last, after a failure
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        code = app(args=arguments, prog_name="forge", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        if code == _INTERRUPTED:  # Typer has turned Ctrl-C into this
            print("error: stopped by the user", file=sys.stderr)
    except SystemExit as stop:
        # click ends with 1 when nobody reads the output any more, which is no failure.
        code = 0 if type(sys.stdout).__name__ == "PacifyFlushWrapper" else stop.code
    except BrokenPipeError:
        # The reader (head, less) has had enough; the interpreter must not try to flush again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        code = _report_failure(error, debug)
    if not gc.isenabled():
        gc.freeze()  # a quick command: looking for garbage once more at the end would take a tenth of its time
    sys.exit(code if isinstance(code, int) else 0)


def _report_failure(error: Exception, debug: bool) -> int:
    """Writes a failure to stderr, without secrets and control characters, and returns its exit code."""
    from forge_cli.redaction import printable_lines

    if debug:
        import traceback

        print(printable_lines("".join(traceback.format_exception(error))), file=sys.stderr)
    if isinstance(error, ForgeError):
        rank = os.environ.get("RANK", "0")
        for problem in error.problems:
            if rank == "0" or not _is_for_one(error):
                _print_problem(problem, f"process {rank}: " if rank != "0" else "")
        if getattr(error, "at_once", False):
            os._exit(error.exit_code)  # the interpreter's end would wait for threads, if not for ever
        return error.exit_code
    if isinstance(error, UsageError):
        message = error.format_message()
        context = getattr(error, "ctx", None)
        if type(error).__name__ == "NoArgsIsHelpError":  # a group without a command: the help is the answer
            print(message, file=sys.stderr)
            return 2
        where, fix = (
            (context.command_path, f"type `{context.command_path} --help`") if context is not None else ("", "")
        )
        _print_problem(Problem(where, "", " ".join(message.split()).rstrip("."), fix=fix))
        return 2
    if isinstance(error, typer.Abort):
        print("error: stopped by the user", file=sys.stderr)
        return _INTERRUPTED
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        _print_problem(Problem(str(error.filename)[:60] + "...", "", "no file can have a name as long as this"))
        return 2
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        _print_problem(Problem("", "", f"output cannot be written: {error.strerror}", fix="free some space"))
        return 5
    print(printable_lines(f"internal error: {type(error).__name__}: {error}"), file=sys.stderr)
    if not debug:
        print("  fix: run it again with --debug for the traceback, and report it", file=sys.stderr)
    return 1


def _is_for_one(error: ForgeError) -> bool:
    """Tells whether all processes of a run meet a failure, or only see another's, so that one of them says it."""
    is_seen = isinstance(error, WorkerDied) and "FORGE_LAUNCHED" in os.environ
    return isinstance(error, (ConfigError, Stopped)) or is_seen


def _print_problem(problem: Problem, speaker: str = "") -> None:
    """Writes what is wrong and where in one line, and what to type instead in a second one."""
    from forge_cli.redaction import printable_lines

    print(printable_lines(f"{speaker}error: {problem.describe()}"), file=sys.stderr)
    if problem.fix:
        print(printable_lines(f"  fix: {problem.fix}"), file=sys.stderr)
