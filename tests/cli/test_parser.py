"""What every verb's command line does with signals and with flags that it does not know."""

import os
import signal

import pytest

from darkformer_jax.cli.parser import Parser, one_line_errors
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


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--promt=hi"], "arguments are required: --prompt; --promt is none of its flags; did you mean --prompt?"),
        (["--prompt=hi", "--sed", "1"], "error: unrecognized arguments: --sed 1; did you mean --seed?"),
        (["--prompt=hi", "seed=1"], "error: unrecognized arguments: seed=1; did you mean --seed?"),
        ([], "arguments are required: --prompt"),
    ],
)
def test_a_misspelt_flag_is_named_with_the_one_that_was_meant(given, said, capsys):
    parser = Parser("generate", None)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--seed")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(given)
    assert ended.value.code == 2
    assert capsys.readouterr().err.removeprefix("error: the following ") == f"{said} (--help lists the flags)\n"
