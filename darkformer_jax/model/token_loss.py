"""The loss of next tokens, and what a model says of them, without the logits of all tokens in memory at once.

Logits [b, n, vocab] are the largest array of a model with a large vocabulary: 8,192 tokens of 256,128 ids take 7.8 GiB.
Where they would be large (`tokens_at_once`), a scan goes over chunks of tokens, and each chunk's logits exist only in
its turn. The gradients of the hidden states and of the matrix are made in the same scan, while the logits are there, so
that no product is computed twice. The backward pass scales them.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from darkformer_jax.distributed.sharding import constrain
from darkformer_jax.distributed.tokens import map_tokens, tokens_per_device, vocab_per_device
from darkformer_jax.model.unembedding import Unembedding, multiply
from darkformer_jax.ops.context import vary_like

Total = TypeVar("Total")
Out = TypeVar("Out")

# A device has the logits of so many tokens at a time that they are at most this many numbers: 256 MiB in float32.
_LOGITS = 2**26
# So many tokens may be in a chunk, however large their logits. A chunk reads and writes the sum of the matrix's
# gradients, 8 bytes a parameter, for 6 FLOPs a token and parameter: with 320 tokens on a v5e and 390 on an H100, this
# traffic takes as long as the products.
_TOKENS = 1024


class Predictions(NamedTuple):
    """The logits of tokens, not computed yet.

    Attributes:
      hidden: the output of the final norm.
      unembedding: what maps it to logits.
    """

    hidden: Float[Array, "b n embed"]
    unembedding: Unembedding


class TokenFigures(NamedTuple):
    """What a model says of each token. Only `token_loss` gives gradients; these are constants to them.

    Attributes:
      log_normalizer: log sum_v exp(logit_v).
      target_logit: the logit of the target.
      best: the id with the largest logit.
      divergence: KL(teacher || model) in nats; None without a teacher.
    """

    log_normalizer: Float[Array, "b n"]
    target_logit: Float[Array, "b n"]
    best: Int[Array, "b n"]
    divergence: Float[Array, "b n"] | None

    @property
    def nll(self) -> Float[Array, "b n"]:
        """-log p of the target in nats."""
        return self.log_normalizer - self.target_logit


class LossFactors(NamedTuple):
    """The factors of a token's loss: nll -log p(target) + z (log normaliser)^2 + divergence KL(teacher || model)."""

    nll: float = 1.0
    z: float = 0.0
    divergence: float = 0.0


class _Batch(NamedTuple):
    """The arrays that each token has."""

    hidden: Array
    targets: Array
    weights: Array
    taught: Array | None  # the teacher's hidden state


class _Matrices(NamedTuple):
    """The arrays that all tokens share, in the dtype in which they are multiplied."""

    own: Unembedding
    teacher: Unembedding | None


def token_loss(
    predictions: Predictions,
    targets: Int[Array, "b n"],
    weights: Float[Array, "b n"],
    factors: LossFactors,
    teacher: Predictions | None = None,
) -> tuple[Float[Array, ""], TokenFigures]:
    """(the weighted sum of the tokens' losses, the figures of each token), for gradients of the model.

    Args:
      predictions: the model's; the loss has gradients of its hidden states and of its matrix.
      weights: 0 = a token that does not count.
      teacher: frozen; it needs the same vocabulary. None = there is none, and `factors.divergence` must be 0.
    """
    if teacher is None and not any(factors):  # what is learned are hidden states: figures are wanted, no gradients
        return jnp.zeros(()), token_figures(jax.lax.stop_gradient(predictions), targets)
    chunk = tokens_at_once(targets.shape, predictions.unembedding.matrix.shape[0])
    if chunk < tokens_per_device(targets.shape):
        loss, figures = _chunked_loss(factors, chunk, predictions, targets, weights, teacher)
    else:
        wanted = None if teacher is None else jax.lax.stop_gradient(_logits(teacher))
        figures = figures_of(_logits(predictions), targets, wanted)
        loss = _weighted(figures, weights, factors)
    return loss, jax.lax.stop_gradient(figures)


def token_figures(predictions: Predictions, targets: Int[Array, "b n"]) -> TokenFigures:
    """The figures of each token, for which there are no gradients."""
    chunk = tokens_at_once(targets.shape, predictions.unembedding.matrix.shape[0])
    if chunk < tokens_per_device(targets.shape):
        return _chunked_figures(chunk, predictions, targets)
    return figures_of(_logits(predictions), targets)


