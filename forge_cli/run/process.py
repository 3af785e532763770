"""Prepares this process for a run, and turns other libraries' failures into Forge's own."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from forge_cli.checkpoints.disk import DISK_ERRORS, count_free_bytes
from forge_cli.errors import ForgeError, MachineError, MemoryExceeded, Stopped, WorkerDied
from forge_cli.parts.stop_request import Interrupt
from forge_cli.redaction import printable_lines
from forge_cli.run.ranks import Rank
from forge_cli.run.signals import describe_interrupt
from forge_cli.schema.runspec import RunSpec
from forge_cli.units import format_bytes

_LESS_MEMORY = (
    "lower training.per_device_train_batch_size or data.max_length, set training.activation_checkpointing: true, or "
    "use preset: memory_efficient"
)
_TRACKERS = {
    "tensorboard": {"TENSORBOARD_LOGGING_DIR": "{}/tensorboard"},
    "wandb": {"WANDB_DIR": "{}", "WANDB_SILENT": "true", "WANDB_PROJECT": "forge"},
    "mlflow": {
        "MLFLOW_TRACKING_URI": "sqlite:///{}/mlflow.db",
        "MLFLOW_EXPERIMENT_NAME": "forge",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
    },
    "trackio": {"TRACKIO_DIR": "{}/trackio"},
}


def prepare_process(rank: Rank = Rank()) -> str:
    """Sets what has to be set before torch is imported; returns what a user should know, or nothing.

    One process uses one GPU. Trackers and hub clients do not phone home unless the user asked them to.

    Args:
        rank: The place of this process among those of the run.

    Raises:
        MachineError: Several GPUs are made visible to one process.
    """
    gc.enable()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if rank.count > 1:
        return f"{rank.count} processes"
    if visible and "," in visible:
        raise MachineError(
            "several GPUs and one process",
            where="CUDA_VISIBLE_DEVICES",
            why="one process uses one GPU; the others would idle",
            fix=f"add --num-processes {visible.count(',') + 1}, or set CUDA_VISIBLE_DEVICES=0",
        )
    if visible is not None:
        return ""
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    listed = Path("/proc/driver/nvidia/gpus")
    count = len(list(listed.iterdir())) if listed.is_dir() else 0
    return f"GPU 0 of {count} is used; --num-processes {count} uses all" if count > 1 else ""


@contextlib.contextmanager
def trackers_in(folder: Path, spec: RunSpec) -> Iterator[None]:
    """Lets trackers write into the run folder, unless the environment says where; they choose odd places."""
    wanted = {name: text for one in spec.logging.report_to for name, text in _TRACKERS[one].items()}
    wanted = {name: text.format(folder.resolve()) for name, text in wanted.items() if name not in os.environ}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in wanted:
            os.environ.pop(name, None)


def check_packages(spec: RunSpec) -> None:
    """Refuses a run whose optional packages are missing, before anything is loaded.

    Raises:
        MachineError: One is missing.
    """
    needed = {name: (f"logging.report_to: {name}", name) for name in spec.logging.report_to}
    if spec.quantization or "8bit" in spec.training.optim or "paged" in spec.training.optim:
        cause = "quantization" if spec.quantization else f"training.optim: {spec.training.optim}"
        needed["bitsandbytes"] = (cause, "qlora")
    for package, (cause, extra) in needed.items():
        if importlib.util.find_spec(package) is None:
            raise MachineError(
                f"{cause} needs {package}, which is not installed",
                why="the run would end when training starts",
                fix=f'pip install "forge-finetune[{extra}]"',
            )
    if "wandb" in spec.logging.report_to and os.environ.get("WANDB_MODE") not in ("offline", "disabled"):
        netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
        if not os.environ.get("WANDB_API_KEY") and not (netrc.is_file() and "wandb" in netrc.read_text("utf-8")):
            raise MachineError(
                "logging.report_to: wandb needs a login",
                why="the run would end when training starts",
                fix="type wandb login, or set WANDB_MODE=offline",
            )


class _MaskingFormatter(logging.Formatter):
    """Keeps secrets and control characters out of the log, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


