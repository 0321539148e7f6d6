"""A decoder-only transformer of the Llama and Gemma family whose attention is a pattern of mechanisms.

Layers of one position in the pattern are stacked and run in one scan over the whole repetitions of the pattern, so that
the program's size does not grow with depth. Layers of a last repetition that is cut short follow the scan.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from darkformer_jax.distributed.sharding import constrain, sharding_of
from darkformer_jax.mixers.attention import Attention
from darkformer_jax.mixers.features import draw_layer
from darkformer_jax.mixers.layers import GatedMLP, RMSNorm
from darkformer_jax.mixers.positions import RopeSpec
from darkformer_jax.mixers.spec import AttentionSpec, Geometry, Projection
from darkformer_jax.model.heads import Pooling, make_classifier, pool

REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Everything that decides a model's shape and function; the fields are explained in config/base.py."""

    vocab_size: int
    num_layers: int
    embed_dim: int
    mlp_dim: int
    activation: str
    norm_eps: float
    rope_theta: float
    qk_norm: bool
    tie_embeddings: bool
    scale_embeddings: bool
    logit_softcap: float
    dtype: str
    remat: str
    pattern: tuple[str, ...]  # mechanism of successive layers, repeated; not longer than num_layers
    attention: AttentionSpec
    rope_local_theta: float = 0.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_length: int = 8192
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_attention_factor: float = 0.0
    qkv_bias: bool = False
    norm_plus_one: bool = False
    post_norms: bool = False
    lora_rank: int = 0
    num_outputs: int = 0  # per sequence: classes, or 1 for a number; 0 = logits of the next token
    pooling: Pooling = "last"

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """The mechanism of every layer."""
        return tuple(self.pattern[layer % len(self.pattern)] for layer in range(self.num_layers))

    def num_rows(self, place: int) -> int:
        """Layers that stand at one place in the pattern: rows of its stack."""
        return len(range(place, self.num_layers, len(self.pattern)))

    def rope(self, kind: str) -> RopeSpec:
        """The rotary positions of the layers of one mechanism."""
        if kind == "softmax_local" and self.rope_local_theta:
            return RopeSpec(theta=self.rope_local_theta)
        return RopeSpec(
            theta=self.rope_theta,
            scaling=self.rope_scaling,
            factor=self.rope_factor,
            low_freq_factor=self.rope_low_freq_factor,
            high_freq_factor=self.rope_high_freq_factor,
            original_length=self.rope_original_length,
            beta_fast=self.rope_beta_fast,
            beta_slow=self.rope_beta_slow,
            fixed_attention_factor=self.rope_attention_factor,
        )


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); with `post_norms` each term is normed again before it is added."""

    def __init__(self, spec: ModelSpec, kind: str, layer: int | Array, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = _norm(spec)
        self.post_attention_norm = _norm(spec) if spec.post_norms else None
        self.attention = Attention(
            spec.attention,
            kind,
            spec.embed_dim,
            rope=spec.rope(kind),
            qk_norm=spec.qk_norm,
            qkv_bias=spec.qkv_bias,
            norm_eps=spec.norm_eps,
            norm_plus_one=spec.norm_plus_one,
            lora_rank=spec.lora_rank,
            dtype=spec.dtype,
            layer=layer,
            rngs=rngs,
        )
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
    """The blocks of one place in the pattern, as one module whose arrays have a leading axis of layers."""
    kind, rows = spec.pattern[place], spec.num_rows(place)
    layers = place + len(spec.pattern) * jnp.arange(rows)
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: Block(spec, kind, 0, rngs=nnx.Rngs(params=0))))

    def make(layer_key: Array, layer: Array) -> nnx.State:
        return nnx.state(Block(spec, kind, layer, rngs=nnx.Rngs(params=layer_key)))

    return nnx.merge(graphdef, jax.vmap(make)(jax.random.split(key, rows), layers))


class Transformer(nnx.Module):
    """Token ids -> float32 logits; activations and matmuls have `spec.dtype`.

    Parameters are initialised in float32, and may be bound in another floating dtype (an import in bfloat16).
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
        """Logits of each token's successor, and the state after the last token (None where none was given).

        segment_ids: document of each token, 0 = padding; positions: place in its document. A state comes from
        `init_state` or an earlier call, and holds what the sequences have seen so far.
        """
        x, state = self.hidden(tokens, segment_ids, positions, state)
        return self.logits(x), state

    def outputs(
        self, tokens: Int[Array, "b n"], segment_ids: Int[Array, "b n"], positions: Int[Array, "b n"]
    ) -> Float[Array, "b outputs"]:
        """The classifier's `num_outputs` numbers for each sequence, in float32: logits of the classes, say."""
        x, _ = self.hidden(tokens, segment_ids, positions)
        return self.classifier(pool(x, segment_ids, self.spec.pooling))

    def hidden(
        self, tokens: Int[Array, "b n"], segment_ids: Int[Array, "b n"], positions: Int[Array, "b n"], state: Any = None
    ) -> tuple[Float[Array, "b n embed"], Any]:
        """What `logits` maps to logits: the final norm's output."""
        x = self.embed(tokens)
        split = [nnx.split(getattr(self, f"blocks_{place}")) for place in range(len(self.spec.pattern))]

        def layers(x: Array, stacks: Any) -> tuple[Array, Any]:
            """One layer of each of the first places in the pattern, as many as there are arrays."""
            arrays, states = stacks
            new_states = []
            for (graphdef, _), block_arrays, block_state in zip(split, arrays, states, strict=False):
                block = nnx.merge(graphdef, block_arrays)
                x, new_state = block(x, segment_ids, positions, block_state)
                x = constrain(x, "batch", "sequence", None)
                new_states.append(new_state)
            return x, tuple(new_states)

        in_scan = behind = layers
        if self.spec.remat != "none":
            policy = REMAT_POLICIES[self.spec.remat]
            in_scan = jax.checkpoint(layers, policy=policy, prevent_cse=False)
            behind = jax.checkpoint(layers, policy=policy)
        periods, tail = divmod(self.spec.num_layers, len(split))
        repeated = tuple(jax.tree.map(lambda leaf: leaf[:periods], arrays) for _, arrays in split)
        last = tuple(jax.tree.map(lambda leaf: leaf[periods], arrays) for _, arrays in split[:tail])
        states, last_states = ((None,) * len(split), (None,) * tail) if state is None else state
        x, new_states = jax.lax.scan(in_scan, x, (repeated, states))
        x, new_last_states = behind(x, (last, last_states))
        return self.final_norm(x), None if state is None else (new_states, new_last_states)

    def embed(self, tokens: Int[Array, "b n"]) -> Float[Array, "b n embed"]:
        """What the first layer reads."""
        # Gathered over the width first, as every layer's weights are: looked up in a table split both ways, XLA would
        # make the activations of the whole batch on each device.
        x = constrain(self.embedding[...].astype(self.spec.dtype), "vocab", None)[tokens]
        if self.spec.scale_embeddings:
            x = x * jnp.asarray(self.spec.embed_dim**0.5, x.dtype)
        return constrain(x, "batch", "sequence", None)

    def layer(self, index: int) -> Block:
        """One layer by itself, its arrays cut out of their stack."""
        row, place = divmod(index, len(self.spec.pattern))
        graphdef, arrays = nnx.split(getattr(self, f"blocks_{place}"))
        return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[row], arrays))

    def logits(self, x: Float[Array, "... embed"]) -> Float[Array, "... vocab"]:
        """x E^T in float32, capped if the model says so."""
        table = self.embedding if self.spec.tie_embeddings else self.head
        kernel = table[...].astype(self.spec.dtype)
        out = jnp.einsum("...d,vd->...v", x, kernel, preferred_element_type=jnp.float32)
        if self.spec.logit_softcap:
            out = self.spec.logit_softcap * jnp.tanh(out / self.spec.logit_softcap)
        return out

    def init_state(self, batch: int, max_length: int) -> Any:
        """The state of `batch` sequences before their first token; a KV cache has room for `max_length` tokens."""
        periods, tail = divmod(self.spec.num_layers, len(self.spec.pattern))
        states = []
        for place in range(len(self.spec.pattern)):
            mechanism: Any = self.layer(place).attention.mechanism
            state = mechanism.init_state(batch, max_length, self.spec.dtype)
            states.append(state)
        repeated = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (periods, *leaf.shape)), tuple(states))
        return repeated, tuple(states[:tail])