def tokens_at_once(rows: tuple[int, ...], vocab_size: int) -> int:
    """Of how many tokens of a batch [b, n] a device makes the logits at a time, on the current mesh.

    Of all that it has, if their logits take at most 256 MiB or they are no more than 1,024. Otherwise the tokens are
    divided into the fewest equal chunks that keep one of these bounds.
    """
    count = tokens_per_device(rows)
    most = max(_TOKENS, _LOGITS // vocab_per_device(vocab_size))
    return count if count <= most else -(-count // -(-count // most))


def _gather(logits: Array, targets: Array) -> Array:
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _masked_sum(logits: Array, targets: Array) -> Array:
    """What `_gather` returns, as a sum: it is fused with that of exponentials, also in the gradient.

    The gradient of a gather is a scatter to one more array of the logits' size. An id beyond the vocabulary gives NaN,
    as a gather does: the sum alone would be a logit of 0, and its loss would look like any other.
    """
    ids = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    picked = jnp.sum(jnp.where(ids == targets[..., None], logits, 0.0), axis=-1)
    return jnp.where((targets >= 0) & (targets < logits.shape[-1]), picked, jnp.nan)


def figures_of(
    logits: Float[Array, "*b vocab"],
    targets: Int[Array, "*b"],
    wanted: Float[Array, "*b vocab"] | None = None,
    pick: Callable[[Array, Array], Array] = _gather,
) -> TokenFigures:
    """The figures of tokens from their logits, and from the teacher's (`wanted`) if there is one.

    pick: (logits, targets) -> the targets' logits.
    """
    return TokenFigures(
        jax.nn.logsumexp(logits, axis=-1),
        pick(logits, targets),
        jnp.argmax(logits, axis=-1).astype(targets.dtype),
        None if wanted is None else kl_divergence(wanted, logits),
    )


def kl_divergence(teacher: Float[Array, "... vocab"], student: Float[Array, "... vocab"]) -> Float[Array, "..."]:
    """KL(teacher || student) = sum_v p_v (log p_v - log q_v) of two arrays of logits, in nats."""
    log_p, log_q = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _logits(predictions: Predictions) -> Float[Array, "b n vocab"]:
    return predictions.unembedding.logits(predictions.hidden)


def _weighted(figures: TokenFigures, weights: Array, factors: LossFactors) -> Float[Array, ""]:
    """The weighted sum of the losses. What has no part in it is left out, so that no gradient of it is computed."""
    loss = jnp.zeros(())
    if factors.nll:
        loss += factors.nll * jnp.sum(weights * figures.nll)
    if factors.divergence:
        assert figures.divergence is not None, "a divergence from no teacher"
        loss += factors.divergence * jnp.sum(weights * figures.divergence)
    if factors.z:
        loss += factors.z * jnp.sum(weights * jnp.square(figures.log_normalizer))
    return loss


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked_loss(
    factors: LossFactors,
    chunk: int,
    predictions: Predictions,
    targets: Array,
    weights: Array,
    teacher: Predictions | None,
) -> tuple[Float[Array, ""], TokenFigures]:
    figures = _chunked_figures(chunk, predictions, targets, teacher)
    return _weighted(figures, weights, factors), figures


def _chunked_loss_forward(
    factors: LossFactors,
    chunk: int,
    predictions: Predictions,
    targets: Array,
    weights: Array,
    teacher: Predictions | None,
) -> tuple[tuple[Float[Array, ""], TokenFigures], Predictions]:
    batch, matrices = _inputs(predictions, targets, weights, teacher)
    scan = functools.partial(_gradients_in_chunks, factors, chunk)
    (figures, of_hidden), of_matrix = map_tokens(scan, targets.shape, batch, matrices)
    unembedding = predictions.unembedding
    gradients = Predictions(of_hidden, unembedding.with_matrix(of_matrix.astype(unembedding.matrix.dtype)))
    return (_weighted(figures, weights, factors), figures), gradients


def _chunked_loss_backward(
    factors: LossFactors, chunk: int, gradients: Predictions, cotangents: tuple[Array, TokenFigures]
) -> tuple[Predictions, None, None, None]:
    """Targets, weights and the teacher are constants."""
    scale, _ = cotangents  # `token_loss` makes the figures constants
    return jax.tree.map(lambda x: (scale * x.astype(scale.dtype)).astype(x.dtype), gradients), None, None, None


_chunked_loss.defvjp(_chunked_loss_forward, _chunked_loss_backward)


def _chunked_figures(
    chunk: int, predictions: Predictions, targets: Array, teacher: Predictions | None = None
) -> TokenFigures:
    batch, matrices = _inputs(predictions, targets, jnp.zeros(targets.shape, jnp.float32), teacher)
    return map_tokens(functools.partial(_figures_in_chunks, chunk), targets.shape, batch, matrices)[0]


def _inputs(
    predictions: Predictions, targets: Array, weights: Array, teacher: Predictions | None
) -> tuple[_Batch, _Matrices]:
    taught, of_teacher = (None, None) if teacher is None else (teacher.hidden, _cast(teacher.unembedding))
    batch = _Batch(predictions.hidden, targets, weights, taught)
    return batch, _Matrices(_cast(predictions.unembedding), of_teacher)


def _cast(unembedding: Unembedding) -> Unembedding:
    """With the matrix as it is multiplied: gathered over its width once, not in every chunk."""
    return unembedding.with_matrix(constrain(unembedding.matrix.astype(unembedding.dtype), "vocab", None))


def _figures_in_chunks(chunk: int, batch: _Batch, matrices: _Matrices) -> tuple[TokenFigures, None]:
    """The figures of a device's tokens, and no sums."""

    def step(total: None, part: _Batch) -> tuple[None, TokenFigures]:
        return total, _figures_from(part, matrices)(_products(part.hidden, matrices.own))

    total, figures = _scan(step, None, chunk, batch)
    return figures, total


def _gradients_in_chunks(
    factors: LossFactors, chunk: int, batch: _Batch, matrices: _Matrices
) -> tuple[tuple[TokenFigures, Array], Array]:
    """((figures of a device's tokens, gradients of their hidden states), their sum of the matrix's gradients)."""
    kernel = matrices.own.matrix

    def step(total: Array, part: _Batch) -> tuple[Array, tuple[TokenFigures, Array]]:
        figures_from = _figures_from(part, matrices)

        def loss(products: Array) -> tuple[Array, TokenFigures]:
            figures = figures_from(products)
            return _weighted(figures, part.weights, factors), figures

        gradient, figures = jax.grad(loss, has_aux=True)(_products(part.hidden, matrices.own))
        gradient = constrain(gradient.astype(kernel.dtype), None, "vocab")
        of_hidden = _einsum("cv,vd->cd", gradient, kernel).astype(part.hidden.dtype)
        total = constrain(total + _einsum("cv,cd->vd", gradient, part.hidden), "vocab", None)
        return total, (figures, of_hidden)

    zeros = constrain(jnp.zeros(kernel.shape, jnp.float32), "vocab", None)
    of_matrix, out = _scan(step, vary_like(batch.targets, zeros), chunk, batch)
    return out, of_matrix


def _scan(
    step: Callable[[Total, _Batch], tuple[Total, Out]], total: Total, chunk: int, batch: _Batch
) -> tuple[Total, Out]:
    """(the total after all chunks, what `step` returns of each token [b, n, ...])."""
    rows, count = batch.targets.shape, batch.targets.size
    chunks = -(-count // chunk)

    def split(x: Array) -> Array:  # [b, n, ...] -> [chunks, chunk, ...], padded by tokens of weight 0
        flat = x.reshape(count, *x.shape[2:])
        flat = jnp.pad(flat, [(0, chunks * chunk - count)] + [(0, 0)] * (flat.ndim - 1))
        return flat.reshape(chunks, chunk, *flat.shape[1:])

    def join(x: Array) -> Array:
        return x.reshape(chunks * chunk, *x.shape[2:])[:count].reshape(*rows, *x.shape[2:])

    total, out = jax.lax.scan(step, total, jax.tree.map(split, batch))
    return total, jax.tree.map(join, out)


def _figures_from(part: _Batch, matrices: _Matrices) -> Callable[[Array], TokenFigures]:
    """From the products of a chunk's hidden states with the matrix to figures."""
    wanted = None
    if part.taught is not None and matrices.teacher is not None:
        wanted = matrices.teacher.capped(_products(part.taught, matrices.teacher))
    return lambda products: figures_of(matrices.own.capped(products), part.targets, wanted, _masked_sum)


def _products(hidden: Array, unembedding: Unembedding) -> Float[Array, "c vocab"]:
    return constrain(multiply(hidden, unembedding.matrix), None, "vocab")


def _einsum(indices: str, a: Array, b: Array) -> Array:
    return jnp.einsum(indices, a, b, preferred_element_type=jnp.float32)
