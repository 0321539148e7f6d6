"""The rows of the figure of copying."""

import types

import numpy as np
import pytest

from darkformer_jax.data.tokenizers import BytesTokenizer
from darkformer_jax.linearisation.figures import copy_batch

PASSAGES = np.arange(12, dtype=np.int32).reshape(2, 6) + 20


@pytest.mark.parametrize("adds_bos", [False, True])
def test_each_half_of_a_row_predicts_one_copy_without_its_first_token(adds_bos):
    tokenizer = types.SimpleNamespace(adds_bos=adds_bos, bos_id=BytesTokenizer.bos_id)
    batch = copy_batch(PASSAGES, tokenizer, 3)
    assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(batch, (3, 12))
    assert not batch["weights"][2].any() and not batch["segment_ids"][2].any()
    for passage, inputs, targets, weights in zip(
        PASSAGES, batch["inputs"][:2], batch["targets"][:2], batch["weights"][:2], strict=True
    ):
        for half in (slice(0, 6), slice(6, 12)):
            counted = weights[half] > 0
            np.testing.assert_array_equal(targets[half][counted], passage[1:])
            np.testing.assert_array_equal(inputs[half][counted], passage[:-1])
        read = inputs if not adds_bos else inputs[1:]
        np.testing.assert_array_equal(read, np.concatenate([passage, passage])[: len(read)])
        assert (inputs[0] == tokenizer.bos_id) == adds_bos
