"""Loss, bits per byte and next-token accuracy: of the held-out split, and by place in a window of any text."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from darkformer_jax.distributed.sharding import part_of_process
from darkformer_jax.model.network import Network
from darkformer_jax.training.step import Batch, Metrics, loss_sums

QUARTERS = 4


class Evaluation(NamedTuple):
    """What a model makes of held-out text."""

    loss: float  # nats a token
    bits_per_byte: float  # of the text, whatever its tokenizer
    accuracy: float  # share of tokens whose successor has the largest logit
    tokens: int

    def as_metrics(self) -> dict[str, float]:
        """Names for metrics.jsonl."""
        return {f"heldout_{name}": value for name, value in self._asdict().items()}

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}  bits per byte {self.bits_per_byte:.4f}  accuracy {100 * self.accuracy:.2f}%"


def make_eval_step(network: Network) -> Callable[[dict, dict, Batch], Metrics]:
    """(params, projections, batch) -> sums over the batch's real tokens, jitted."""

    def eval_step(params: dict, projections: dict, batch: Batch) -> Metrics:
        return loss_sums(network, params, projections, batch)

    return jax.jit(eval_step)


def make_quarter_step(network: Network) -> Callable[[dict, dict, Batch], Metrics]:
    """(params, projections, batch) -> `nll`, `correct` and `weight`, each summed within the quarters of the rows: [4].

    Quarter j of rows of L tokens has the places j * ceil(L / 4) .. (j + 1) * ceil(L / 4) - 1. The logits of one
    quarter are held at a time: for a large vocabulary they are most of an evaluation's memory.
    """

    def quarter_step(params: dict, projections: dict, batch: Batch) -> Metrics:
        model = network.bind(params, projections)
        hidden, _ = model.hidden(batch["inputs"], batch["segment_ids"], batch["positions"])

        def split(x: jax.Array) -> jax.Array:  # [b, L, ...] -> [4, b, ceil(L / 4), ...]
            missing = -x.shape[1] % QUARTERS
            x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
            return jnp.moveaxis(x.reshape(x.shape[0], QUARTERS, -1, *x.shape[2:]), 1, 0)

        def sums(quarter: tuple[jax.Array, jax.Array, jax.Array]) -> Metrics:
            states, targets, weights = quarter
            logits = model.logits(states)
            target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
            nll = jax.nn.logsumexp(logits, axis=-1) - target_logits
            correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
            return {
                "nll": jnp.sum(weights * nll),
                "correct": jnp.sum(weights * correct),
                "weight": jnp.sum(weights),
            }

        return jax.lax.map(sums, (split(hidden), split(batch["targets"]), split(batch["weights"])))

    return jax.jit(quarter_step)


def evaluate(
    eval_step: Callable[[dict, dict, Batch], Metrics],
    params: dict,
    projections: dict,
    batches: Iterable[dict[str, np.ndarray]],
    sharding: NamedSharding,
    tokens_per_byte: float,
) -> Evaluation:
    """Means over `batches`. `tokens_per_byte` is of the whole split: predicted tokens over bytes of its text."""
    totals = {"nll": 0.0, "correct": 0.0, "weight": 0.0}
    pending: Metrics | None = None
    for batch in batches:
        sums = eval_step(params, projections, put_batch(batch, sharding))
        _add(totals, pending)  # of the batch before: the device is never waited for
        pending = sums
    _add(totals, pending)
    tokens = max(totals["weight"], 1.0)
    loss = totals["nll"] / tokens
    return Evaluation(loss, loss / math.log(2) * tokens_per_byte, totals["correct"] / tokens, int(totals["weight"]))


def put_batch(batch: dict[str, np.ndarray], sharding: NamedSharding) -> Batch:
    """The global batch, of which this process has read the rows that are its part (`part_of_process`)."""
    count = part_of_process(sharding).count

    def place(rows: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, rows, (len(rows) * count, rows.shape[1]))

    return {name: place(rows) for name, rows in batch.items()}


def _add(totals: dict[str, float], sums: Metrics | None) -> None:
    if sums is not None:
        for name in totals:
            totals[name] += float(sums[name])
