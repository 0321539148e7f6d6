"""What the flags of verbs that take a config mean."""

import pytest

from tests.tiny_runs import run_commands

pytestmark = pytest.mark.standard_promotion


def test_a_whole_number_may_be_written_as_1e3_or_1_000_with_or_without_an_equals_sign():
    flags = [
        "--config.num_steps=1e3",
        "--config.batch_size",
        "1_6",
        "--config.model.mlp_dim=3e2",
        "--coordinator_timeout=1e2",
    ]
    (shown,) = run_commands([("train.py", ["--dry_run", *flags])])
    assert shown.status == 0, shown.err
    assert "steps          1,000\n" in shown.out and "= 16 x 256\n" in shown.out
