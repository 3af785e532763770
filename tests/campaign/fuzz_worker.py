"""Runs cases of the fuzzing campaign as `forge` would, each batch in a fork of a process that imported once.

Reads batches of cases as lines of JSON, and answers each with a line of outcomes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

CASE_SECONDS = 5
IMPORT_SECONDS = 60  # of a busy machine, for the cases that load everything
MOST_MEMORY_MB = 300
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS = {"os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.link": 2, "os.symlink": 2, "os.truncate": 1}
# What doctor asks torch and the driver with, and what matplotlib lists fonts with.
_PROGRAMS = (sys.executable, "nvidia-smi", "fc-list")
_NEVER = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")


class Watch:
    """Notes what a case does outside its folder, from Python's audit events.

    Args:
        folder: Where files may be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen, self.is_on = str(folder.resolve()), [], False
        sys.addaudithook(self.note)

    def note(self, event: str, args: tuple) -> None:
        """Is called for every event of the interpreter."""
        if not self.is_on:
            return
        if event == "open":
            path, mode, flags = args
            if isinstance(path, (str, bytes)) and (set(mode or "") & set("wax+") or (flags or 0) & _WRITING):
                self.check(event, path, None)
        elif event in _PATHS:
            folder = args[-1] if isinstance(args[-1], int) and args[-1] >= 0 and event != "os.truncate" else None
            for path in args[: _PATHS[event]]:
                self.check(event, path, folder)
        elif event in _NEVER and not (event == "subprocess.Popen" and args[0] in _PROGRAMS):
            self.seen.append(f"{event} {args!r}"[:200])

    def check(self, event: str, path: object, folder: int | None) -> None:
        """Notes a path outside the folder."""
        self.is_on = False  # looking is no writing
        base = os.readlink(f"/proc/self/fd/{folder}") if folder is not None else os.getcwd()
        real = os.path.realpath(os.path.join(base, os.fsdecode(path))) if not isinstance(path, int) else ""
        if real and real != os.devnull and not f"{real}/".startswith(f"{self.folder}/"):
            self.seen.append(f"{event} {real}")
        self.is_on = True


def read_memory_mb(name: str) -> float:
    """Reads ``VmRSS`` or ``VmHWM``, its peak; what getrusage calls the peak is inherited from the parent process."""
    return int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


def run_case(case: dict, watch: Watch, shared_mb: float = 0, limit: int = CASE_SECONDS) -> dict:
    """Runs one command line; returns its seconds, memory and what was wrong.

    Args:
        case: Arguments, and the files beside them.
        watch: Notes what it does outside.
        shared_mb: Memory of the process that this is a fork of, as far as a fork does not count it.
        limit: Seconds it may take.
    """
    from forge_cli.cli.app import run_app

    for name, text in case["files"].items():
        Path(name).write_bytes(text.encode("latin-1"))
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace")]
    began, code, wrong = time.perf_counter(), None, ""
    signal.alarm(limit + 1)
    watch.seen, watch.is_on = [], True
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            run_app(case["args"])
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        wrong = f"raised {type(error).__name__}: {error} {traceback.format_exc()[-400:]}"
    watch.is_on = False
    signal.alarm(0)
    seconds = time.perf_counter() - began
    said = ""
    for stream in streams:
        with contextlib.suppress(ValueError):
            stream.flush()
            said += stream.buffer.getvalue().decode(errors="replace")
    memory_mb = shared_mb + read_memory_mb("VmHWM")
    if not wrong and code not in (0, 2, 3, 4, 5, 13):
        wrong = f"exit code {code}: {said[-300:]}"
    elif not wrong and "Traceback (most recent" in said and "--debug" not in case["args"]:
        wrong = f"traceback: {said[-300:]}"
    elif seconds > limit:
        wrong = f"took {seconds:.1f} s"
    elif memory_mb > MOST_MEMORY_MB:
        wrong = f"took {memory_mb:.0f} MB"
    elif watch.seen:
        wrong = f"outside the folder: {watch.seen[0]}"
    elif "torch" in sys.modules:
        wrong = "imported torch"
    return {"code": code, "seconds": seconds, "memory_mb": memory_mb, "wrong": wrong, "said": said[-1500:]}


def run_batch(cases: list[dict], watch: Watch) -> list[dict]:
    """Runs cases in forks; one that is killed or grows too big costs its own case only."""
    outcomes: list[dict] = []
    while len(outcomes) < len(cases):
        parent_mb = read_memory_mb("VmRSS")
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            shared_mb = parent_mb - read_memory_mb("VmRSS")
            with os.fdopen(writer, "w") as pipe:
                for case in cases[len(outcomes) :]:
                    outcome = run_case(case, watch, shared_mb)
                    pipe.write(json.dumps(outcome) + "\n")
                    pipe.flush()
                    if outcome["wrong"]:
                        break
            os._exit(0)
        os.close(writer)
        before = len(outcomes)
        with os.fdopen(reader) as pipe:
            outcomes.extend(json.loads(line) for line in pipe if line.endswith("\n"))
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status) or len(outcomes) == before:
            number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            wrong = f"took more than {CASE_SECONDS} s" if number == signal.SIGALRM else f"the process died ({status})"
            outcomes.append({"code": None, "seconds": CASE_SECONDS + 1, "memory_mb": 0, "wrong": wrong, "said": ""})
    return outcomes


def main() -> None:
    """Imports everything with one right case, then answers batches until there are no more."""
    folder = Path(sys.argv[1])
    os.chdir(folder)
    answers = os.fdopen(os.dup(1), "w")
    watch = Watch(folder.parent)
    resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
    warm = json.loads(sys.stdin.readline())
    for case in warm:
        if (outcome := run_case(case, watch, limit=IMPORT_SECONDS))["wrong"]:
            print(outcome, file=sys.stderr)
    answers.write(json.dumps(outcome) + "\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(run_batch(json.loads(line), watch)) + "\n")
        answers.flush()
        shutil.rmtree(folder.parent / "cache", ignore_errors=True)


if __name__ == "__main__":
    main()
