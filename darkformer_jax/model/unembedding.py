"""The last matrix of a language model: from the output of the final norm to logits."""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@functools.partial(jax.tree_util.register_dataclass, data_fields=["matrix"], meta_fields=["dtype", "softcap"])
@dataclasses.dataclass(frozen=True)
class Unembedding:
    """x -> the logits x E^T, soft-capped. A pytree, whose one array is the matrix.

    Attributes:
      matrix: E, in the dtype in which it is stored.
      dtype: in which it is multiplied; the products are summed in float32.
      softcap: c of c tanh(logits / c); 0 = none.
    """

    matrix: Float[Array, "vocab embed"]
    dtype: str
    softcap: float

    def logits(self, x: Float[Array, "... embed"]) -> Float[Array, "... vocab"]:
        """The soft-capped logits in float32."""
        return self.capped(multiply(x, self.matrix.astype(self.dtype)))

    def with_matrix(self, matrix: Float[Array, "vocab embed"]) -> Self:
        """The same with another matrix, such as this one's gradient."""
        return dataclasses.replace(self, matrix=matrix)

    def capped(self, products: Float[Array, "... vocab"]) -> Float[Array, "... vocab"]:
        """The logits of the products x E^T."""
        return self.softcap * jnp.tanh(products / self.softcap) if self.softcap else products


def multiply(x: Float[Array, "... embed"], matrix: Float[Array, "vocab embed"]) -> Float[Array, "... vocab"]:
    """x E^T in float32."""
    return jnp.einsum("...d,vd->...v", x, matrix, preferred_element_type=jnp.float32)
