"""When a run is taken to hang, by hand-counted times, and what signals ask of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from forge_cli.data.tokenizing import held_signals
from forge_cli.errors import ConfigError
from forge_cli.parts.stop_request import Interrupt
from forge_cli.run.signals import SignalListener
from forge_cli.run.watchdog import Watchdog, read_limit


def pass_time(watchdog: Watchdog, seconds: int) -> bool:
    """Lets seconds go by one by one; tells whether the watchdog would have fired."""
    return any([watchdog.age(1.0, 1.0) for _ in range(seconds)])


def test_the_limit_is_five_minutes_or_ten_steps_and_longer_for_what_is_slow(tmp_path):
    watchdog = Watchdog(tmp_path)
    assert watchdog.limit_seconds == 1800  # the first step may compile
    for seconds in (200, 40, 40):
        assert not pass_time(watchdog, seconds)
        watchdog.mark("step")
    assert watchdog.limit_seconds == 400  # ten times the median, not the mean
    watchdog.mark("save")
    assert watchdog.limit_seconds == 2400
    watchdog.mark("saved")
    assert not pass_time(watchdog, 400)
    assert pass_time(watchdog, 1)


def test_short_steps_leave_five_minutes(tmp_path):
    watchdog = Watchdog(tmp_path)
    pass_time(watchdog, 2)
    watchdog.mark("step")
    assert watchdog.limit_seconds == 300


def test_a_process_that_was_stopped_has_not_aged(tmp_path):
    watchdog = Watchdog(tmp_path, 5.0)
    assert not watchdog.age(3600.0, 1.0)  # one nap that took an hour: SIGSTOP, a closed lid
    assert not pass_time(watchdog, 3)
    assert pass_time(watchdog, 1)


def test_evaluation_batches_are_progress(tmp_path):
    watchdog = Watchdog(tmp_path, 5.0)
    for _ in range(4):
        assert not pass_time(watchdog, 5)
        watchdog.mark("batch")


def test_a_limit_that_is_no_number_is_refused(monkeypatch):
    for text in ("soon", "-1", "nan"):
        monkeypatch.setenv("FORGE_WATCHDOG_SECONDS", text)
        with pytest.raises(ConfigError):
            read_limit()


def test_a_crash_in_native_code_leaves_its_stacks(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from forge_cli.run.watchdog import crash_stacks\n"
        "with crash_stacks(Path(sys.argv[1])): os.abort()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in (tmp_path / "crash.txt").read_text()


class Deleted:
    """Gets a signal while it is deleted, where an exception is dropped."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        len("a bytecode at which the handler runs")


def test_a_signal_in_a_finalizer_is_not_lost():
    with pytest.raises(Interrupt), SignalListener().listening():
        Deleted()
        time.sleep(5)


def test_a_held_signal_waits_for_a_good_moment_and_is_not_lost():
    reached = []
    with pytest.raises(Interrupt), SignalListener().listening(), held_signals() as deliver:
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("held")
        deliver()
        reached.append("never")
    with pytest.raises(Interrupt), SignalListener().listening(), held_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append("held to the end")
    assert reached == ["held", "held to the end"]


def test_handlers_come_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)]
    with SignalListener().listening():
        assert signal.getsignal(signal.SIGTERM) not in before
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)]
    assert after == before


def test_while_deferred_a_stop_is_noted_and_the_second_interrupt_is_not_patient():
    listener = SignalListener()
    with pytest.raises(Interrupt) as caught, listener.listening() as request, request.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        assert request.signal_number == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    assert caught.value.at_once


def test_the_first_signal_usr1_only_saves():
    with SignalListener().listening() as request, request.deferred():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (request.wants_save, request.signal_number) == (True, 0)
    with pytest.raises(Interrupt), SignalListener(stop_on_usr1=True).listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(5)
