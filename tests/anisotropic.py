"""Queries and keys like a pretrained model's, for tests of what is made from their moments."""

import numpy as np

from darkformer_jax.calibration.moments import Moments

HEADS, KV_HEADS, DIM = 4, 2, 6
SCALE = DIM**-0.5


def tokens(seed=0):
    """q and k of anisotropic laws of their own, with means."""
    random = np.random.default_rng(seed)
    q, k = random.standard_normal((2, 3, 40, HEADS, DIM))
    mix_q, mix_k = random.standard_normal((2, DIM, DIM)) / 2
    mean_q, mean_k = random.standard_normal((2, DIM))
    return q @ mix_q + mean_q, (k @ mix_k + mean_k)[:, :, :KV_HEADS]


Q, K = tokens()
MOMENTS = Moments.of(Q, K)
