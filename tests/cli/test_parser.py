"""What every verb's command line does with signals."""

import os
import signal

import pytest

from darkformer_jax.cli.parser import one_line_errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
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
