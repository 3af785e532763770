"""What a run needs of a machine, looked at piece by piece; each problem with the command that mends it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from forge_cli.redaction import printable
from forge_cli.start.torch_probe import PROBE
from forge_cli.units import GIB, MIB, format_bytes

OK, NOTE, PROBLEM = "OK", "note", "PROBLEM"
PROBE_SECONDS = 12.0
_SMI_SECONDS = 3.0
_NO_ANSWER = "it gave no answer"
_DISTRIBUTION = "forge-finetune"
_TESTED = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "bitsandbytes")
_LEAST_FREE_BYTES, _CALM_FREE_BYTES = 200 * MIB, 5 * GIB
_CUDA_BUILD = "install the CUDA build of torch: `Start Locally` on pytorch.org names the command"


class Check(NamedTuple):
    """One thing that was looked at.

    Attributes:
        name: What.
        status: ``OK``, ``note`` (a run can train all the same) or ``PROBLEM``.
        text: What was found.
        fix: The command that mends it; empty if nothing has to be mended.
    """

    name: str
    status: str
    text: str
    fix: str = ""


def examine(runs: Path, *, probe_seconds: float = PROBE_SECONDS) -> Iterator[Check]:
    """Looks at everything; what is slow comes last.

    Args:
        runs: Folder that runs are written to; need not exist.
        probe_seconds: Longest time that torch may take to answer.
    """
    looks: tuple[Callable[[], Iterator[Check]], ...] = (
        _check_python,
        _check_versions,
        lambda: _check_folder(runs),
        _check_hub,
        _check_limits,
        lambda: _check_torch(probe_seconds),
    )
    for look in looks:
        yield from look()


def _check_python() -> Iterator[Check]:
    version = platform.python_version()
    is_virtual = sys.prefix != sys.base_prefix
    yield Check("Python", OK, f"{version}{', in a virtual environment' if is_virtual else ''}")


def _check_versions() -> Iterator[Check]:
    """Compares what is installed with what Forge was tested with, as its own metadata says."""
    from importlib import metadata

    from packaging.requirements import Requirement

    try:
        wanted = {one.name: one for one in map(Requirement, metadata.requires(_DISTRIBUTION) or [])}
    except metadata.PackageNotFoundError:
        yield Check("versions", NOTE, f"{_DISTRIBUTION} is not installed, so no range is known", "pip install -e .")
        return
    for name in _TESTED:
        requirement = wanted.get(name)
        if requirement is None:
            continue
        bounds = ",".join(sorted(map(str, requirement.specifier), reverse=True))
        tested, fix = f"tested with {bounds}", f'pip install "{name}{bounds}"'
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            is_needed = requirement.marker is None
            text = f"not installed; {tested}" if is_needed else "not installed; only 4-bit presets (qlora) need it"
            yield Check(name, PROBLEM if is_needed else NOTE, text, fix)
            continue
        is_tested = requirement.specifier.contains(version, prereleases=True)
        yield Check(name, OK if is_tested else PROBLEM, f"{version}, {tested}", "" if is_tested else fix)


def _check_folder(runs: Path) -> Iterator[Check]:
    """Looks at the disks of runs and models, and at what the runs' file system can do."""
    yield from _check_disk("disk for runs", runs, needed=True)
    existing = _find_existing(runs)
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(prefix=".forge-doctor-", dir=existing) as folder:
        yield from _check_file_system(Path(folder))
    yield from _check_disk("disk for models", _find_hub_cache(), needed=False)


def _check_disk(name: str, path: Path, *, needed: bool) -> Iterator[Check]:
    existing = _find_existing(path)
    try:
        free = shutil.disk_usage(existing).free
    except OSError as error:
        yield Check(name, PROBLEM if needed else NOTE, f"{path}: {error.strerror}", "choose another folder: output_dir")
        return
    if not os.access(existing, os.W_OK):
        fix = "set output_dir to a folder you may write to" if needed else "export HF_HOME=FOLDER"
        yield Check(name, PROBLEM if needed else NOTE, f"{existing} cannot be written", fix)
        return
    status = OK if free >= _CALM_FREE_BYTES else PROBLEM if needed and free < _LEAST_FREE_BYTES else NOTE
    fix = "" if status == OK else f"make room on the disk of {existing}: du -sh {existing}/*"
    yield Check(name, status, f"{format_bytes(free)} free at {existing}", fix)


def _check_file_system(folder: Path) -> Iterator[Check]:
    import fcntl

    try:
        (folder / "old").write_text("old", encoding="utf-8")
        (folder / "new").write_text("new", encoding="utf-8")
        os.replace(folder / "new", folder / "old")
        renames = (folder / "old").read_text(encoding="utf-8") == "new"
    except OSError:
        renames = False
    try:
        with (folder / "old").open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locks = True
    except OSError:
        locks = False
    elsewhere = "set output_dir to a local disk"
    if not renames:
        yield Check("file system", PROBLEM, "files cannot be replaced in one step, so no save is safe", elsewhere)
    elif not locks:
        text = "no file locks: only a heartbeat keeps two processes from one run"
        yield Check("file system", NOTE, text, elsewhere)
    else:
        yield Check("file system", OK, "files are replaced in one step, and locks hold")


def _check_hub() -> Iterator[Check]:
    """Looks whether there is a token; it is neither shown nor tried."""
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    file = Path(os.environ.get("HF_TOKEN_PATH") or home / "token").expanduser()
    variable = next((one for one in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(one, "").strip()), "")
    has_file = False
    with contextlib.suppress(OSError):
        has_file = file.stat().st_size > 0
    if variable or has_file:
        yield Check("hub login", OK, f"a token is there ({variable or 'saved by hf auth login'}); it was not tried")
    else:
        yield Check("hub login", NOTE, "no token; only gated and private models need one", "hf auth login")


