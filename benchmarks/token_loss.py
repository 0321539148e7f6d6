"""What a step of training holds and takes for its loss: whole logits, chunks of tokens, and chunks computed twice.

    python -m benchmarks.token_loss
    python -m benchmarks.token_loss --tokens=8192 --vocab=256128 --embed=2048      # needs 40 GB for the whole logits

Loss and gradients of hidden states and matrix alone, in float32, on the devices that there are. `twice` makes each
chunk's logits again in the backward pass (jax.checkpoint), which needs no gradients in the forward pass. The memory is
the compiler's, beside arguments and results; the time is the fastest of five.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from darkformer_jax.model import token_loss
from darkformer_jax.model.token_loss import LossFactors, Predictions
from darkformer_jax.model.unembedding import Unembedding

FACTORS = LossFactors(nll=1.0, z=1e-4)


def main() -> None:
    """Prints one line per form."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (("tokens", 4096), ("vocab", 49_152), ("embed", 576)):
        parser.add_argument(f"--{name}", type=int, default=size)
    args = parser.parse_args()
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (1, args.tokens, args.embed))
    matrix = jax.random.normal(keys[1], (args.vocab, args.embed)) * args.embed**-0.5
    targets = jax.random.randint(keys[2], (1, args.tokens), 0, args.vocab)
    chunk = token_loss.tokens_at_once((1, args.tokens), args.vocab)
    print(f"{args.tokens:,} tokens, {args.vocab:,} ids, width {args.embed:,}, chunks of {chunk:,} tokens")
    for name, size in (("whole", args.tokens), ("chunks", chunk)):
        token_loss._TOKENS, token_loss._LOGITS = size, 1  # which the rule would choose by the size of the logits
        report(name, lambda h, e: _loss(h, e, targets), hidden, matrix)
    report("twice", lambda h, e: _loss_twice(h, e, targets, chunk), hidden, matrix)


def report(name: str, loss: Callable[[Array, Array], Array], hidden: Array, matrix: Array) -> None:
    """Prints memory and time of the loss with its gradients."""
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(hidden, matrix).compile()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        jax.block_until_ready(compiled(hidden, matrix))
        seconds.append(time.perf_counter() - started)
    memory = compiled.memory_analysis()
    assert memory is not None
    print(f"{name:8s} {memory.temp_size_in_bytes / 2**20:10,.0f} MiB {min(seconds):8.2f} s")


def _loss(hidden: Array, matrix: Array, targets: Array) -> Float[Array, ""]:
    predictions = Predictions(hidden, Unembedding(matrix, "float32", 0.0))
    return token_loss.token_loss(predictions, targets, jnp.ones(targets.shape), FACTORS)[0]


def _loss_twice(hidden: Array, matrix: Array, targets: Array, chunk: int) -> Float[Array, ""]:
    @jax.checkpoint
    def of_chunk(part: Array, ids: Array) -> Array:
        figures = token_loss.figures_of(Unembedding(matrix, "float32", 0.0).logits(part), ids)
        return FACTORS.nll * jnp.sum(figures.nll) + FACTORS.z * jnp.sum(jnp.square(figures.log_normalizer))

    count = next(n for n in range(-(-targets.size // chunk), targets.size + 1) if targets.size % n == 0)
    parts = (x.reshape(count, -1, *x.shape[2:]) for x in (hidden, targets))
    return jnp.sum(jax.lax.map(lambda part: of_chunk(*part), tuple(parts)))


if __name__ == "__main__":
    main()
