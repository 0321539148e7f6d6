"""A transformer of the Llama and Gemma family, causal or bidirectional, whose layers mix tokens by a pattern of mixers.

Layers at the same place in the pattern are stacked. One scan goes over the complete repetitions of the pattern, so that
the program's size does not grow with depth. The layers of an incomplete last repetition follow the scan.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from darkformer_jax.distributed.sharding import constrain
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from darkformer_jax.mixers.layers import GatedMLP, RMSNorm
from darkformer_jax.mixers.spec import MixerSpec
from darkformer_jax.model.heads import make_classifier, pool
from darkformer_jax.model.spec import ModelSpec
from darkformer_jax.model.unembedding import Unembedding

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `post_norms` each term is normed again before it is added."""

    def __init__(self, spec: ModelSpec, mixer: MixerSpec, layer: int | Array, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = _norm(spec)
        self.post_attention_norm = _norm(spec) if spec.post_norms else None
        self.attention = MIXERS[mixer.kind].build(mixer, layer, rngs=rngs)
        self.mlp_norm = _norm(spec)
        self.post_mlp_norm = _norm(spec) if spec.post_norms else None
        self.mlp = GatedMLP(spec.embed_dim, spec.mlp_dim, spec.activation, rngs=rngs, dtype=spec.dtype)

    def __call__(self, x: Array, segment_ids: Array, positions: Array, state: Any) -> tuple[Array, Any]:
        mixed, state = self.attention(self.attention_norm(x), segment_ids, positions, state)
        if self.post_attention_norm is not None:
            mixed = self.post_attention_norm(mixed)
        x = x + mixed
        changed = self.mlp(self.mlp_norm(x))
        if self.post_mlp_norm is not None:
            changed = self.post_mlp_norm(changed)
        return x + changed, state


def _norm(spec: ModelSpec) -> RMSNorm:
    return RMSNorm(spec.embed_dim, spec.norm_eps, spec.norm_plus_one)


def _stack_blocks(spec: ModelSpec, place: int, key: Array) -> Block:
    """The blocks at one place in the pattern, as one module whose arrays have a leading axis of layers."""
    mixer, rows = spec.pattern[place], spec.num_rows(place)
    layers = place + len(spec.pattern) * jnp.arange(rows)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Block(spec, mixer, 0, rngs=nnx.Rngs(params=0))))

    def make(layer_key: Array, layer: Array) -> nnx.State:
        return nnx.state(Block(spec, mixer, layer, rngs=nnx.Rngs(params=layer_key)))

    return nnx.merge(graphdef, jax.vmap(make)(jax.random.split(key, rows), layers))


