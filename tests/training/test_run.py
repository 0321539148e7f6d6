"""Which fields of a command line a run accepts; `test_train.py` covers the rest."""

import pytest

from darkformer_jax.cli.progress import Progress
from darkformer_jax.errors import UserError
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.training.run import dry_run, train
from tests.tiny_runs import tiny_config

UNUSED = ["model.attention.num_features"]


def test_a_field_that_no_layer_uses_is_refused_in_a_new_run_only(tmp_path):
    config = tiny_config(model__attention__kind="softmax", data__files="nowhere.txt")
    workdir, progress = Workdir(tmp_path / "run"), Progress(1, 1)
    config.model.attention.num_features = 8
    with pytest.raises(UserError, match=r"^model.attention.num_features = \d+: no softmax layer uses it$"):
        dry_run(config, UNUSED)
    with pytest.raises(UserError, match="no softmax layer uses it"):
        train(config, workdir, progress, UNUSED)
    workdir.write_config(config.to_dict())
    with pytest.raises(UserError, match=r"nowhere.txt"):  # the data is what comes after
        train(config, workdir, progress, UNUSED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh__data": 3}, "does not fit the 1 devices"),
        ({"mesh__context": 3}, "does not fit the 1 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_the_data_is_read(tmp_path, changes, message):
    config = tiny_config(data__files="nowhere.txt", **changes)
    with pytest.raises(UserError, match=message):
        train(config, Workdir(tmp_path / "run"), Progress(1, 1))
