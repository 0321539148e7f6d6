"""Linear layers: the same numbers in both forms, and on one CPU nothing but products of two matrices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from darkformer_jax.mixers import layers
from darkformer_jax.mixers.layers import Linear

# (shape of the kernel, axes that x and the kernel share)
KERNELS = [((12, 2, 5), 1), ((3, 4, 10), 2)]


def loss_of(shape, num_inputs, rank):
    """(sum of tanh of a layer's output, the kernel, x [2, 7, inputs])."""
    axes = (None,) * len(shape)
    layer = Linear(shape, axes, num_inputs=num_inputs, rank=rank, rngs=nnx.Rngs(0), dtype=jnp.float32)
    graph, arrays = nnx.split(layer)
    if rank:
        arrays["lora_B"][...] = jax.random.normal(jax.random.key(2), arrays["lora_B"].shape)
    x = jax.random.normal(jax.random.key(1), (2, 7, *shape[:num_inputs]))
    return lambda arrays, x: jnp.sum(jnp.tanh(nnx.merge(graph, arrays)(x))), arrays, x


def products(loss, *arguments):
    """The ranks of the operands of each product in the program of the gradients."""
    text = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).as_text()
    found = re.findall(r"dot_general .*?: \(tensor<([^>]*)>, tensor<([^>]*)>\)", text)
    return [tuple(operand.count("x") for operand in operands) for operands in found]


@pytest.mark.parametrize(("shape", "num_inputs", "rank"), [(*KERNELS[0], 2), (*KERNELS[1], 0)])
def test_both_forms_of_a_layer_have_the_same_output_and_gradients(monkeypatch, shape, num_inputs, rank):
    loss, *arguments = loss_of(shape, num_inputs, rank)
    rows = jax.jit(jax.value_and_grad(loss, (0, 1)))(*arguments)
    monkeypatch.setattr(layers, "is_cpu_of_rows", lambda: False)
    apart = jax.jit(jax.value_and_grad(loss, (0, 1)))(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), rows, apart)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(rows))


@pytest.mark.parametrize(("shape", "num_inputs"), KERNELS)
def test_on_cpus_all_products_are_of_two_matrices(shape, num_inputs):
    ranks = products(*loss_of(shape, num_inputs, rank=0))
    assert ranks == [(2, 2)] * 3


def test_axes_that_may_be_split_over_devices_stay_apart(monkeypatch):
    def has_rows(shape, names):
        with jax.sharding.use_abstract_mesh(AbstractMesh(shape, names)):
            return layers.is_cpu_of_rows()

    assert layers.is_cpu_of_rows() and has_rows((1,), ("data",)) and has_rows((2,), ("data",))
    assert has_rows((2, 1), ("data", "context"))
    assert not has_rows((2, 2), ("data", "context")) and not has_rows((2,), ("heads",))
    monkeypatch.setattr(layers, "is_cpu_of_rows", lambda: False)
    assert products(*loss_of(*KERNELS[0], rank=0))[0] == (3, 3)
