"""What commands do where their output cannot be written."""

import os
import sys

import pytest

from darkformer_jax.__main__ import verbs
from darkformer_jax.cli.parser import one_line_errors
from tests.tiny_runs import ROOT, run_commands

# Loses its output in the way that the first argument names, and becomes the command of the others.
LOSES_OUTPUT = """
import os, runpy, sys

how, module, *sys.argv[1:] = sys.argv[1:]
if how == "pipe":
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
elif how == "full":
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
else:
    os.close(1)
    sys.stdout = None  # as Python begins where it is closed
for imported in (module, "torch"):  # that the tests' driver has
    sys.modules.pop(imported, None)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
ENDS = {
    "pipe": (141, "", ""),
    "full": (2, "", "error: the output cannot be written: No space left on device\n"),
    "closed": (0, "", ""),
}


@pytest.mark.parametrize("how", ENDS)
def test_a_command_whose_output_is_lost_ends_in_words(how, tmp_path):
    if how == "full" and not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    script = tmp_path / "loses_output.py"
    script.write_text(LOSES_OUTPUT)
    modules = ["darkformer_jax", *(f"darkformer_jax.{verb}" for verb in verbs())]
    commands = [[module, "--help"] for module in modules] + [["darkformer_jax", "--version"]]
    ended = run_commands([(str(script), [how, *command]) for command in commands], cwd=ROOT)
    for command, end in zip(commands, ended, strict=True):
        assert end == ENDS[how], command


def test_a_verb_whose_stdout_is_closed_ends_well(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with one_line_errors("nothing was written"):
        print("its work is done")
