"""Random projections w_i ~ N(0, I) of positive random features, and the key that each redraw uses."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from darkformer_jax.errors import UserError
from darkformer_jax.ops.keys import key_of_seed
from darkformer_jax.ops.lowering import target_platform

ProjectionKind = Literal["iid", "orthogonal", "orthogonal_unsigned"]


def draw_projections(
    key: Array,
    num_features: int,
    dim: int,
    kind: ProjectionKind = "orthogonal",
    *,
    num_heads: int | None = None,
) -> Float[Array, "..."]:
    """Draws m random directions whose marginal law is N(0, I_dim).

    * `iid`: independent rows, the DARKFormer paper's estimator (arXiv 2603.04127, Eq. 3).
    * `orthogonal`: blocks of at most `dim` rows that are mutually orthogonal: Q of a Gaussian square's QR decomposition
      times sign(diag R), which makes Q Haar distributed, with rows rescaled to chi(dim) norms. Unbiased, and of lower
      variance than `iid` (Choromanski et al., arXiv 2009.14794).
    * `orthogonal_unsigned`: the same without the sign. LAPACK's Q is not Haar then, and the estimate of exp(q.k) biased
      (by more than 10% at q = k = 0.1 in 64 dimensions). It exists to reproduce codes that lack the sign.

    Args:
      key: a PRNG key.
      num_features: m >= 1.
      dim: size of the space that the projections live in (r), >= 1.
      kind: see above.
      num_heads: draws independent projections for each of this many key/value heads.

    Returns:
      float32 [m, dim], or [num_heads, m, dim].

    Raises:
      UserError: for an unknown kind or a size below one.
    """
    if kind not in get_args(ProjectionKind):
        raise UserError(f"projections {kind!r} are unknown; allowed: {', '.join(get_args(ProjectionKind))}")
    if num_features < 1 or dim < 1:
        raise UserError(f"num_features = {num_features} and dim = {dim}: both must be at least 1")
    if num_heads is not None:
        keys = jax.random.split(key, num_heads)
        return jax.vmap(lambda head_key: draw_projections(head_key, num_features, dim, kind))(keys)
    if kind == "iid":
        return jax.random.normal(key, (num_features, dim), jnp.float32)
    num_blocks = -(-num_features // dim)
    direction_key, norm_key = jax.random.split(key)
    gaussian = jax.random.normal(direction_key, (num_blocks, dim, dim), jnp.float32)
    q, diagonal = jax.vmap(_one_by_one(_orthonormalise))(gaussian)
    if kind == "orthogonal":
        q = q * jnp.sign(diagonal)[:, None, :]
    # Rows of a Haar matrix: where the last block is cut short, the directions that it keeps are as good as any others.
    directions = jnp.swapaxes(q, -1, -2).reshape(num_blocks * dim, dim)[:num_features]
    norms = jnp.linalg.norm(jax.random.normal(norm_key, (num_features, dim), jnp.float32), axis=-1, keepdims=True)
    return directions * norms


def _orthonormalise(square: Float[Array, "r r"]) -> tuple[Float[Array, "r r"], Float[Array, "r"]]:
    """(Q, the diagonal of R) of the QR decomposition."""
    q, r = jnp.linalg.qr(square)
    return q, jnp.diagonal(r)


def _one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, of which `vmap` makes a loop where the program is for CPUs.

    jaxlib's LAPACK calls split a batch into tasks for XLA's threads, and wait for them on one of these threads. If as
    many calls run at once as there are threads (one per core), of several devices or of one program, all wait for ever.
    A call on one matrix has no tasks to wait for.
    """
    return jax.custom_batching.sequential_vmap(function) if target_platform() == "cpu" else function


def projection_key(seed: int, layer: int | Array, epoch: int | Array) -> Array:
    """The key of layer `layer`'s projections in redraw epoch `epoch` (step // redraw_every): f(seed, layer, epoch).

    A pure function of three numbers: restoring, resharding or changing the number of devices cannot change a draw.
    """
    root = jax.random.fold_in(key_of_seed(seed), 0xDA2C)  # apart from the keys of the weights
    return jax.random.fold_in(jax.random.fold_in(root, layer), epoch)
