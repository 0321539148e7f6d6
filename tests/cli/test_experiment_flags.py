"""What the flags of verbs that take a config mean."""

import pytest

from tests.tiny_runs import run_commands

pytestmark = pytest.mark.standard_promotion


def test_a_whole_number_may_be_written_as_1e3_or_1_000_with_or_without_an_equals_sign(tmp_path):
    flags = [
        f"--workdir={tmp_path}/new",
        "--config.num_steps=1e3",
        "--config.batch_size",
        "1_6",
        "--config.model.mlp_dim=3e2",
        "--coordinator_timeout=1e2",
    ]
    (shown,) = run_commands([("train.py", ["--dry_run", *flags])])
    assert shown.status == 0, shown.err
    assert "steps          1,000\n" in shown.out and "= 16 x 256\n" in shown.out


def test_the_warm_up_of_an_experiment_fits_a_shorter_run_unless_it_is_given(tmp_path):
    short, one, given, none = run_commands(
        [
            ("train.py", ["--dry_run", f"--workdir={tmp_path}/new", *flags])
            for flags in (
                ["--config.num_steps=6"],
                ["--config.num_steps=1"],
                ["--config.num_steps=6", "--config.optimizer.warmup_steps=7"],
                ["--config.num_steps=0"],
            )
        ]
    )
    assert short.status == 0 and "note: optimizer.warmup_steps = 1, because num_steps = 6\n" in short.err, short.err
    assert one.status == 0 and "note: optimizer.warmup_steps = 0, because num_steps = 1\n" in one.err, one.err
    assert given.status == 2 and "warmup_steps = 7 is not shorter than num_steps = 6" in given.err
    assert none.status == 2 and none.err == "error: num_steps = 0: must be at least 1\n"


def test_arguments_of_an_experiment_that_has_none_are_refused_in_words_and_h_is_help():
    refused, helped = run_commands(
        [("train.py", ["--config=configs/quickstart.py:steps=5", "--dry_run"]), ("train.py", ["-h"])]
    )
    assert refused.status == 2 and refused.err == (
        "error: --config=configs/quickstart.py takes no arguments after a colon; --config.<field>=<value> sets one\n"
    )
    assert helped.status == 0 and "experiments:" in helped.out


def test_without_any_flag_it_is_the_quickstart_in_its_own_directory(tmp_path):
    (tmp_path / "runs").write_text("not a directory, so that nothing is trained here")
    (ended,) = run_commands([("darkformer_jax.train", [])], cwd=tmp_path)
    assert ended.status == 2 and "runs/quickstart" in ended.err, ended.err


def test_a_flag_is_no_value_of_the_text_flag_before_it(tmp_path):
    texts = ("--workdir", "--config.init_from", "--config.sample.prompts")
    commands = [("darkformer_jax.train", [flag, "--dry_run"]) for flag in texts]
    for ended, flag in zip(run_commands(commands, cwd=tmp_path), texts, strict=True):
        assert ended.status == 2, ended.err
        assert ended.err == f"error: {flag} --dry_run: {flag} has no value; to give this one, write {flag}=--dry_run\n"
    assert not list(tmp_path.iterdir())
