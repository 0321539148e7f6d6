"""What a window shows of a passage, against a list of what each query sees."""

import numpy as np
import pytest

from darkformer_jax.calibration.hybrids import repeated_row
from darkformer_jax.calibration.sight import check_sight, copies_are_shown, copy_distance
from darkformer_jax.errors import UserError
from tests.tiny_specs import mixer_spec


def sees(mixer, query):
    """The tokens that a query sees one by one: its chunk up to itself, the window before the chunk, and the sinks."""
    chunk = query // mixer.chunk_size * mixer.chunk_size
    return {*range(max(0, chunk - mixer.window), query + 1), *range(min(mixer.num_sinks, query + 1))}


@pytest.mark.parametrize("num_sinks", [0, 2, 9])
@pytest.mark.parametrize("window", [8, 16])
def test_nothing_is_fitted_where_every_query_sees_every_token_before_it(window, num_sinks):
    mixer = mixer_spec(window=window, chunk_size=8, num_sinks=num_sinks)
    for context in range(1, 60):
        all_is_shown = all(sees(mixer, query) == {*range(query + 1)} for query in range(context))
        assert refused(mixer, context, 0, fits=True, chooses=False) == all_is_shown, context
        check_sight(mixer, context, 0, fits=False, chooses=False)


@pytest.mark.parametrize("begin", [0, 1])
@pytest.mark.parametrize("window", [8, 16])
def test_copying_chooses_nothing_where_every_query_sees_what_comes_next(window, begin):
    mixer = mixer_spec(window=window, chunk_size=8, num_sinks=0)
    for context in range(24, 80):
        half = len(repeated_row(np.arange(context), begin).tokens[begin:]) // 2
        assert half == copy_distance(context, begin)
        queries = begin + np.arange(half, 2 * half - 1)  # of the second copy; each predicts what followed in the first
        shown = all(query - half + 1 in sees(mixer, query) for query in queries)
        assert copies_are_shown(window, half) == shown, context
        assert refused(mixer, context, begin, fits=False, chooses=True) == shown


def test_features_alone_show_nothing():
    mixer = mixer_spec(window=0, num_sinks=0)
    check_sight(mixer, 4, 0, fits=True, chooses=True)
    assert not copies_are_shown(0, 4)


def refused(mixer, context, begin, **what):
    try:
        check_sight(mixer, context, begin, **what)
    except UserError:
        return True
    return False
