"""`linear_attention`: linear attention with any positive feature map, for use in any JAX model."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from darkformer_jax.errors import UserError
from darkformer_jax.ops.attend import Options, as_arrays, attend, check_inputs, check_options
from darkformer_jax.ops.decay import check_log_decay
from darkformer_jax.ops.features import FeatureMap, log_elu_plus_one
from darkformer_jax.ops.linear import Kernel, KernelArrays
from darkformer_jax.ops.state import AttentionState, init_state

__all__ = ["init_state", "linear_attention"]


def linear_attention(
    q: Float[Array, "b n hq d"],
    k: Float[Array, "b n hkv d"],
    v: Float[Array, "b n hkv dv"],
    *,
    feature_map: FeatureMap = log_elu_plus_one,
    feature_arrays: Any = None,
    causal: bool = True,
    segment_ids: Int[Array, "b n"] | None = None,
    log_decay: Float[Array, "hkv"] | Float[Array, "b n hkv"] | None = None,
    chunk_size: int = 128,
    state: AttentionState | None = None,
    return_state: bool = False,
    sequence_axis: str | None = None,
) -> Any:
    """Attention with the kernel phi(q) . phi(k) of a feature map phi with m positive features, in O(n m) time.

        out_n = sum_j phi(q_n) . phi(k_j) v_j / sum_j phi(q_n) . phi(k_j)

    The map is given in log space and its exponentials are taken relative to maxima: they neither overflow nor
    underflow, and the denominator needs no epsilon (docs/attention.md).

    Args:
      q, k, v: as in `dark_attention`. The map gets them as they are: its scale is 1.
      feature_map: log phi of one head; see `ops.features.FeatureMap`. The default is phi(x) = elu(x) + 1 of the linear
        transformer (Katharopoulos et al., arXiv 2006.16236), with m = d. Static under jit.
      feature_arrays: what `feature_map` reads besides x: a pytree whose leaves have the key/value heads in front.
      causal, segment_ids, log_decay, state, return_state, sequence_axis: as in `dark_attention`.
      chunk_size: tokens per chunk. It changes only the cost.

    Returns:
      out [b, n, hq, dv] in v's dtype, or (out, state).

    Raises:
      UserError: for shapes or options that do not fit together.
    """
    options = Options.of(causal, chunk_size, 0, 0, return_state, sequence_axis, "scan")
    q, k, v, segment_ids = as_arrays(q, k, v, segment_ids)
    feature_arrays, state = jax.tree.map(jnp.asarray, (feature_arrays, state))
    check_inputs(q, k, v, segment_ids)
    check_options(q, options, log_decay, state)
    if log_decay is not None:
        check_log_decay(log_decay, k, segment_ids)
    num_kv_heads = k.shape[2]
    for path, leaf in jax.tree_util.tree_leaves_with_path(feature_arrays):
        if jnp.shape(leaf)[:1] != (num_kv_heads,):
            raise UserError(
                f"feature_arrays{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}; "
                f"its first axis must be the {num_kv_heads} key/value heads"
            )
    kernel = Kernel(KernelArrays(feature_arrays), feature_map, scale=1.0)
    return attend(kernel, q, k, v, segment_ids, log_decay, state, options)
