import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from darkformer_jax.training.stopping import StopSignals
from tests.tiny_runs import ROOT, Command

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_is_remembered_and_handlers_are_put_back(signum):
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopSignals(0) as signals:
        assert signals.to_stop(1) is None
        os.kill(os.getpid(), signum)
        assert signals.to_stop(2) == signum
    assert [signal.getsignal(each) for each in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_hangup_that_the_run_was_started_to_ignore_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals(0) as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.to_stop(1) is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert signals.to_stop(2) == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_ends_the_process_at_once_unless_it_is_a_hangup(tmp_path):
    (tmp_path / "program.py").write_text("""
import os, signal, threading, time
from darkformer_jax.training.stopping import StopSignals
with StopSignals(0) as signals:
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals.received == signal.SIGTERM
    os.kill(os.getpid(), signal.SIGTERM)  # its echo, as from `timeout`
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(0.7)
    print("remembered", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("still there", flush=True)
""")
    ended = Command(str(tmp_path / "program.py"), [], tmp_path).wait()
    assert ended.out == "remembered\n"
    assert ended.status == -signal.SIGINT


# The main thread waits for ever where Python runs no handlers, as it does in jax: for a lock that it has itself.
HANGS = """
import ctypes, sys, time
from darkformer_jax.training import stopping

stopping._STEP_SECONDS, first_steps = float(sys.argv[1]), int(sys.argv[2])
lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)
with stopping.StopSignals(0) as signals:
    for step in range(first_steps):
        with signals.step():
            time.sleep(0.4)
    with signals.step():
        lock(mutex)
        print("hangs", flush=True)
        lock(mutex)
"""


@pytest.mark.parametrize(
    ("seconds", "first_steps", "sent", "why"),
    [
        (0.1, 0, [signal.SIGTERM], "the step did not end within 0 s"),
        (0.1, 1, [signal.SIGUSR1], "the step did not end within 2 s"),  # four times the longest so far
        (60, 0, [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], "the second signal"),
    ],
)
def test_a_step_that_never_ends_is_ended_by_a_signal(tmp_path, seconds, first_steps, sent, why):
    (tmp_path / "program.py").write_text(HANGS)
    child = Command(str(tmp_path / "program.py"), [str(seconds), str(first_steps)], tmp_path)
    while "hangs" not in child.out.read_text():
        assert child.poll() is None, child.wait().err
        time.sleep(0.05)
    for signum in sent:
        os.kill(child.pid, signum)
        time.sleep(0.7)  # two at the same time are one
    ended = child.wait_or_kill(30)
    assert ended.status == 128 + sent[-1]
    answered = f"\n{sent[0].name}: the run ends after this step and saves it; a second signal ends it at once\n"
    ending = f"\nerror: {sent[-1].name}: {why}; the same command resumes from the last checkpoint, if any\n"
    assert ended.err == answered + ending


ON_A_TERMINAL = """
import fcntl, pathlib, sys, termios, time
from darkformer_jax.training.stopping import StopSignals

fcntl.ioctl(0, termios.TIOCSCTTY, 0)
with StopSignals(0) as signals:
    print("ready", flush=True)
    while not signals.to_stop(1):
        time.sleep(0.01)
    time.sleep(0.5)  # the second hangup comes
    print("saving", flush=True)
    print("saving", file=sys.stderr, flush=True)
    pathlib.Path(sys.argv[1]).touch()
"""


def test_a_run_whose_terminal_closes_still_saves(tmp_path):
    terminal, its_end = pty.openpty()
    command = [sys.executable, "-c", ON_A_TERMINAL, str(tmp_path / "saved")]
    streams = {"stdin": its_end, "stdout": its_end, "stderr": its_end}
    child = subprocess.Popen(command, **streams, cwd=ROOT, start_new_session=True)
    os.close(its_end)
    said = b""
    while b"ready" not in said:
        said += os.read(terminal, 1000)
    os.close(terminal)  # which sends the first hangup; a shell that ends sends another
    time.sleep(0.2)
    child.send_signal(signal.SIGHUP)
    assert child.wait(timeout=60) == 0
    assert (tmp_path / "saved").exists()
