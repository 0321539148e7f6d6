"""The contenders of benchmarks/attention.py: causal attention in JAX and PyTorch, built for one problem."""

import functools
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # on a GPU the peers need memory too

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from darkformer_jax import dark_attention, draw_projections
from darkformer_jax.distributed.platform import computes_on_cpu, num_cores
from darkformer_jax.ops.attend import Backend

BATCH, HEADS, HEAD_DIM, FEATURES = 1, 8, 64, 256
CHUNK = 64  # the fastest of 32, 64, 128 and 256 on CPUs, for forward passes of both forms
MEMORY_SHARE = 0.7  # of the free memory that one contender may take


class Skipped(Exception):
    """Why a contender is left out."""


class Problem(NamedTuple):
    """The problem that is timed."""

    length: int
    backward: bool
    dtype: str  # float32 or bfloat16


Run = Callable[[], object]  # does it once and waits for the result
Row = dict[str, Any]


# ---- memory


def free_bytes() -> float:
    """Bytes of free memory on the device, or on the host if the device is the host; infinite if they are unknown."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def require_memory(needed: float) -> None:
    """Raises Skipped if `needed` bytes are more than this run may take."""
    free = free_bytes()
    if needed > MEMORY_SHARE * free:
        raise Skipped(f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")


# ---- contenders in JAX


def jax_run(attend: Callable[..., Array], inputs: tuple[Array, ...], backward: bool) -> Run:
    """Compiles attend(*inputs), with its gradients if asked, and checks the memory that it will need."""
    cotangent = jax.random.normal(jax.random.key(1), inputs[0].shape).astype(inputs[0].dtype)
    cotangent = jax.device_put(cotangent, inputs[0].sharding)

    def forward_backward(inputs: tuple[Array, ...], cotangent: Array) -> tuple[Array, tuple[Array, ...]]:
        out, pull_back = jax.vjp(attend, *inputs)
        return out, pull_back(cotangent)

    if backward:
        compiled = jax.jit(forward_backward).lower(inputs, cotangent).compile()
        arguments: tuple[Any, ...] = (inputs, cotangent)
    else:
        compiled = jax.jit(attend).lower(*inputs).compile()
        arguments = inputs
    memory = compiled.memory_analysis()
    if memory is not None:  # not every backend knows
        require_memory(memory.temp_size_in_bytes + memory.output_size_in_bytes)
    return lambda: jax.block_until_ready(compiled(*arguments))


def jax_inputs(length: int, dtype: str) -> tuple[Array, Array, Array]:
    """q, k and v, [B, L, H, d]."""
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (BATCH, length, HEADS, HEAD_DIM)
    q, k, v = (jax.random.normal(key, shape).astype(dtype) for key in keys)
    return q, k, v


def kernel_parameters() -> tuple[Array, Array]:
    """Projections [H, m, d] and a geometry [H, d, d] near the identity."""
    projections = draw_projections(jax.random.key(2), FEATURES, HEAD_DIM, num_heads=HEADS)
    noise = jax.random.normal(jax.random.key(3), (HEADS, HEAD_DIM, HEAD_DIM))
    return projections, jnp.eye(HEAD_DIM)[None] + 0.02 * noise


def ours_attend(window: int, backend: Backend = "scan") -> Callable[..., Array]:
    """`dark_attention` as a function (q, k, v, M[, log decay]) -> out."""
    projections, _ = kernel_parameters()

    def attend(q: Array, k: Array, v: Array, geometry: Array, log_decay: Array | None = None) -> Array:
        arrays: dict[str, Any] = {"projections": projections, "geometry": geometry, "log_decay": log_decay}
        return dark_attention(q, k, v, **arrays, chunk_size=CHUNK, window=window, backend=backend)

    return attend


def build_ours(problem: Problem, window: int, decay: str = "", backend: Backend = "scan") -> Run:
    """`dark_attention`. decay: "slopes" = a log decay per head, "gates" = one per token and head."""
    inputs: tuple[Array, ...] = (*jax_inputs(problem.length, problem.dtype), kernel_parameters()[1])
    if decay:
        shape = (BATCH, problem.length, HEADS) if decay == "gates" else (HEADS,)
        inputs = (*inputs, -0.1 * jax.random.exponential(jax.random.key(4), shape))
    return jax_run(ours_attend(window, backend), inputs, problem.backward)


def start_devices_for_cores() -> None:
    """Before JAX starts: on CPUs, a device for each core, or fewer if the heads do not divide by so many."""
    if computes_on_cpu():
        jax.config.update("jax_num_cpu_devices", _over(num_cores()))


def _over(most: int) -> int:
    return max(n for n in range(1, most + 1) if HEADS % n == 0)


def build_ours_on_cores(problem: Problem, window: int) -> Run:
    """`ours` with its heads divided over the devices: on CPUs, over the cores."""
    number = _over(len(jax.devices()))
    if number == 1:
        raise Skipped("there is one device, and heads are divided over several")
    mesh = jax.make_mesh((number,), ("heads",), devices=jax.devices()[:number])
    of_tokens, of_heads = P(None, None, "heads"), P("heads")

    def one_device(q: Array, k: Array, v: Array, geometry: Array, projections: Array) -> Array:
        return dark_attention(q, k, v, projections=projections, geometry=geometry, chunk_size=CHUNK, window=window)

    specs = (of_tokens, of_tokens, of_tokens, of_heads, of_heads)
    every_device = jax.shard_map(one_device, mesh=mesh, in_specs=specs, out_specs=of_tokens)
    projections, geometry = kernel_parameters()
    *inputs, projections = (
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in zip((*jax_inputs(problem.length, problem.dtype), geometry, projections), specs, strict=True)
    )
    attend = lambda q, k, v, geometry: every_device(q, k, v, geometry, projections)
    return jax_run(attend, tuple(inputs), problem.backward)


def build_exact_jax(problem: Problem) -> Run:
    """`jax.nn.dot_product_attention`; for half precision on a GPU, its cuDNN flash attention."""
    fused = problem.dtype != "float32" and jax.default_backend() == "gpu"
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn" if fused else "xla")
    return jax_run(attend, jax_inputs(problem.length, problem.dtype), problem.backward)


# ---- contenders in PyTorch


def torch_run(attend: Callable[..., Any], problem: Problem, parameters: Sequence[Any] = ()) -> Run:
    """attend(q, k, v) on [B, H, L, d], with gradients of q, k, v and `parameters` if asked."""
    import torch

    device = torch_device()
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, HEADS, problem.length, HEAD_DIM)
    dtype = getattr(torch, problem.dtype)
    q, k, v, cotangent = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_(problem.backward)

    def run() -> object:
        with torch.set_grad_enabled(problem.backward):
            result = attend(q, k, v)
            if problem.backward:
                result = (result, torch.autograd.grad(result, (q, k, v, *parameters), cotangent))
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return run


def torch_device() -> str:
    """The device for torch: the one that JAX runs on. Raises Skipped if torch cannot use it."""
    if importlib.util.find_spec("torch") is None:
        raise Skipped("torch is not installed")
    import torch

    torch.set_num_threads(num_cores())  # of itself it would not see a container's quota
    if jax.default_backend() == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        raise Skipped(f"this torch cannot use the device that JAX runs on ({jax.default_backend()})")
    return "cuda"


def build_sdpa(problem: Problem) -> Run:
    """torch's fused exact attention."""
    torch_device()
    from torch.nn.functional import scaled_dot_product_attention

    return torch_run(functools.partial(scaled_dot_product_attention, is_causal=True), problem)