@dataclasses.dataclass(frozen=True)
class Network:
    """A model as pure functions of two nested dicts of arrays: trained parameters, and projections."""

    spec: ModelSpec
    graphdef: Any
    abstract_params: nnx.State
    abstract_projections: nnx.State

    @classmethod
    def of(cls, spec: ModelSpec) -> "Network":
        """Builds the model abstractly: no array is allocated."""
        abstract = nnx.eval_shape(lambda: Transformer(spec, jax.random.key(0)))
        return cls(spec, *_split(abstract))

    def init(self, key: Array) -> tuple[dict, dict]:
        """(params, projections), freshly drawn."""
        _, params, projections = _split(Transformer(self.spec, key))
        return nnx.to_pure_dict(params), nnx.to_pure_dict(projections)

    def bind(self, params: dict, projections: dict) -> Transformer:
        """The module with these arrays, to be called inside a jitted function."""
        return nnx.merge(self.graphdef, params, projections)

    def redraw(self, projections: dict, epoch: Array) -> dict:
        """The projections of another redraw epoch; other fixed noise stays."""
        redrawn = dict(projections)
        count = len(self.spec.pattern)
        for place in range(count):
            block = projections.get(f"blocks_{place}", {})
            old = block.get("attention", {}).get("mechanism", {}).get("projections")
            if old is not None:
                layers = place + count * jnp.arange(old.shape[0])
                new = jax.vmap(lambda layer: draw_layer(self.spec.attention, layer, epoch))(layers)
                mechanism = block["attention"]["mechanism"] | {"projections": new}
                redrawn[f"blocks_{place}"] = {"attention": {"mechanism": mechanism}}
        return redrawn

    def map_params(self, function: Any) -> dict:
        """function(path, variable) for every parameter, as a tree like `params`."""
        return _map_variables(self.abstract_params, function)

    def map_projections(self, function: Any) -> dict:
        """function(path, variable) for every projection array, as a tree like `projections`."""
        return _map_variables(self.abstract_projections, function)


def logical_axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    """Names of a variable's dimensions; a stacked one has an unnamed axis of layers in front."""
    axes = tuple(variable.get_metadata()["axes"])
    return (None,) * (len(variable.shape) - len(axes)) + axes


def variable_sharding(path: tuple, variable: nnx.Variable, mesh: Mesh) -> NamedSharding:
    """How a mesh holds a variable, by its logical axes. Raises UserError for one that the mesh does not divide."""
    return sharding_of("/".join(map(str, path)), logical_axes(variable), variable.shape, mesh)


def is_geometry(variable: nnx.Variable) -> bool:
    """Whether a parameter is M, a learned projection or a gain."""
    return issubclass(variable.type if hasattr(variable, "type") else type(variable), Geometry)


def _split(model: Transformer) -> tuple[Any, nnx.State, nnx.State]:
    """(structure, parameters, projections)."""
    parts: Any = nnx.split(model, nnx.Param, Projection)
    return parts


def _map_variables(state: nnx.State, function: Any) -> dict:
    return unflatten_dict({path: function(path, variable) for path, variable in nnx.to_flat_state(state)})
