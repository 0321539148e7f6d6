"""What each key/value head gains if it stays exact, by gradients: heads of one layer differ more than layers do."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from darkformer_jax.calibration.hybrids import Quality, Row, nats, plain_row, repeated_row
from darkformer_jax.calibration.kept import Arrays, Remember, keep_nothing
from darkformer_jax.data.progress import ProgressBar
from darkformer_jax.data.tokenizers import Tokenizer
from darkformer_jax.mixers.window_only import WindowOnly
from darkformer_jax.model.transformer import Block, Transformer

_SHARES = (0.9, 0.5, 0.1)  # of exact attention in all heads, at which gradients are taken
_OF_COPYING = 0.25  # weight of copying beside the loss: it is several times as large


class Mixture(nnx.Module):
    """A mechanism whose heads are a share exact and the rest what replaces them."""

    def __init__(self, exact: Any, other: Any, shares: Float[Array, "hkv"]) -> None:
        self.exact, self.other, self.shares = exact, other, nnx.Variable(shares)

    def __call__(self, q: Array, k: Array, v: Array, **places: Any) -> tuple[Array, None]:
        outs = (mechanism(q, k, v, **places)[0] for mechanism in (self.exact, self.other))
        share = jnp.repeat(self.shares[...], q.shape[2] // k.shape[2])[None, None, :, None].astype(v.dtype)
        exact, other = outs
        return share * exact + (1 - share) * other, None


class MixedHeads:
    """The exact model with a mixture in the place of every mechanism that can be replaced.

    Only one layer's arrays and its own activations are there at a time, beside the input of every layer.

    Args:
      exact: the model before.
      replaced: the same model with every layer replaced that can be.
      candidates: the layers that differ.
      tokenizer: says whether a document has a first token of its own.
      window_alone: whether features are left out of what replaces; every candidate then needs a window.
    """

    def __init__(
        self,
        exact: Transformer,
        replaced: Transformer,
        candidates: Sequence[int],
        tokenizer: Tokenizer,
        window_alone: bool = False,
    ) -> None:
        self._exact, self._replaced, self._candidates = exact, replaced, frozenset(candidates)
        self._whole: Any = nnx.split(exact)
        self._begin, self._window_alone = int(tokenizer.adds_bos), window_alone

    def measure(self, shares: Float[np.ndarray, "layers hkv"], passages: Int[np.ndarray, "n l"]) -> Quality:
        """The quality of a model on passages."""
        rows = [[plain_row(p) for p in passages], [repeated_row(p, self._begin) for p in passages]]
        means = []
        for group in rows:
            total = sum(float(nats(*self._whole, self._inputs(row, shares)[-1], row)) for row in group)
            means.append(total / sum(float(np.sum(row.weights)) for row in group))
        return Quality(*means)

    def gains(
        self,
        passages: Int[np.ndarray, "n l"],
        progress_bar: ProgressBar,
        label: str = "each head",
        remember: Remember = keep_nothing,
    ) -> Float[np.ndarray, "layers hkv"]:
        """-d(loss + copy / 4) / d share of every head, averaged over shares from nearly exact to nearly replaced.

        Each share is tried on another passage. Heads of layers that are not replaced gain -inf.
        """
        spec = self._exact.spec
        found = np.zeros((spec.num_layers, spec.layers[0].num_kv_heads))
        found[[layer for layer in range(spec.num_layers) if layer not in self._candidates]] = -np.inf
        with progress_bar(2 * len(_SHARES) * spec.num_layers, "layer", label) as bar:
            for number, share in enumerate(_SHARES):
                passage = passages[number % len(passages)]
                rows = ("loss", plain_row(passage), 1.0), ("copy", repeated_row(passage, self._begin), _OF_COPYING)
                shares = np.full(found.shape, share)
                for name, row, weight in rows:
                    end = bar.n + spec.num_layers
                    gradients = functools.partial(self._gradients, row, shares, bar)
                    found -= weight / len(_SHARES) * remember(f"{name}_gradients_{number}", gradients)["gradients"]
                    bar.update(end - bar.n)  # nothing, unless an earlier run had found them
        return found

    def _gradients(self, row: Row, shares: Float[np.ndarray, "layers hkv"], bar: Any) -> Arrays:
        """{"gradients": d mean nats / d shares}, 0 in layers that are not replaced. The bar counts layers."""
        found = np.zeros(shares.shape, np.float32)
        *inputs, last = self._inputs(row, shares)
        slope = _slope(*self._whole, last, row) / float(np.sum(row.weights))
        for layer in reversed(range(len(inputs))):
            slope, gradient = _pull(*self._parts(layer), inputs[layer], jnp.asarray(shares[layer], jnp.float32), slope)
            if layer in self._candidates:
                found[layer] = gradient
            bar.update()
        return {"gradients": found}

    def _inputs(self, row: Row, shares: Float[np.ndarray, "layers hkv"]) -> list[Array]:
        """The input of every layer, and the last one's output."""
        x = [self._exact.embed(jnp.asarray(row.tokens[None]))]
        for layer in range(self._exact.spec.num_layers):
            x.append(_run(*self._parts(layer), x[-1], jnp.asarray(shares[layer], jnp.float32)))
        return x

    def _parts(self, layer: int) -> tuple[Any, Any, nnx.State, nnx.State]:
        """(structure of the exact layer, of what replaces its mechanism, and the arrays of both)."""
        block = nnx.split(self._exact.layer(layer))
        source = self._replaced if layer in self._candidates else self._exact
        attention: Any = source.layer(layer).attention
        mechanism = attention.mechanism
        if self._window_alone and layer in self._candidates:
            mechanism = WindowOnly(mechanism.spec, layer)
        other = nnx.split(mechanism)
        return block[0], other[0], block[1], other[1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(
    block: Any, other: Any, arrays: nnx.State, others: nnx.State, x: Float[Array, "1 l d"], shares: Float[Array, "hkv"]
) -> Float[Array, "1 l d"]:
    layer: Block = nnx.merge(block, arrays)
    attention: Any = layer.attention
    attention.mechanism = Mixture(attention.mechanism, nnx.merge(other, others), shares)
    positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    after, _ = layer(x, jnp.ones_like(positions), positions, None)
    return after


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pull(
    block: Any, other: Any, arrays: nnx.State, others: nnx.State, x: Array, shares: Array, slope: Array
) -> tuple[Float[Array, "1 l d"], Float[Array, "hkv"]]:
    """(slope with respect to x, with respect to the shares), from that with respect to the layer's output."""
    _, pull = jax.vjp(lambda x, shares: _run(block, other, arrays, others, x, shares), x, shares)
    before, gradient = pull(slope.astype(x.dtype))
    return before, gradient


@functools.partial(jax.jit, static_argnums=0)
def _slope(graphdef: Any, arrays: nnx.State, x: Float[Array, "1 l d"], row: Row) -> Float[Array, "1 l d"]:
    return jax.grad(lambda x: nats(graphdef, arrays, x, row))(x)
