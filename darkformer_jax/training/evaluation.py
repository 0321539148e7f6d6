"""Measures a model on held-out batches: sums over them, and values of their rows."""

import functools
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from darkformer_jax.distributed.sharding import part_of_process
from darkformer_jax.model.network import Network
from darkformer_jax.tasks.measured import Measured, measure_all
from darkformer_jax.tasks.task import Batch, Objective, Sums


def make_eval_step(
    network: Network, objective: Objective, mesh: Mesh
) -> Callable[[dict, dict, Batch], tuple[Sums, dict[str, jax.Array]]]:
    """(params, projections, batch) -> what `objective.measure` returns, jitted; every device gets all rows."""
    everywhere = NamedSharding(mesh, P())

    def eval_step(params: dict, projections: dict, batch: Batch) -> tuple[Sums, dict[str, jax.Array]]:
        sums, rows = objective.measure(network.bind(params, projections), batch)
        return sums, jax.lax.with_sharding_constraint(rows, everywhere)

    return jax.jit(eval_step)


def measure(
    eval_step: Callable[[dict, dict, Batch], tuple[Sums, dict[str, jax.Array]]],
    params: dict,
    projections: dict,
    batches: Iterable[Mapping[str, np.ndarray]],
    sharding: NamedSharding,
) -> Measured:
    """`measure_all` of batches on the host, of which each process has read its part."""
    global_batches = (put_batch(batch, sharding) for batch in batches)
    return measure_all(functools.partial(eval_step, params, projections), global_batches)


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> Batch:
    """The global batch, from the rows that this process has read, its part (`part_of_process`).

    sharding: that of arrays [rows, places]; arrays without places are split by rows alone.
    """
    count = part_of_process(sharding).count

    def place(rows: np.ndarray) -> jax.Array:
        shape = (len(rows) * count, *rows.shape[1:])
        return jax.make_array_from_process_local_data(rows_sharding(sharding, rows.ndim), rows, shape)

    return {name: place(rows) for name, rows in batch.items()}


def rows_sharding(sharding: NamedSharding, rank: int) -> NamedSharding:
    """The first axes of a batch's sharding, for an array of this rank."""
    return NamedSharding(sharding.mesh, P(*sharding.spec[:rank]))
