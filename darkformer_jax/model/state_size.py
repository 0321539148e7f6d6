"""How large the state of a layer is in decoding: a key/value cache grows with the length, a far state does not."""

import jax
from flax import nnx

from darkformer_jax.mixers import MIXERS
from darkformer_jax.mixers.spec import MixerSpec


def state_bytes(spec: MixerSpec, length: int, dtype: jax.typing.DTypeLike) -> int:
    """Bytes of one layer's state for one sequence of at most `length` tokens; nothing is allocated.

    dtype: of keys and values that are kept as they are. Far states are float32.
    """

    def init() -> object:
        return MIXERS[spec.kind].build(spec, 0, rngs=nnx.Rngs(0)).init_state(1, length, dtype)

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(init)))
