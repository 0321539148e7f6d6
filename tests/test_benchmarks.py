import numpy as np

from benchmarks.learning import FAR, REPEATED, Result, Run, ngram_bits, repeat_distance, table
from darkformer_jax.data import Data
from darkformer_jax.data.stream import memory_stream
from darkformer_jax.data.tokenizers import BytesTokenizer


def test_a_repeat_is_found_in_its_own_document_only():
    text = np.arange(REPEATED + 3)  # no token twice
    filler = np.arange(1000, 1000 + FAR)
    tokens = np.concatenate([text, filler, text])
    last = len(tokens) - 2
    one_document = np.ones(len(tokens) - 1, np.int32)
    found = repeat_distance(tokens, one_document)
    assert found[last] == len(text) + FAR
    assert np.flatnonzero(found).tolist() == list(range(last - 3, last + 1))  # the first that ends REPEATED known ones
    two_documents = one_document.copy()
    two_documents[len(text) + FAR :] = 2
    assert not repeat_distance(tokens, two_documents).any()


def test_the_table_shows_the_best_learning_rate_by_the_mean_over_seeds():
    def run(rate, seed):
        return Run("dark", "", rate, 0.1, 10, seed, 1)

    def result(bits):
        return Result(bits, 0.5, 1.0, [1.0, 2.0, 3.0, 4.0], 1.0, 2.0, 3.0)

    lines = table(
        {run(1e-3, 0): result(2.0), run(1e-3, 1): result(2.2), run(1e-2, 0): result(1.9), run(1e-2, 1): result(9)}
    )
    assert len(lines.splitlines()) == 3
    assert "| 0.001 of 0.001, 0.01 | 2.100 ± 0.141 |" in lines


def test_ngram_bits_of_a_text_that_its_last_byte_decides():
    texts = ["ab" * 200], ["ab" * 50]
    train, heldout = (memory_stream(part, BytesTokenizer()) for part in texts)
    data = Data(train, heldout, BytesTokenizer(), None)
    assert 0.9 < ngram_bits(data, 0) < 1.3
    assert ngram_bits(data, 1) < 0.2
