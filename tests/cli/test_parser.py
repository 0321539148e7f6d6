"""What every verb's command line does with signals."""

import os
import signal

import pytest

from darkformer_jax.cli.parser import one_line_errors
from darkformer_jax.cli.progress import progress_bar
from darkformer_jax.data.progress import with_progress
from darkformer_jax.errors import UserError


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_ends_a_verb_with_one_line_and_its_status(number, capsys):
    before = signal.signal(number, signal.SIG_DFL)  # a background job of a shell ignores SIGINT
    try:
        with pytest.raises(SystemExit) as ended, one_line_errors("nothing was written"):
            os.kill(os.getpid(), number)
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err == "error: interrupted; nothing was written\n"


def test_a_signal_that_is_ignored_stays_ignored_as_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with one_line_errors("nothing was written"):
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_error_between_two_items_of_a_bar_has_a_line_of_its_own(capsys):
    def damaged(item):
        raise UserError(f"{item} is damaged")

    items = with_progress(["a", "b"], "run", progress_bar)
    with pytest.raises(SystemExit), one_line_errors("nothing was written"):
        damaged(next(items))
    assert capsys.readouterr().err.splitlines()[-1] == "error: a is damaged"
