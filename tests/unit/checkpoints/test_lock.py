"""One process a run folder, whatever becomes of the process; and the run that another one replaces."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forge_cli.checkpoints import lock as locks
from forge_cli.checkpoints.lock import LOCK_FILE, RunLock
from forge_cli.errors import CheckpointError, MachineError
from forge_cli.run.folder import create_run_folder, open_run_folder, read_run_id, recover_run

ELSEWHERE = {"pid": 4242, "host": "node-17", "since": 1.75e9}
HOLD = """
import os, sys, time
from pathlib import Path
from forge_cli.checkpoints.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
if os.fork() == 0:  # a worker of the data loader, which outlives its parent
    time.sleep(30)
print("held", flush=True)
time.sleep(30)
"""


def make_run(root: Path, *, begun: bool = True, overwrite: bool = False):
    folder = create_run_folder(str(root), "run", "run", "plan", overwrite=overwrite)
    if begun:
        folder.metrics.write_text("{}\n")
    return folder


def write_holder(folder: Path, holder: dict, silent_seconds: float = 0) -> None:
    path = folder / LOCK_FILE
    path.write_text(json.dumps(holder))
    os.utime(path, (time.time() - silent_seconds,) * 2)


def test_a_killed_holder_leaves_the_folder_free_though_its_worker_lives(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(MachineError, match=f"process {holder.pid} on {socket.gethostname()} since 20"):
            RunLock(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        # A worker that is being started lets go as soon as it runs.
        until, is_free = time.monotonic() + 1, False
        while not is_free and time.monotonic() < until:
            with contextlib.suppress(MachineError):
                RunLock(tmp_path).release()
                is_free = True
        assert is_free
        os.killpg(holder.pid, 0)  # the worker is still there
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()


def test_workers_of_datasets_do_not_keep_the_lock(tmp_path):
    lock = RunLock(tmp_path)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(abs, (-1,)) == 1
        os.close(lock._descriptor)  # what the kernel does when this process is killed
        lock._descriptor = None
        RunLock(tmp_path).release()


def test_what_a_dead_process_of_this_host_left_is_taken_over(tmp_path):
    write_holder(tmp_path, {**ELSEWHERE, "host": socket.gethostname(), "pid": 2**22 - 1})
    RunLock(tmp_path).release()
    assert (tmp_path / LOCK_FILE).read_text() == ""


def test_a_process_on_another_host_counts_until_it_is_silent(tmp_path):
    write_holder(tmp_path, ELSEWHERE, silent_seconds=60)
    with pytest.raises(
        MachineError, match=r"process 4242 on node-17 since .*wait 9 minutes, or resume with --break-lock"
    ):
        RunLock(tmp_path)
    assert json.loads((tmp_path / LOCK_FILE).read_text()) == ELSEWHERE
    RunLock(tmp_path, break_lock=True).release()
    write_holder(tmp_path, ELSEWHERE, silent_seconds=601)
    RunLock(tmp_path).release()


def test_a_living_process_of_this_host_is_never_robbed(tmp_path):
    held = RunLock(tmp_path)
    with pytest.raises(MachineError, match="in use by process"):
        RunLock(tmp_path, break_lock=True)
    held.release()


def test_a_holder_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.02)
    lock = RunLock(tmp_path)
    os.utime(lock.path, (0, 0))
    until = time.monotonic() + 5
    while lock.path.stat().st_mtime == 0 and time.monotonic() < until:
        time.sleep(0.01)
    assert lock.path.stat().st_mtime > 0
    lock.release()


def test_a_lock_that_is_a_link_is_refused_and_its_target_untouched(tmp_path):
    target = tmp_path / "precious"
    target.write_text("precious")
    (tmp_path / LOCK_FILE).symlink_to(target)
    with pytest.raises(MachineError, match="symbolic link"):
        RunLock(tmp_path)
    assert target.read_text() == "precious"


def test_the_lock_is_readable_by_its_owner_only(tmp_path):
    lock = RunLock(tmp_path)
    assert lock.path.stat().st_mode & 0o777 == 0o600
    lock.release()


def test_a_run_that_exists_is_named_and_stays(tmp_path):
    first = make_run(tmp_path)
    (first.checkpoints / "step-00000012").mkdir(parents=True)
    with pytest.raises(MachineError, match=rf"run {first.run_id[:8]} of 20.*, saved up to step-00000012"):
        make_run(tmp_path)
    first.settle()
    assert read_run_id(first.path) == first.run_id


def test_a_run_in_use_cannot_be_replaced_or_resumed(tmp_path):
    first = make_run(tmp_path)
    for take in (lambda: make_run(tmp_path, overwrite=True), lambda: open_run_folder(first.path)):
        with pytest.raises(MachineError, match="in use by process"):
            take()
    assert [one.name for one in tmp_path.iterdir()] == ["run"]
    first.settle()


def test_a_replaced_run_goes_when_the_new_one_has_begun_and_comes_back_when_not(tmp_path):
    first = make_run(tmp_path)
    first.settle()
    make_run(tmp_path, begun=False, overwrite=True).settle()
    assert read_run_id(first.path) == first.run_id
    second = make_run(tmp_path, overwrite=True)
    second.settle()
    assert [one.name for one in tmp_path.iterdir()] == ["run"]
    assert read_run_id(first.path) == second.run_id


def test_a_run_whose_metrics_could_not_be_written_is_kept(tmp_path):
    folder = make_run(tmp_path, begun=False)
    (folder.path / "adapter").mkdir()
    folder.settle()
    assert (folder.path / "adapter").is_dir()


def _die(folder) -> None:
    """Leaves the locks as a killed process does."""
    for lock in (folder.lock, folder.replaced.lock):
        lock._close()


@pytest.mark.parametrize("is_made", [True, False], ids=["new folder made", "not yet"])
def test_a_kill_between_replacing_and_beginning_loses_no_run(tmp_path, is_made):
    first = make_run(tmp_path)
    first.settle()
    second = make_run(tmp_path, begun=False, overwrite=True)
    assert recover_run(first.path) == ""  # it lives
    _die(second)
    if not is_made:
        os.rename(second.path, tmp_path / "elsewhere")
        with pytest.raises(CheckpointError, match=r"is kept in .*\.run\.replaced-.*forge resume"):
            read_run_id(first.path)
    assert "is back" in recover_run(first.path)
    assert read_run_id(first.path) == first.run_id
    assert not list(tmp_path.glob(".*"))


def test_a_kill_after_beginning_keeps_both_runs_until_the_new_one_settles(tmp_path):
    first = make_run(tmp_path)
    first.settle()
    second = make_run(tmp_path, overwrite=True)
    _die(second)
    assert recover_run(first.path) == ""
    assert len(list(tmp_path.glob(".run.replaced-*"))) == 1
    open_run_folder(first.path).settle()
    assert [one.name for one in tmp_path.iterdir()] == ["run"]
    assert read_run_id(first.path) == second.run_id


def test_a_folder_that_cannot_be_finished_is_taken_away_again(tmp_path):
    first = make_run(tmp_path)
    first.settle()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(MachineError, match="cannot be made: File too large"):
            create_run_folder(str(tmp_path), "run", "run", "#" * 9999, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [one.name for one in tmp_path.iterdir()] == ["run"]
    assert read_run_id(first.path) == first.run_id
