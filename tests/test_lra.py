"""From a generated benchmark to a number that another process finds again."""

import json
import subprocess
import sys

import pytest

from configs import lra
from darkformer_jax import evaluate
from darkformer_jax.config.fields import flat_fields
from darkformer_jax.config.usage import require_new_uses
from darkformer_jax.config.validation import validate
from darkformer_jax.data.listops import Scale, write_listops
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from tests.tiny_runs import run

pytestmark = pytest.mark.standard_promotion

TINY = Scale(4, 4, 4, 30, {"train": 60, "val": 20, "test": 20})


@pytest.fixture(scope="module")
def listops(tmp_path_factory):
    directory = tmp_path_factory.mktemp("lra") / "listops"
    write_listops(str(directory), TINY, seed=0)
    return directory


def test_a_test_figure_is_the_same_bit_for_bit_in_another_process(listops, tmp_path):
    config = lra.get_config(f"task=listops,files={listops},attention=dark,m=16,batch=8,steps=3")
    config.update_from_flattened_dict({"model.num_layers": 1, "sequence_length": 64, "eval.batch_size": 8})
    run(config, tmp_path / "run")
    flags = [f"--workdir={tmp_path / 'run'}", f"--text={listops / 'basic_test.tsv'}"]
    here = evaluate.evaluate(evaluate.parse_flags(["evaluate", *flags]))
    command = [sys.executable, "-m", "darkformer_jax.evaluate", *flags, f"--json={tmp_path / 'there.json'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    there = json.loads((tmp_path / "there.json").read_text())
    assert here["examples"] == 20 and here["cut_share"] == 0
    for name in ("loss", "accuracy", "confusion"):
        assert here[name] == there[name]


@pytest.mark.parametrize("scale", lra.SCALES)
@pytest.mark.parametrize("task", lra.TASKS)
@pytest.mark.parametrize("kind", [kind for kind in MIXERS if MIXERS[kind].bidirectional])
def test_every_mechanism_that_sees_both_sides_has_the_same_model_around_it(task, scale, kind):
    config, plain = (lra.get_config(f"task={task},scale={scale}{more}") for more in (f",attention={kind}", ""))
    validate(config)
    assert not config.model.causal and config.task.heldout_files.startswith(f"data/{task}/")
    around, same = (
        {name: value for name, value in flat_fields(c.to_dict()) if not name.startswith("model.attention.")}
        for c in (config, plain)
    )
    assert around == same


@pytest.mark.parametrize(
    ("task", "sizes", "recipe"),
    [
        ("listops", (4, 512, 8, 512, 1024), (32, 5000, 1000, 1.6e-3, 0.1)),
        ("cifar10", (1, 128, 8, 64, 128), (256, 35_000, 175, 5e-4, 0.0)),
    ],
)
def test_scale_paper_has_the_sizes_of_the_official_code(task, sizes, recipe):
    config = lra.get_config(f"task={task},scale=paper")
    m, o = config.model, config.optimizer
    assert (m.num_layers, m.embed_dim, m.num_heads, m.num_heads * m.head_dim, m.mlp_dim) == sizes
    assert m.num_kv_heads == m.num_heads
    assert (config.batch_size, config.num_steps, o.warmup_steps, o.learning_rate, o.weight_decay) == recipe


@pytest.mark.parametrize("kind", [kind for kind in MIXERS if MIXERS[kind].bidirectional])
def test_a_mechanism_for_texts_up_to_a_length_is_for_the_length_that_is_asked_for(kind):
    config = lra.get_config(f"task=listops,length=256,attention={kind}")
    validate(config)
    require_new_uses(config, ["sequence_length", "model.attention.kind"])
    assert config.model.attention.horizon == (256 if "horizon" in MIXERS[kind].uses else 0)


@pytest.mark.parametrize("arguments", ["scale=large", "scale=small,scale=paper", "task=imdb", "window=64", "task="])
def test_arguments_that_it_does_not_have_are_refused(arguments):
    with pytest.raises(UserError, match=r"configs/lra.py"):
        lra.get_config(arguments)