def build_darkformer_pytorch(problem: Problem) -> Run:
    """Features everywhere, learned geometry per head, its default chunk of 256, no redraw."""
    device = torch_device()
    if importlib.util.find_spec("darkformer_pytorch") is None:
        raise Skipped("darkformer-pytorch is not installed")
    import torch
    from darkformer_pytorch import DarkformerKernelAttention

    module = DarkformerKernelAttention(
        HEAD_DIM, HEADS, num_features=FEATURES, causal=True, attention_mode="linear", projection_seed=0
    )
    module = module.to(device, getattr(torch, problem.dtype)).eval()
    return torch_run(module, problem, [module.geometry])


def build_performer_pytorch(problem: Problem) -> Run:
    """Its causal path without the extra CUDA extension, which is what `pip install performer-pytorch` gives."""
    device = torch_device()
    if importlib.util.find_spec("performer_pytorch") is None:
        raise Skipped("performer-pytorch is not installed")
    if problem.backward:  # it keeps a running [m, d] product per token for the backward pass, and its gradient
        require_memory(2.0 * problem.length * BATCH * HEADS * FEATURES * HEAD_DIM * jnp.dtype(problem.dtype).itemsize)
    import torch
    from performer_pytorch import FastAttention

    module = FastAttention(HEAD_DIM, nb_features=FEATURES, causal=True)
    module = module.to(device, getattr(torch, problem.dtype)).eval()
    return torch_run(module, problem)


CONTENDERS: dict[str, Callable[[Problem], Run]] = {
    "ours": functools.partial(build_ours, window=0),
    "ours-hybrid": functools.partial(build_ours, window=CHUNK),
    "ours-cores": functools.partial(build_ours_on_cores, window=0),
    "hybrid-cores": functools.partial(build_ours_on_cores, window=CHUNK),
    "ours-parallel": functools.partial(build_ours, window=0, backend="parallel"),
    "hybrid-parallel": functools.partial(build_ours, window=CHUNK, backend="parallel"),
    "ours-slopes": functools.partial(build_ours, window=0, decay="slopes"),
    "ours-gates": functools.partial(build_ours, window=0, decay="gates"),
    "hybrid-slopes": functools.partial(build_ours, window=CHUNK, decay="slopes"),
    "hybrid-gates": functools.partial(build_ours, window=CHUNK, decay="gates"),
    "exact-jax": build_exact_jax,
    "exact-torch": build_sdpa,
    "darkformer-pytorch": build_darkformer_pytorch,
    "performer-pytorch": build_performer_pytorch,
}