class RunLog(logging.FileHandler):
    """Writes what libraries say to a file; where the disk takes no more, the lines are lost and the run goes on."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a line, or loses it."""
        with contextlib.suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Writes no traceback to the terminal."""

    def close(self) -> None:
        """Closes the file; what was not written by now is lost."""
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def library_logs(path: Path) -> Iterator[None]:
    """Sends what transformers, TRL, PEFT and ``warnings`` say to a file, so that the terminal stays readable."""
    import transformers

    handler = RunLog(path, encoding="utf-8", delay=True)
    handler.setFormatter(_MaskingFormatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.disable_progress_bar()
    import datasets

    datasets.disable_progress_bars()
    # It reports every retry to the terminal; what matters comes as an exception.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.captureWarnings(True)
    root = logging.getLogger()
    root.addHandler(handler)
    transformers.utils.logging.enable_propagation()
    try:
        yield
    finally:
        logging.captureWarnings(False)
        root.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def translated_errors(log: Path, advise: Callable[[], str] = str, on_disk: str = "") -> Iterator[None]:
    """Turns memory, disk and interrupt failures into Forge's errors and writes every traceback to the log.

    Args:
        log: The log.
        advise: Writes what makes a run need less memory, or nothing; asked when memory ran out.
        on_disk: What to do about a disk that takes nothing; by default resuming is named.
    """
    try:
        yield
    except ForgeError as error:
        _write_traceback(log)
        problem = error.problems[0]
        if isinstance(error, MemoryExceeded) and not problem.fix:
            raise MemoryExceeded.from_problems([dataclasses.replace(problem, fix=_ask(advise))]) from error
        raise
    except Interrupt as event:
        raise describe_interrupt(event, log.parent.parent) from None
    except KeyboardInterrupt:
        raise Stopped(
            signal.SIGINT, "stopped by Ctrl-C; what is in the run folder is whole", where=str(log.parent.parent)
        ) from None
    except Exception as error:
        _write_traceback(log)
        if (ended := _find_lost_process(error)) is not None:
            raise ended from error
        if _is_out_of_memory(error):
            raise MemoryExceeded(
                "the GPU's memory is full" if "CUDA" in str(error) else "memory is full",
                why=str(error).split("\n")[0][:200],
                fix=_ask(advise),
            ) from error
        if (reason := _find_disk_error(error)) is not None:
            raise MachineError(
                f"a file cannot be written or read: {reason}; {format_bytes(count_free_bytes(log))} are free",
                where=str(getattr(error, "filename", None) or log.parent.parent),
                why="checkpoints are untouched",
                fix=on_disk or f"make room, then: forge resume {log.parent.parent}; or set output_dir to another disk",
            ) from error
        raise


def _find_lost_process(error: Exception) -> WorkerDied | None:
    """Tells a failure to reach another process of the run from this one's own."""
    if "torch" not in sys.modules:
        return None
    from forge_cli.parts.ranks import count_ranks, is_lost_process

    if count_ranks() == 1 or not is_lost_process(error):
        return None
    return WorkerDied(
        "another process of the run has ended",
        why="no process can go on without the others; what is in the run folder is whole",
        fix="read what the other one said",
    )


def _find_disk_error(error: Exception) -> str | None:
    """Returns what the disk said; safetensors' own writer says it in words only."""
    number = error.errno if isinstance(error, OSError) else None
    if match := re.search(r"\(os error (\d+)\)", str(error)):
        number = int(match[1])
    return os.strerror(number) if number in DISK_ERRORS else None


def _ask(advise: Callable[[], str]) -> str:
    with contextlib.suppress(Exception):  # memory is short, and there is an answer for all runs
        return advise() or _LESS_MEMORY
    return _LESS_MEMORY


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError) or "torch" not in sys.modules:  # nothing is left to import torch with
        return isinstance(error, MemoryError)
    from forge_cli.parts.memory import is_out_of_memory

    return is_out_of_memory(error)


def _write_traceback(log: Path) -> None:
    with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:
        file.write(printable_lines(traceback.format_exc()))
