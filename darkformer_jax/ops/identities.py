"""Exact rewritings of q . k with smaller norms: the kernel stays, the variance of its random features falls.

For estimators of your own: `dark_attention` takes no biases, and without them q' and k' have another kernel.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from darkformer_jax.errors import UserError
from darkformer_jax.ops.features import accumulator_dtype, matmul


class Identity(NamedTuple):
    """Constants of q . k = (B1 (q - mu_q)) . (B2 (k - mu_k)) + q . mu_k + mu_q . (k - mu_k), with B1^T B2 = I."""

    mu_q: Float[np.ndarray | Array, "hkv d"]
    mu_k: Float[np.ndarray | Array, "hkv d"]
    b1: Float[np.ndarray | Array, "hkv d d"]
    b2: Float[np.ndarray | Array, "hkv d d"]


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
      identity: of one layer; see `calibration.geometry.centring` and `balance`.
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
