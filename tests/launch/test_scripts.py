"""What holds for every launch script. shellcheck runs in .ci/run."""

import subprocess

from tests.launch.shell import NASTY, ROOT, bare_path, launch, refusal

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


def test_every_script_parses():
    assert {"tpu.sh", "worker.sh", "slurm.sh", "gke.sh", "install.sh"} <= {script.name for script in SCRIPTS}
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", script], check=True)


def test_help_has_every_flag_that_is_allowed():
    for script, commands in [
        ("tpu.sh", ["create", "setup", "run", "follow", "stop", "kill", "retry", "delete"]),
        ("slurm.sh", []),
        ("gke.sh", ["run", "follow", "delete"]),
    ]:
        shown = launch(script, "--help")
        assert (shown.returncode, shown.stderr) == (0, "")
        for command in [[name] for name in commands] or [[]]:
            refused = refusal(script, *command, "--nonsense=1")
            assert "--nonsense: there is no such flag here; allowed: --" in refused
            for flag in refused.partition("allowed: ")[2].partition(" --help")[0].split():
                assert flag in shown.stdout, (script, command, flag)


def test_quoted_words_read_back_as_they_were():
    program = '. "$0"/launch/common.sh; eval "words=($(quoted "$@"))"; printf "%s\\0" "${words[@]}"'
    words = [*NASTY, "", "'", "''a'", "plain-word_1.2:/=,@%+", " ", "--x=~", "!!", "a\\"]
    done = subprocess.check_output(["bash", "-c", program, str(ROOT), *words], env={"PATH": bare_path()}, text=True)
    assert done.split("\0")[:-1] == words
