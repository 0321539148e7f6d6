"""What somebody may have meant by a name that is no field's."""

import pytest

from darkformer_jax.config.base import fields
from darkformer_jax.config.names import _ELSEWHERE, _NOTHING, meant


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("optimizer.lr", "optimizer.learning_rate"),
        ("lr", "optimizer.learning_rate"),
        ("model.d_model", "model.embed_dim"),
        ("model.hidden_size", "model.embed_dim"),
        ("n_layer", "model.num_layers"),
        ("model.attention.n_layers", "model.num_layers"),
        ("num_layers", "model.num_layers"),
        ("n_head", "model.num_heads"),
        ("model.attention.heads", "model.num_heads"),
        ("max_steps", "num_steps"),
        ("batch", "batch_size"),
        ("bs", "batch_size"),
        ("batch_size", "batch_size"),
        ("seq_len", "sequence_length"),
        ("data.max_length", "sequence_length"),
        ("model.context_length", "sequence_length"),
        ("vocab_size", "model.vocab_size"),
        ("learning-rate", "optimizer.learning_rate"),
        ("optimizer.LR", "optimizer.learning_rate"),
        ("eval.steps", "eval.every"),
        ("log.interval", "log.every"),
        ("num_step", "num_steps"),
        ("model.attention.king", "model.attention.kind"),
        ("num_layer", "model.num_layers"),
    ],
)
def test_a_name_is_known_from_other_libraries_at_another_level_or_by_its_spelling(name, field):
    assert meant(name) == f"did you mean --config.{field}?"


def test_several_fields_of_one_name_are_all_named():
    assert meant("every") == "did you mean --config.eval.every, --config.checkpoint.every or --config.log.every?"
    assert meant("steps") == "did you mean --config.num_steps or --config.profile.steps?"


@pytest.mark.parametrize("name", ["dropout", "model.dropout", "model.attention.attention_dropout"])
def test_what_there_is_nothing_of_is_said_to_be_missing(name):
    assert meant(name).startswith("there is no dropout here; ")


@pytest.mark.parametrize("name", ["epochs", "num_epochs", "optimizer.num_train_epochs"])
def test_epochs_are_steps(name):
    assert "--config.num_steps" in meant(name) and "?" not in meant(name)


def test_nothing_is_guessed_of_a_name_that_is_like_no_field():
    assert meant("xyzzy") == ""


def test_the_tables_name_fields_that_exist_and_no_name_twice():
    assert set(_ELSEWHERE) <= fields().keys()
    names = [name for group in _ELSEWHERE.values() for name in group.split()] + list(_NOTHING)
    assert len(names) == len(set(names))
    assert not _NOTHING.keys() & {field.rpartition(".")[2] for field in fields()}
    assert all(meant(field) == f"did you mean --config.{field}?" for field in fields())
