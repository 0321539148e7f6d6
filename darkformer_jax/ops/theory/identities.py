"""Exact rewritings of q . k with smaller norms: the kernel stays, the variance of its random features falls.

For other estimators than `dark_attention`: it takes no biases, and without them q' and k' have another kernel.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from darkformer_jax.errors import UserError
from darkformer_jax.ops.features import accumulator_dtype, matmul
from darkformer_jax.ops.second_moments import shrunk_eigh


class Identity(NamedTuple):
    """Constants of q . k = (B1 (q - mu_q)) . (B2 (k - mu_k)) + q . mu_k + mu_q . (k - mu_k), with B1^T B2 = I."""

    mu_q: Float[np.ndarray, "*layers hkv d"]
    mu_k: Float[np.ndarray, "*layers hkv d"]
    b1: Float[np.ndarray, "*layers hkv d d"]
    b2: Float[np.ndarray, "*layers hkv d d"]


class Rewritten(NamedTuple):
    """scale q . k = scale q' . k' + query_bias + key_bias."""

    q: Float[Array, "b n hq d"]
    k: Float[Array, "b n hkv d"]
    query_bias: Float[Array, "b n hq"]
    key_bias: Float[Array, "b n hkv"]


def apply_identity(
    identity: Identity, q: Float[Array, "b n hq d"], k: Float[Array, "b n hkv d"], scale: float
) -> Rewritten:
    """q' = B1 (q - mu_q), k' = B2 (k - mu_k), and what is left of the logits.

    key_bias = scale mu_q . (k - mu_k) is added to every l_i(k). query_bias = scale q . mu_k, for l_i(q), cancels where
    all of a query's keys are seen through features; where some are seen exactly (a window), it must be kept.

    Args:
      identity: of one layer; see `centring` and `balance`.
      scale: of the logits; softmax attention has d^-0.5.

    Returns:
      q' and k' in the dtype of q and k; the biases in float32 (float64 for float64).

    Raises:
      UserError: for an identity of other heads or another size than q and k have.
    """
    num_kv_heads, dim = k.shape[2:]
    if identity.b1.shape != (num_kv_heads, dim, dim):
        raise UserError(f"the identity's B1 has shape {identity.b1.shape}; expected {(num_kv_heads, dim, dim)}")
    dtype = accumulator_dtype(q.dtype)
    mu_q, mu_k, b1, b2 = (jnp.asarray(constant, dtype) for constant in identity)
    grouped = q.astype(dtype).reshape(*q.shape[:2], num_kv_heads, q.shape[2] // num_kv_heads, dim)
    query_bias = scale * matmul("bnhgd,hd->bnhg", grouped, mu_k, dtype)
    # Centred before anything is rounded to q's dtype: the mean may be most of q.
    centred_q = grouped - mu_q[None, None, :, None, :]
    centred_k = k.astype(dtype) - mu_k[None, None]
    key_bias = scale * matmul("bnhd,hd->bnh", centred_k, mu_q, dtype)
    new_q = matmul("bnhgd,hrd->bnhgr", centred_q, b1, dtype).reshape(q.shape).astype(q.dtype)
    new_k = matmul("bnhd,hrd->bnhr", centred_k, b2, dtype).astype(k.dtype)
    return Rewritten(new_q, new_k, query_bias.reshape(q.shape[:3]), key_bias)


def centring(mean_q: Float[np.ndarray, "*layers hkv d"], mean_k: Float[np.ndarray, "*layers hkv d"]) -> Identity:
    """mu_q = E[q], mu_k = E[k], B1 = B2 = I."""
    eye = np.broadcast_to(np.eye(mean_k.shape[-1]), (*mean_k.shape, mean_k.shape[-1]))
    return Identity(mean_q, mean_k, eye, eye)


def balance(
    mean_q: Float[np.ndarray, "*layers hkv d"],
    mean_k: Float[np.ndarray, "*layers hkv d"],
    covariance_q: Float[np.ndarray, "*layers hkv d d"],
    covariance_k: Float[np.ndarray, "*layers hkv d d"],
    *,
    shrinkage: float = 0.0,
    where: str = "",
) -> Identity:
    """Centring, and B1 and B2 that give queries and keys the same diagonal second moments s.

    With eigh of the covariances, M1 = Q1 L1 Q1^T of q and M2 = Q2 L2 Q2^T of k, and
    svd(L1^1/2 Q1^T Q2 L2^1/2) = U s V^T: B1 = s^1/2 U^T L1^-1/2 Q1^T, B2 = s^1/2 V^T L2^-1/2 Q2^T.

    Args:
      mean_q, mean_k: E[q] and E[k] of what `apply_identity` gets.
      covariance_q, covariance_k: M1 and M2.
      shrinkage: of M1 and M2 towards multiples of the identity, 0 to 1. The identity is exact with any; the balance is
        not.
      where: begins the message of an error, for example "layer 3".

    Raises:
      UserError: for a shrinkage outside [0, 1], and for covariances that are singular.
    """
    values1, vectors1 = shrunk_eigh(covariance_q, shrinkage, name="centred q", where=where)
    values2, vectors2 = shrunk_eigh(covariance_k, shrinkage, name="centred k", where=where)
    transposed1, transposed2 = np.swapaxes(vectors1, -1, -2), np.swapaxes(vectors2, -1, -2)
    u, s, vt = np.linalg.svd(np.sqrt(values1)[..., :, None] * (transposed1 @ vectors2) * np.sqrt(values2)[..., None, :])
    root = np.sqrt(s)[..., :, None]
    b1 = root * (np.swapaxes(u, -1, -2) @ (transposed1 / np.sqrt(values1)[..., :, None]))
    b2 = root * (vt @ (transposed2 / np.sqrt(values2)[..., :, None]))
    return Identity(mean_q, mean_k, b1, b2)