def _check_limits() -> Iterator[Check]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_low = soft != resource.RLIM_INFINITY and soft < 1024
    shown = "unlimited" if soft == resource.RLIM_INFINITY else str(soft)
    more = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
    yield Check("open files", NOTE if is_low else OK, f"at most {shown}", f"ulimit -n {more}" if is_low else "")
    with contextlib.suppress(OSError):
        size = shutil.disk_usage("/dev/shm").total
        is_small = size < 256 * MIB
        fix = "docker run --shm-size=1g, if this is a container" if is_small else ""
        yield Check("/dev/shm", NOTE if is_small else OK, format_bytes(size), fix)


def _check_torch(seconds: float) -> Iterator[Check]:
    """Asks torch in a process of its own: one that is broken may crash or hang."""
    found, reason = _probe(seconds)
    driver, driver_cuda = _ask_driver()
    if "torch" not in found:
        fix = 'python -c "import torch"' if reason.startswith(_NO_ANSWER) else "pip install --force-reinstall torch"
        yield Check("torch import", PROBLEM, reason or "it ended without a word", fix)
    else:
        yield from _check_gpu(found, driver, driver_cuda)
        yield _check_attention(found)
    yield from _check_bitsandbytes(found, reason)


def _probe(seconds: float) -> tuple[dict, str]:
    """Runs the probe; returns what it found, and why it did not come to its end."""
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "PYTHONUTF8": "1"}
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", PROBE], capture_output=True, text=True, timeout=seconds, env=environment
        )
        printed, errors, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        printed = (error.stdout or b"").decode("utf-8", "replace")
        errors, code = "", f"{_NO_ANSWER} in {seconds:g} s"
    found: dict = {}
    for line in printed.splitlines():
        with contextlib.suppress(ValueError, TypeError):
            found.update(json.loads(line))
    if code == 0:
        return found, printable(str(found.get("torch_error", "")))
    last = next((line for line in reversed(errors.splitlines()) if line.strip()), "")
    return found, printable(code if isinstance(code, str) else last or f"it ended with code {code}")


def _ask_driver() -> tuple[str, str]:
    """Returns the version of the NVIDIA driver and of the newest CUDA that it knows; empty without one."""
    try:
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=_SMI_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return "", ""
    words = done.stdout.replace("|", " ").split()

    def after(name: str) -> str:
        at = next((i for i, one in enumerate(words[:-2]) if one == name and words[i + 1] == "Version:"), None)
        return "" if at is None else words[at + 2]

    return after("Driver") or "unknown", after("CUDA")


def _check_gpu(found: dict, driver: str, driver_cuda: str) -> Iterator[Check]:
    built = found.get("cuda") or ""
    devices = found.get("devices", [])
    if not devices:
        if not driver:
            yield Check("GPU", NOTE, "none; a CPU trains small models such as forge-tiny")
        elif not built:
            yield Check("CUDA", PROBLEM, f"there is a GPU (driver {driver}), and torch is built for CPUs", _CUDA_BUILD)
        elif driver_cuda and _as_numbers(built) > _as_numbers(driver_cuda):
            text = f"torch is built for CUDA {built}, and driver {driver} knows {driver_cuda} at most"
            yield Check("CUDA", PROBLEM, text, f"update the driver, or {_CUDA_BUILD}")
        else:
            text = f"torch sees no GPU, driver {driver} does: {found.get('cuda_error') or 'no reason given'}"
            yield Check("CUDA", PROBLEM, printable(text), "unset CUDA_VISIBLE_DEVICES, or restart the machine")
        return
    kind = f"CUDA {built}" if built else f"ROCm {found.get('hip')}"
    newest = f", driver {driver} knows up to {driver_cuda or '?'}" if driver else ""
    yield Check("CUDA", OK, f"torch is built for {kind}{newest}")
    for index, one in enumerate(devices):
        is_full = one["free"] < 0.5 * one["total"]
        text = f"{one['name']}, {format_bytes(one['free'])} of {format_bytes(one['total'])} free"
        text += ", bf16" if one["bf16"] else ", no bf16: Forge trains in fp16"
        fix = "nvidia-smi shows who has the rest" if is_full else ""
        yield Check(f"GPU {index}", NOTE if is_full else OK, printable(text), fix)


def _as_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(one) for one in version.split(".") if one.isdecimal())


def _check_attention(found: dict) -> Check:
    flash = found.get("flash_attn", "")
    if flash.startswith("error: "):
        text = f"flash-attn is installed and cannot be imported: {flash.removeprefix('error: ')}"
        return Check("attention", PROBLEM, printable(text), "pip uninstall flash-attn")
    kernels = ", ".join(["sdpa", *([f"flash-attn {flash}"] if flash else [])])
    return Check("attention", OK, f"{kernels}{'' if flash else ' (flash-attn is not needed)'}")


def _check_bitsandbytes(found: dict, reason: str) -> Iterator[Check]:
    state = found.get("bitsandbytes", "" if "torch" not in found else reason and f"error: {reason}")
    if state.startswith("error: "):
        text = f"it cannot be used: {state.removeprefix('error: ')}"
        yield Check("4-bit weights", PROBLEM, printable(text), "pip install --force-reinstall bitsandbytes")
    elif state:
        yield Check("4-bit weights", OK, f"bitsandbytes loads its native library ({state})")


def _find_existing(path: Path) -> Path:
    """Returns the path, or the nearest folder above it that exists."""
    whole = path.expanduser().absolute()
    return next((one for one in (whole, *whole.parents) if one.is_dir()), whole)


def _find_hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub")
