import itertools
import os
import signal
import socket
import time

import pytest

from darkformer_jax.distributed.processes import Cluster, cluster_of_environment, cluster_of_flags, fail
from darkformer_jax.errors import UserError
from darkformer_jax.runs.metrics import read_metrics
from darkformer_jax.runs.workdir import Workdir
from tests.tiny_runs import Command, Processes, Training, free_port, metrics_without_time, tiny_flags, write_text

pytestmark = pytest.mark.standard_promotion


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("host:1", None, None), "--num_processes and --process_id missing: --coordinator, --num_processes"),
        ((None, 2, 0), "--coordinator missing"),
        (("host", 2, 0), "--coordinator=host: the form is HOST:PORT"),
        (("host:http", 2, 0), "--coordinator=host:http: the form"),
        (("host:70000", 2, 0), "with a port from 1 to 65535"),
        ((":80", 2, 0), "the form is HOST:PORT"),
        (("http://host:80", 2, 0), "the form is HOST:PORT"),
        (("host:80", 0, 0), "--num_processes=0: must be at least 1"),
        (("host:80", 2, 2), "--process_id=2: with --num_processes=2, 0 to 1"),
        (("host:80", 2, -1), "--process_id=-1"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        cluster_of_flags(*flags)


def test_who_this_is_by_flags_by_slurm_and_alone(monkeypatch):
    assert cluster_of_flags(None, None, None) is None
    assert cluster_of_flags("[::1]:8476", 4, 3) == Cluster("[::1]:8476", 4, 3)
    assert cluster_of_environment(1) is None
    slurm = {"JOB_ID": "4097", "STEP_NODELIST": "node[07-09],gpu1", "NTASKS": "6", "PROCID": "5", "LOCALID": "1"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert cluster_of_environment(1) == Cluster("node07:61441", 6, 5, [1])


def test_an_error_is_printed_without_control_characters(capsys):
    with pytest.raises(SystemExit) as exit_:
        fail("the label 'ham\n\x1b[31m'", 2)
    assert exit_.value.code == 2 and capsys.readouterr().err == "error: the label 'ham\\n\\x1b[31m'\n"


def errors(ended):
    return [[line for line in end.err.splitlines() if line.startswith("error: ")] for end in ended]


def test_what_does_not_fit_is_refused_in_every_process(tmp_path):
    """In one line each and with status 2, before anything is written."""
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    write_text(tmp_path / "here" / "text.txt")
    write_text(tmp_path / "there" / "text.txt", 5000)
    here, short = tmp_path / "here", ["--coordinator_timeout=2"]
    new = (tmp_path / f"new-{number}" for number in itertools.count())  # all at once, so each case has its own
    flags = tiny_flags(data__files="text.txt")
    cases = [  # all at once: most of them wait
        ("process 1 cannot see what process 0", Processes(2, [tmp_path / "a", tmp_path / "b"], flags, cwds=[here] * 2)),
        (
            "optimizer.learning_rate: 0.5 here, 0.003",
            Processes(2, next(new), flags, {1: ["--config.optimizer.learning_rate=.5"]}),
        ),
        ("data must be the same", Processes(2, next(new), flags, cwds=[here, tmp_path / "there"])),
        ("no file matches", Processes(2, next(new), flags, cwds=[here, tmp_path])),
        ("process 1 of 3 did not come within 2 s", Processes(3, next(new), flags + short, start=(0, 2))),
        ("Connection refused", Processes(2, next(new), flags + short, start=(1,))),
        ("two processes were started as process 1", Processes(3, next(new), flags, {2: ["--process_id=1"]})),
        ("--dry_run: true here, false in process 0", Processes(2, next(new), flags, {1: ["--dry_run"]})),
    ]
    for message, processes in cases:
        ended = processes.wait()
        status = 1 if "did not come" in message or "refused" in message else 2  # 1: it may work the next time
        assert [end.status for end in ended] == [status] * len(ended), (message, ended)
        for end, lines in zip(ended, errors(ended), strict=True):
            assert len(lines) == 1 and message in lines[0], (message, end.err)
            assert end.err.startswith("process "), end.err
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith("tmp")} == {"here", "there"}


def test_another_program_at_the_coordinators_port(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"--coordinator=127.0.0.1:{server.getsockname()[1]}"
        flags = [address, "--num_processes=2", "--process_id=0", *tiny_flags(data__files="text.txt")]
        ended = Training(tmp_path / "run", flags).wait()
    assert ended.status == 1 and "error: process 0 cannot listen on port" in ended.err.splitlines()[-1]


def two_processes(tmp_path, program, arguments=()):
    """A program as processes 0 and 1: its arguments are the coordinator's address, its number, and `arguments`."""
    (tmp_path / "program.py").write_text(program)
    address = f"127.0.0.1:{free_port()}"
    commands = []
    for number in ("0", "1"):
        (tmp_path / number).mkdir()
        commands.append(Command(str(tmp_path / "program.py"), [address, number, *arguments], tmp_path / number))
    return commands


STEPS_WITHOUT_WORK = """
import sys, time
from darkformer_jax.distributed import processes
from darkformer_jax.training.stopping import StopSignals

processes.join(processes.Cluster(sys.argv[1], 2, int(sys.argv[2])))
announce = processes.announce_stop
processes.announce_stop = lambda signum: (announce(signum), time.sleep(0.5))  # all hear of it before any asks
with StopSignals(100) as signals:
    print("ready", flush=True)
    time.sleep(1)
    for step in range(101, 2000):
        time.sleep(0.01 * (1 + int(sys.argv[2])))  # one is ahead of the other
        print(step, flush=True)
        if (signum := signals.to_stop(step)) is not None:
            print("stop", signum, flush=True)
            time.sleep(60 if len(sys.argv) > 3 else 0)
            break
processes.leave()
"""


@pytest.mark.parametrize(
    ("signum", "when", "to", "again"),
    [
        (signal.SIGINT, "105", [1], []),
        (signal.SIGHUP, "105", [0], []),
        (signal.SIGUSR1, "105", [1], []),
        (signal.SIGTERM, "105", [0, 1], ["again"]),
        (signal.SIGTERM, "ready", [0, 1], []),  # before the first step: while it compiles
    ],
)
def test_a_signal_to_one_or_all_stops_all_after_the_same_step_and_a_second_one_at_once(
    tmp_path, signum, when, to, again
):
    commands = two_processes(tmp_path, STEPS_WITHOUT_WORK, again)
    said = [[], []]

    def read(until):
        deadline = time.monotonic() + 60
        while not all(map(until, said)):
            assert time.monotonic() < deadline, [command.err.read_text() for command in commands]
            time.sleep(0.05)
            said[:] = [command.out.read_text().split() for command in commands]

    read(lambda words: when in words)
    for number in to:
        os.kill(commands[number].pid, signum)
    read(lambda words: words.count("stop") and words[-1] != "stop")
    stops = [words[words.index("stop") - 1 : words.index("stop") + 2] for words in said]
    assert stops[0] == stops[1] and stops[0][2] == str(signum.value)
    if again:
        time.sleep(0.7)  # two at the same time are one
        os.kill(commands[1].pid, signum)
        assert commands[1].wait().status == -signum
        os.kill(commands[0].pid, signal.SIGKILL)
        commands[0].wait()
    else:
        assert [command.wait().status for command in commands] == [0, 0]


A_STEP_THAT_HANGS = """
import sys, time
from darkformer_jax.distributed import processes
from darkformer_jax.training import stopping

processes.join(processes.Cluster(sys.argv[1], 2, int(sys.argv[2])))
stopping._STEP_SECONDS = 0.1
with stopping.StopSignals(0) as signals, signals.step():
    print("hangs", flush=True)
    time.sleep(100)
"""


def test_a_signal_to_one_ends_all_if_the_step_does_not_end(tmp_path):
    commands = two_processes(tmp_path, A_STEP_THAT_HANGS)
    while not all("hangs" in command.out.read_text() for command in commands):
        assert all(command.poll() is None for command in commands), commands[0].err.read_text()
        time.sleep(0.05)
    os.kill(commands[1].pid, signal.SIGTERM)
    ended = [command.wait_or_kill(60) for command in commands]
    assert [each.status for each in ended] == [143, 143]
    why = "SIGTERM: the step did not end within 0 s; the same command resumes from the last checkpoint, if any\n"
    assert ended[0].err.endswith(f"error: process 1: {why}") and ended[1].err.endswith(f"error: {why}")


FAILS_WITHOUT_A_LOG = """
import sys, time
from darkformer_jax.distributed import processes

processes.join(processes.Cluster(sys.argv[1], 2, int(sys.argv[2])))
sys.stderr = open("/dev/full", "w")
if sys.argv[2] == "1":
    processes.fail("no more space", 3)
time.sleep(60)
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_an_error_ends_all_though_the_disk_of_the_log_is_full(tmp_path):
    commands = two_processes(tmp_path, FAILS_WITHOUT_A_LOG)
    assert [command.wait().status for command in commands] == [3, 3]


def test_a_run_of_two_processes_killed_and_continued_by_one(tmp_path):
    flags = tiny_flags(num_steps=24, checkpoint__every=4, data__files=write_text(tmp_path / "text.txt"))
    Training(tmp_path / "unbroken", flags).assert_ends_well()

    killed = Processes(2, tmp_path / "run", flags)
    killed.all[0].until(10)  # step 4 is whole: the save of step 8 waited for it
    killed.all[1].stop(signal.SIGKILL)
    began = time.monotonic()
    survivor = killed.all[0].wait()
    assert survivor.status != 0 and "error: " in survivor.err and time.monotonic() - began < 60, survivor.err
    assert survivor.err.startswith("process 0 of 2\n") and not killed.all[1].step(), "process 0 alone prints progress"

    times = [line["time"] for line in read_metrics(Workdir(tmp_path / "run")) if "time" in line]
    assert {each["slowest_host"] for each in times} <= {0, 1}
    assert all(each["largest_host_seconds"] >= each["host_seconds"] > 0 for each in times)

    alone = Training(tmp_path / "run", flags)
    alone.assert_ends_well()
    (step,) = alone.resumed_from()
    assert step in (4, 8, 12, 16, 20)
    lines, expected = metrics_without_time(tmp_path / "run"), metrics_without_time(tmp_path / "unbroken")
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert line == pytest.approx(other, abs=1e-5, rel=1e-5)
