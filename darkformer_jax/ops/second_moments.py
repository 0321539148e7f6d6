"""Eigenvalues of second moments of queries and keys, and errors that name layer and head."""

import numpy as np
from jaxtyping import Float

from darkformer_jax.errors import UserError


def shrunk_eigh(
    second: Float[np.ndarray, "*heads d d"], shrinkage: float, *, name: str, where: str = ""
) -> tuple[Float[np.ndarray, "*heads d"], Float[np.ndarray, "*heads d d"]]:
    """Eigenvalues (ascending, positive) and eigenvectors (columns) of (1 - a) S + a (tr S / d) I.

    Args:
      second: S, symmetric.
      shrinkage: a in [0, 1]; 1 gives a multiple of the identity.
      name: what S is the second moment of, for errors.
      where: begins the message of an error, for example "layer 3".

    Raises:
      UserError: for a shrinkage outside [0, 1], and where an eigenvalue is not larger than rounding errors.
    """
    if not 0 <= shrinkage <= 1:
        raise UserError(f"shrinkage = {shrinkage} must be between 0 and 1")
    dim = second.shape[-1]
    values, vectors = np.linalg.eigh(second)
    values = (1 - shrinkage) * values + shrinkage * np.mean(values, axis=-1, keepdims=True)
    # Below this share of the largest, an eigenvalue is the rounding of float32 data.
    smallest_share = dim * np.finfo(np.float32).eps ** 2
    for index in np.ndindex(values.shape[:-1]):
        smallest, largest = values[index][0], values[index][-1]
        if not smallest > smallest_share * largest:
            raise UserError(
                f"{head_name(index, where)}the second moment of {name} is singular: its smallest eigenvalue is "
                f"{smallest:.3g}, its largest {largest:.3g}; calibrate on more varied text, or with shrinkage > 0"
            )
    return values, vectors


def head_name(index: tuple[int, ...], where: str = "") -> str:
    """How an error begins: "layer 3, head 1: " for the place (1,) with where = "layer 3", or for (3, 1)."""
    names = [where] if where else []
    if len(index) > 1:
        names.append(f"layer {index[-2]}")
    if index:
        names.append(f"head {index[-1]}")
    return ", ".join(names) + ": " if names else ""
