import jax
import jax.numpy as jnp
import pytest

import darkformer_jax.training.goodput
from darkformer_jax.errors import UserError
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.training.goodput import SESSIONS_FILE, Stopwatch, describe, duration, goodput, read_sessions
from darkformer_jax.training.trace import PROFILE_DIRECTORY, TraceWindow


class Clock:
    """Seconds that a test sets."""

    now = 1000.0

    def __call__(self):
        return self.now

    def spend(self, watch, seconds, part, step):
        self.now += seconds
        watch.lap(part, step)


@pytest.fixture
def clock():
    return Clock()


def sessions_with_a_kill(workdir, clock):
    """200 s: 8 of start and 80 of steps to step 40, a kill, 30 s of nothing, from step 20 on to 60."""
    watch = Stopwatch(Workdir(workdir), clock)
    watch.begin(0)
    clock.spend(watch, 8, "starting", 1)
    clock.spend(watch, 80, "steps", 40)
    clock.spend(watch, 4, "saves", 40)
    watch.write()
    clock.now += 30
    watch = Stopwatch(Workdir(workdir), clock)
    watch.begin(20)
    clock.spend(watch, 6, "starting", 21)
    clock.spend(watch, 60, "steps", 60)
    clock.spend(watch, 10, "evaluation", 60)
    clock.now += 2
    watch.write()


def test_every_second_has_its_name(tmp_path, clock):
    sessions_with_a_kill(tmp_path, clock)
    sessions = read_sessions(Workdir(tmp_path))
    assert [(s["first_step"], s["last_step"]) for s in sessions] == [(0, 40), (20, 60)]
    shares = goodput(sessions)
    total = 8 + 80 + 4 + 30 + 6 + 60 + 10
    assert sum(shares.values()) == pytest.approx(1)
    expected = {
        "starting": 14,
        "steps": 40 + 60,
        "repeated": 40,
        "saves": 4,
        "evaluation": 10,
        "stopped": 30,
        "other": 0,
    }
    assert {name: share * total for name, share in shares.items()} == pytest.approx(expected)
    assert describe(sessions) == (
        "goodput: 50.5% of 3.3 min, in 2 starts, were steps that count; the rest: "
        "repeated 20.2%, stopped 15.2%, starting 7.1%, evaluation 5.1%, saves 2.0%"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (38, "38 s"),
        (59.4, "59 s"),
        (59.6, "1.0 min"),
        (3599, "1.0 h"),
        (270, "4.5 min"),
        (7560, "2.1 h"),
        (3 * 86400, "3.0 days"),
    ],
)
def test_a_duration_has_the_unit_that_people_would_choose(seconds, text):
    assert duration(seconds) == text


def test_the_account_is_kept_while_it_runs_and_a_session_without_a_step_is_none(tmp_path, clock):
    watch = Stopwatch(Workdir(tmp_path), clock)
    clock.now += 5
    watch.begin(0)
    clock.spend(watch, 3, "starting", 1)
    assert not (tmp_path / SESSIONS_FILE).exists()
    clock.spend(watch, 4, "steps", 5)  # ten seconds after it began
    assert read_sessions(Workdir(tmp_path))[0]["seconds"] == {"starting": 8, "steps": 4, "evaluation": 0, "saves": 0}
    again = Stopwatch(Workdir(tmp_path), clock)
    again.begin(5)
    clock.spend(again, 100, "evaluation", 5)
    again.write()
    assert len(read_sessions(Workdir(tmp_path))) == 1


def test_a_clock_that_jumps_back_makes_no_time_negative(tmp_path, clock):
    watch = Stopwatch(Workdir(tmp_path), clock)
    watch.begin(0)
    clock.spend(watch, 20, "steps", 10)
    clock.spend(watch, -500, "steps", 20)
    clock.spend(watch, 20, "steps", 30)
    watch.write()
    (session,) = read_sessions(Workdir(tmp_path))
    assert session["seconds"]["steps"] == 40 and session["ended"] >= session["began"]
    shares = goodput([session])
    assert min(shares.values()) >= 0 and shares["steps"] == 1


def test_steps_behind_an_older_checkpoint_are_repeated_by_whichever_session_goes_back():
    def session(first, last):
        seconds = {"starting": 0, "steps": last - first, "evaluation": 0, "saves": 0}
        return {"began": 0, "ended": last - first, "first_step": first, "last_step": last, "seconds": seconds}

    shares = goodput([session(0, 100), session(80, 85), session(60, 100)])
    assert (shares["steps"], shares["repeated"]) == pytest.approx((100 / 145, 45 / 145))


def test_a_damaged_account_is_put_aside_and_one_that_cannot_be_written_stops_nothing(tmp_path, clock, monkeypatch):
    (tmp_path / SESSIONS_FILE).write_text('{"began": 1\n')
    with pytest.raises(UserError, match=f"{tmp_path}/{SESSIONS_FILE} cannot be read: "):
        read_sessions(Workdir(tmp_path))
    watch = Stopwatch(Workdir(tmp_path), clock)
    watch.begin(0)
    clock.spend(watch, 20, "steps", 10)
    assert len(read_sessions(Workdir(tmp_path))) == 1
    assert (tmp_path / SESSIONS_FILE).with_suffix(".damaged").read_text() == '{"began": 1\n'

    def full(path, content):
        raise OSError("No space left on device")

    monkeypatch.setattr(darkformer_jax.training.goodput, "write_atomically", full)
    clock.spend(watch, 20, "steps", 20)


def test_only_the_steps_of_the_window_are_recorded(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda directory: calls.append(directory))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    for first, count, stopped_after in ((0, 3, 9), (2, 3, 9), (2, 3, 3)):
        trace = TraceWindow(Workdir(tmp_path), first, count)
        for step in range(1, stopped_after + 1):
            trace.before(step)
            calls.append(step)
            trace.after(step, jnp.ones(3))
        trace.close()
        calls.append("end")
    directory = str(tmp_path / PROFILE_DIRECTORY)
    whole = [1, directory, 2, 3, 4, "stop", *range(5, 10), "end"]
    assert calls == [*range(1, 10), "end", *whole, 1, directory, 2, 3, "stop", "end"]
