import fcntl
import io
import os
import pty
import select
import struct
import termios
from collections.abc import Iterator
from typing import TextIO

import pytest

from darkformer_jax.cli.progress import Progress, progress_bar
from darkformer_jax.data.progress import ProgressBar


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal:
    """A pseudo-terminal with a window of a given width."""

    def __init__(self, columns: int) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream: TextIO = os.fdopen(slave, "w")

    def shown(self, end: str) -> str:
        """All that was written, which must end with `end`; the terminal hands it over in pieces."""
        text = ""
        while not text.endswith(end) and select.select([self.master], [], [], 5)[0]:
            text += os.read(self.master, 100_000).decode()
        return text

    def close(self) -> None:
        self.stream.close()
        os.close(self.master)


@pytest.fixture
def wide() -> Iterator[Terminal]:
    terminal = Terminal(120)
    yield terminal
    terminal.close()


def test_terminal_shows_one_live_line(wide: Terminal) -> None:
    clock = Clock()
    progress = Progress(1000, 10, wide.stream, clock)
    progress.update(20, 3.0, 999.6, None, 2**30)
    clock.now = 23.0
    progress.update(120, 2.3449, 12_345.0, 0.031, int(1.2 * 2**30))
    progress.close()
    assert wide.shown("\r\n") == (
        "\r\x1b[Kstep 20/1000  loss 3.000  1.00k tok/s  memory 1.0 GiB  eta --:--"
        "\r\x1b[Kstep 120/1000  loss 2.345  12.3k tok/s  mfu 3.1%  memory 1.2 GiB  eta 03:22"
        "\r\n"
    )


def test_a_note_stays_above_the_live_line(wide: Terminal) -> None:
    progress = Progress(10, 1, wide.stream)
    progress.update(1, 2.0, 50.0, None, 2**30)
    progress.note("held out: 1.9 bits per byte")
    progress.close()
    line = "step 1/10  loss 2.000  50.0 tok/s  memory 1.0 GiB  eta --:--"
    assert wide.shown(f"{line}\r\n") == f"\r\x1b[K{line}\r\x1b[Kheld out: 1.9 bits per byte\r\n{line}\r\n"


@pytest.mark.parametrize("columns", [2, 12, 24, 40, 60, 75, 76, 200])
def test_the_line_never_fills_the_window(columns: int) -> None:
    terminal = Terminal(columns)
    progress = Progress(1000, 10, terminal.stream, Clock())
    progress.update(120, 2.345, 12_345.0, 0.031, 2**30)
    progress.close()
    shown = terminal.shown("\r\n").removeprefix("\r\x1b[K").removesuffix("\r\n")
    assert len(shown) < columns
    assert shown == "step 120/1000"[: columns - 1] or shown.startswith("step 120/1000  loss 2.345")
    assert ("mfu" in shown) == (columns >= 76)  # the whole line has 75 characters
    terminal.close()


def test_elsewhere_plain_lines_every_log_every_steps_and_at_the_end() -> None:
    stream = io.StringIO()
    clock = Clock()
    progress = Progress(25, 10, stream, clock)
    for step in range(1, 26):
        clock.now = float(step)
        progress.update(step, 2.0, 2.5e6, None, 2**30)
    progress.note("saved")
    progress.close()
    assert stream.getvalue().splitlines() == [
        "step 10/25  loss 2.000  2.50M tok/s  memory 1.0 GiB  eta 00:15",
        "step 20/25  loss 2.000  2.50M tok/s  memory 1.0 GiB  eta 00:05",
        "step 25/25  loss 2.000  2.50M tok/s  memory 1.0 GiB  eta 00:00",
        "saved",
    ]


def test_a_speed_that_is_not_known_is_left_out() -> None:
    stream = io.StringIO()
    Progress(9, 1, stream, Clock()).update(1, 2.0, None, None, 2**30)
    assert stream.getvalue() == "step 1/9  loss 2.000  memory 1.0 GiB  eta --:--\n"


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "00:00"), (59.6, "01:00"), (201, "03:21"), (36_000, "10:00:00")])
def test_time_left(seconds: float, text: str) -> None:
    stream = io.StringIO()
    clock = Clock()
    progress = Progress(101, 1, stream, clock)
    progress.update(99, 2.0, 1.0, None, 0)
    clock.now = seconds
    progress.update(100, 2.0, 1.0, None, 0)
    assert stream.getvalue().splitlines()[-1].endswith(f"eta {text}")


@pytest.mark.parametrize("make", [progress_bar, Progress(9, 1).bar])
def test_work_without_a_total_shows_its_time(make: ProgressBar, capsys: pytest.CaptureFixture[str]) -> None:
    make(None, "s", "training the tokenizer").close()
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.split("\r")[-1] == "training the tokenizer: 00:00\n"
