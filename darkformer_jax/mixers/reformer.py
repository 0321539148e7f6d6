"""Reformer's attention by locality-sensitive hashing (Kitaev et al., arXiv 2001.04451)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from darkformer_jax.errors import UserError
from darkformer_jax.mixers.encoders import EncoderMechanism, per_query_head, places_in_row
from darkformer_jax.mixers.layers import of_length
from darkformer_jax.mixers.spec import MixerSpec, Projection
from darkformer_jax.ops.features import matmul
from darkformer_jax.ops.projections import projection_key
from darkformer_jax.ops.state import NEG

_ITSELF = -1e5  # the logit of a token for itself: it counts only where nothing else is seen


class Reformer(EncoderMechanism):
    """softmax(q k^T) v with k = q / |q| over near neighbours of q, in `num_hashes` rounds of hashing.

    In a round, token i has the bucket argmax([q_i R, -q_i R]) of m = `num_features`, where R [d, m / 2] is drawn from
    N(0, I) per head and round. The text's tokens are sorted by bucket, then place, and cut into chunks of `chunk_size`.
    A token sees its chunk and the one before it, whatever buckets they hold, but itself only if there is nothing else.
    Rounds are mixed in proportion to their sums of exp(q k^T). As in transformers, the chunk before a round's first is
    the last of the round before (for the first round: of the last), a key that is found twice counts twice, and there
    is no factor d^-0.5. A text of one chunk has exact attention.

    The paper's causal form masks later tokens in those chunks. It is not causal: where chunks begin depends on the
    buckets of later tokens, and with it which earlier tokens one sees. So causal models are refused. Padding is sorted
    to the end and left out: a text's outputs do not depend on the row's length.
    """

    uses = (EncoderMechanism.uses - {"query_scale"}) | {"chunk_size", "num_hashes"}
    shares_q_and_k = True

    def __init__(self, spec: MixerSpec, layer: int | Array) -> None:
        super().__init__(spec, layer)
        shape = (spec.num_hashes, spec.num_heads, spec.head_dim, spec.num_features // 2)
        drawn = jax.random.normal(projection_key(spec.seed, layer, 0), shape, jnp.float32)
        self.rotations = Projection(drawn, axes=(None, "heads", None, None))

    @classmethod
    def check(cls, spec: MixerSpec) -> None:
        super().check(spec)
        if spec.num_features % 2:
            raise UserError(
                f"model.attention.num_features = {spec.num_features}: {spec.kind!r} has as many buckets; must be even"
            )

    @classmethod
    def mixing_flops(cls, spec: MixerSpec, length: int) -> float:
        """Per token, head and round: m d for the hash, 4 d for each key of two chunks."""
        per_key = 4 * spec.head_dim * min(2 * spec.chunk_size, length)
        return spec.num_hashes * spec.num_heads * (spec.num_features * spec.head_dim + per_key)

    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        *,
        segment_ids: Array,
        positions: Array,
        log_decay: Array | None = None,
        state: Any = None,
    ) -> tuple[Array, Any]:
        dtype, is_real = v.dtype, (segment_ids != 0)[..., None, None]
        q, v = jnp.where(is_real, q, 0), per_query_head(jnp.where(is_real, v, 0), self.spec.num_heads)
        order = jnp.argsort(self._sort_keys(q, segment_ids != 0), axis=-1)  # [b, h, r, n]
        queries, keys, values = (self._in_chunks(x, order) for x in (q, of_length(q, 1.0), v))
        place = self._in_chunks(jnp.arange(q.shape[1])[None, :, None, None], order)[..., 0]

        # Chunks of all rounds, c in each: the one before, and which tokens of a chunk are there.
        _, count = places_in_row(segment_ids)
        rounds, c, size = self.spec.num_hashes, -(-q.shape[1] // self.spec.chunk_size), self.spec.chunk_size
        used = jnp.maximum(-(-count // size), 1)[:, None, None]
        round_, index = jnp.arange(rounds)[None, :, None], jnp.arange(c)[None, None]
        before = jnp.where(index > 0, round_ * c + index - 1, (round_ - 1) % rounds * c + used - 1).reshape(
            -1, rounds * c
        )
        seen = jnp.tile(jnp.arange(c * size)[None] < count[:, None], (1, rounds)).reshape(-1, 1, rounds * c, size)

        def with_chunk_before(x: Array) -> Array:
            chunks = before.reshape(len(before), 1, -1, *(1,) * (x.ndim - 3))
            return jnp.concatenate([x, jnp.take_along_axis(x, chunks, axis=2)], axis=3)

        has_before = jnp.arange(2 * size)[None, None, None] < jnp.where(used > 1, 2, 1)[..., None] * size
        visible = (with_chunk_before(seen) & has_before)[..., None, :]
        is_itself = place[..., None] == with_chunk_before(place)[..., None, :]
        logits = matmul("bhcnd,bhctd->bhcnt", queries, with_chunk_before(keys), dtype)
        logits = jnp.where(visible, jnp.where(is_itself, _ITSELF, logits), NEG)
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        mixed = matmul("bhcnt,bhctd->bhcnd", jnp.exp(logits - total), with_chunk_before(values), dtype)

        back = jnp.argsort(order, axis=-1)[..., None]  # from a round's order to the text's
        flat = (x.reshape(*order.shape[:3], -1, x.shape[-1]) for x in (mixed, total))
        mixed, total = (jnp.take_along_axis(x, back, axis=3) for x in flat)
        out = jnp.sum(mixed * jax.nn.softmax(total, axis=2), axis=2)
        return jnp.where(is_real, jnp.swapaxes(out, 1, 2), 0).astype(dtype), None

    def _sort_keys(self, q: Float[Array, "b n h d"], is_real: Array) -> Int[Array, "b h r n"]:
        """Numbers in whose order a round has the tokens: by bucket, then place, then padding."""
        rotated = matmul("bnhd,rhdm->bhrnm", q, self.rotations[...], jnp.float32)
        bucket = jnp.argmax(jnp.concatenate([rotated, -rotated], axis=-1), axis=-1)
        bucket = jnp.where(is_real[:, None, None], bucket, self.spec.num_features)
        return bucket * q.shape[1] + jnp.arange(q.shape[1])[None, None, None]

    def _in_chunks(self, x: Shaped[Array, "b n h d"], order: Int[Array, "b h r n"]) -> Shaped[Array, "b h c t d"]:
        """The chunks of each round's order, one round after the other; zeros fill the last chunk of each."""
        taken = jnp.take_along_axis(jnp.swapaxes(x, 1, 2)[:, :, None], order[..., None], axis=3)
        missing = -x.shape[1] % self.spec.chunk_size
        padded = jnp.pad(taken, ((0, 0), (0, 0), (0, 0), (0, missing), (0, 0)))
        return padded.reshape(*order.shape[:2], -1, self.spec.chunk_size, x.shape[-1])