class Transformer(nnx.Module):
    """Token ids -> float32 logits of each next token, or with `spec.num_outputs` the outputs of each sequence.

    Activations and matmuls have `spec.dtype`.

    Parameters are initialised in float32. They may be bound in another floating dtype, such as an import in bfloat16.
    """

    def __init__(self, spec: ModelSpec, key: Array) -> None:
        self.spec = spec
        embed_key, head_key, *block_keys = jax.random.split(key, 2 + len(spec.pattern))
        table = (spec.vocab_size, spec.embed_dim)
        init = jax.nn.initializers.normal(spec.embed_dim**-0.5)
        self.embedding = nnx.Param(init(embed_key, table, jnp.float32), axes=("vocab", "embed"))
        for place in range(len(spec.pattern)):
            setattr(self, f"blocks_{place}", _stack_blocks(spec, place, block_keys[place]))
        self.final_norm = _norm(spec)
        if spec.num_outputs:
            self.classifier = make_classifier(spec.embed_dim, spec.num_outputs, nnx.Rngs(params=head_key))
        elif not spec.tie_embeddings:
            self.head = nnx.Param(init(head_key, table, jnp.float32), axes=("vocab", "embed"))

    def __call__(
        self, tokens: Int[Array, "b n"], segment_ids: Int[Array, "b n"], positions: Int[Array, "b n"], state: Any = None
    ) -> tuple[Float[Array, "b n vocab"], Any]:
        """(logits of each token's successor, the state after the last token or None if none was given).

        segment_ids: each token's document, 0 = padding; positions: its place in the document. A state comes from
        `init_state` or an earlier call, and holds what the sequences have seen so far.
        """
        x, state = self.hidden(tokens, segment_ids, positions, state)
        return self.logits(x), state

    def outputs(
        self, tokens: Int[Array, "b n"], segment_ids: Int[Array, "b n"], positions: Int[Array, "b n"]
    ) -> Float[Array, "b outputs"]:
        """The `num_outputs` outputs of each sequence in float32, such as class logits."""
        x, _ = self.hidden(tokens, segment_ids, positions)
        return self.classifier(pool(x, segment_ids, self.spec.pooling))

    def hidden(
        self, tokens: Int[Array, "b n"], segment_ids: Int[Array, "b n"], positions: Int[Array, "b n"], state: Any = None
    ) -> tuple[Float[Array, "b n embed"], Any]:
        """The output of the final norm, which `logits` maps to logits."""
        x, state, _ = self._through_layers(self.embed(tokens), segment_ids, positions, state)
        return self.final_norm(x), state

    def observed(
        self,
        tokens: Int[Array, "b n"],
        segment_ids: Int[Array, "b n"],
        positions: Int[Array, "b n"],
        observe: Callable[[Array, Any], Any],
        beside: Any = None,
    ) -> tuple[Float[Array, "b n embed"], Any]:
        """(the output of the final norm, what `observe` says of every layer, with an axis of layers in front).

        observe: (a layer's output [b, n, embed], its part of `beside`) -> arrays. It runs inside the scan: what it does
          not return is not kept.
        beside: arrays with an axis of layers in front; None = nothing.
        """
        x, _, observed = self._through_layers(self.embed(tokens), segment_ids, positions, None, observe, beside)
        return self.final_norm(x), observed

    def _through_layers(
        self,
        x: Array,
        segment_ids: Array,
        positions: Array,
        state: Any,
        observe: Callable[[Array, Any], Any] = lambda x, beside: None,
        beside: Any = None,
    ) -> tuple[Array, Any, Any]:
        """(the last layer's output, the new state, what was observed)."""
        split = [nnx.split(getattr(self, f"blocks_{place}")) for place in range(len(self.spec.pattern))]

        def layer(graphdef: Any, x: Array, arrays: Any, state: Any, beside: Any) -> tuple[Array, Any, Any]:
            block = nnx.merge(graphdef, arrays)
            x, new_state = block(x, segment_ids, positions, state)
            x = constrain(x, "batch", "sequence", None)
            return x, new_state, observe(x, beside)

        def layers(x: Array, stacks: Any, *, once: bool) -> tuple[Array, Any]:
            """Applies one layer per entry of the arrays, at the first places of the pattern. once: not in a loop."""
            arrays, states, besides = stacks
            new_states, observed = [], []
            for (graphdef, _), *own in zip(split, arrays, states, besides, strict=False):
                apply: Callable[..., Any] = functools.partial(layer, graphdef)
                if self.spec.remat != "none":
                    # Each layer by itself, because the pattern may be as long as the network. A loop keeps XLA from
                    # merging what is computed again with the forward pass.
                    apply = jax.checkpoint(apply, policy=REMAT_POLICIES[self.spec.remat], prevent_cse=once)
                x, new_state, seen = apply(x, *own)
                new_states.append(new_state)
                observed.append(seen)
            return x, (tuple(new_states), tuple(observed))

        places = len(split)
        periods, tail = divmod(self.spec.num_layers, places)
        repeated = tuple(jax.tree.map(lambda leaf: leaf[:periods], arrays) for _, arrays in split)
        last = tuple(jax.tree.map(lambda leaf: leaf[periods], arrays) for _, arrays in split[:tail])
        states, last_states = ((None,) * places, (None,) * tail) if state is None else state
        besides, last_besides = _by_place(beside, places, periods, tail)
        # XLA makes a loop of one step straight code.
        in_scan = functools.partial(layers, once=periods == 1)
        x, (new_states, observed) = jax.lax.scan(in_scan, x, (repeated, states, besides))
        x, (new_last_states, last_observed) = layers(x, (last, last_states, last_besides), once=True)
        new_state = None if state is None else (new_states, new_last_states)
        return x, new_state, _by_layer(observed, last_observed)

    def embed(self, tokens: Int[Array, "b n"]) -> Float[Array, "b n embed"]:
        """The embeddings that the first layer reads."""
        # The table is gathered over its width first, as every layer's weights are. With a table that is split both
        # ways, XLA would make the activations of the whole batch on each device.
        x = constrain(self.embedding[...].astype(self.spec.dtype), "vocab", None)[tokens]
        if self.spec.scale_embeddings:
            x = x * jnp.asarray(self.spec.embed_dim**0.5, x.dtype)
        return constrain(x, "batch", "sequence", None)

    def layer(self, index: int) -> Block:
        """One layer, with its arrays cut out of their stack."""
        row, place = divmod(index, len(self.spec.pattern))
        graphdef, arrays = nnx.split(getattr(self, f"blocks_{place}"))
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[row], arrays))

    @property
    def unembedding(self) -> Unembedding:
        """What `logits` applies."""
        table = self.embedding if self.spec.tie_embeddings else self.head
        return Unembedding(table[...], self.spec.dtype, self.spec.logit_softcap)

    def logits(self, x: Float[Array, "... embed"]) -> Float[Array, "... vocab"]:
        """x E^T in float32, soft-capped if `logit_softcap` is not 0."""
        return self.unembedding.logits(x)

    def init_state(self, batch: int, max_length: int) -> Any:
        """The state of `batch` sequences before their first token; a KV cache has room for `max_length` tokens.

        Raises UserError for a bidirectional model, whose tokens depend on later ones.
        """
        if not self.spec.causal:
            raise UserError("model.causal = False: a bidirectional model has no state to continue from; allowed: True")
        periods, tail = divmod(self.spec.num_layers, len(self.spec.pattern))
        states = []
        for place in range(len(self.spec.pattern)):
            states.append(self.layer(place).attention.init_state(batch, max_length, self.spec.dtype))
        repeated = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (periods, *leaf.shape)), tuple(states))
        return repeated, tuple(states[:tail])


def _by_place(beside: Any, places: int, periods: int, tail: int) -> tuple[tuple, tuple]:
    """Arrays [layers, ...] as the scan takes them: per place in the pattern [periods, ...], and of the last layers."""
    if beside is None:
        return (None,) * places, (None,) * tail
    whole = periods * places
    repeated = tuple(jax.tree.map(lambda leaf, p=place: leaf[p:whole:places], beside) for place in range(places))
    return repeated, tuple(jax.tree.map(lambda leaf, i=index: leaf[whole + i], beside) for index in range(tail))


def _by_layer(repeated: tuple, last: tuple) -> Any:
    """The inverse of `_by_place`."""

    def interleave(*leaves: Array) -> Array:
        return leaves[0] if len(leaves) == 1 else jnp.stack(leaves, axis=1).reshape(-1, *leaves[0].shape[1:])

    def append(most: Array, *others: Array) -> Array:
        return jnp.concatenate([most, jnp.stack(others)])

    layers = jax.tree.map(interleave, *repeated)
    return jax.tree.map(append, layers, *last) if last else layers
