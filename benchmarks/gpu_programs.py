"""How many programs a GPU starts for one call of `dark_attention`, what they write, and how much memory they take.

    bash launch/install.sh gpu         # XLA's compiler for NVIDIA's GPUs; it needs no GPU
    python -m benchmarks.gpu_programs --out=docs/results/gpu_programs.json

Nothing runs. XLA compiles for an H100 that is not there, whose sizes are below, and the benchmark counts what its
program starts, loops by their iterations: a start costs a GPU some microseconds, however little is done. What is
written counts each output once, those of an update in place as the whole array: loops look worse than they are.
--layers=3 counts three calls one after another: their memory shows what is kept for the backward pass.
"""

import argparse
import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from tqdm import tqdm

from darkformer_jax import dark_attention
from darkformer_jax.aot.hlo import computations, trip_count
from darkformer_jax.ops.attend import Backend
from darkformer_jax.tasks.table import table_lines

# NVIDIA's figures for the H100 SXM, in the form that XLA's compiler reads.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072 clock_rate_ghz: 1.98
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
SIZES = {"length": 8192, "heads": 8, "dim": 128, "features": 256, "chunk": 128, "layers": 1}
FORMS: dict[str, dict[str, Any]] = {
    "features": {},
    "hybrid": {"window": 256, "num_sinks": 4, "window_kernel": "softmax"},
}
NOTHING = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "iota",
    "after-all",
    "fusion-done",
    "copy-done",
}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?\S+ = (.*?) ([\w-]+)\(")
_SHAPE = re.compile(r"\b(pred|[a-z]+(\d+))\[([\d,]*)\]")
_BODY = re.compile(r"body=%?([\w.-]+)")
_CALLED = re.compile(r"to_apply=%?([\w.-]+)")


def count(hlo: str) -> tuple[int, float]:
    """(programs that are started, GiB that they write)."""
    bodies, entry = computations(hlo)
    found: Counter[str] = Counter()

    def walk(name: str, times: int) -> None:
        for line in bodies.get(name, []):
            if not (instruction := _INSTRUCTION.match(line)):
                continue
            outputs, kind = instruction.groups()
            if kind == "while" and (body := _BODY.search(line)):
                trips = trip_count(line, bodies)
                if trips is None:
                    raise ValueError(f"a loop of unknown length: {line.strip()[:80]}")
                walk(body[1], times * trips)
            elif kind == "call" and (called := _CALLED.search(line)):
                walk(called[1], times)
            elif kind not in NOTHING:
                found["starts"] += times
                found["bytes"] += times * _bytes(outputs)

    walk(entry, 1)
    return found["starts"], found["bytes"] / 2**30


def _bytes(outputs: str) -> int:
    total = 0
    for _, bits, sizes in _SHAPE.findall(outputs):
        number = int(bits or 8) // 8
        for size in filter(None, sizes.split(",")):
            number *= int(size)
        total += number
    return total


def measure(
    device: jax.Device, form: str, backend: Backend, with_gradients: bool, flags: argparse.Namespace
) -> dict[str, Any]:
    """The figures of one program."""
    sharding = SingleDeviceSharding(device)
    of = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    x = of(1, flags.length, flags.heads, flags.dim, dtype=jnp.bfloat16)
    xs = [x] * flags.layers

    def run(qs: Any, ks: Any, v: Any, w: Any, M: Any) -> Any:
        arrays = {"projections": w, "geometry": M}
        for q, k in zip(qs, ks, strict=True):  # each layer's values are the output of the one before
            v = dark_attention(q, k, v, **arrays, chunk_size=flags.chunk, backend=backend, **FORMS[form])
        return v

    def loss(*arrays: Any) -> Any:
        return jnp.sum(run(*arrays).astype(jnp.float32))

    program = jax.grad(loss, (0, 1, 2, 4)) if with_gradients else run
    compiled = jax.jit(program).lower(xs, xs, x, of(flags.features, flags.dim), of(flags.dim, flags.dim)).compile()
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    assert hlo is not None and memory is not None
    starts, written = count(hlo)
    passes = "forward+backward" if with_gradients else "forward"
    figures = {
        "starts": starts,
        "written_gib": round(written, 2),
        "temporary_mib": round(memory.temp_size_in_bytes / 2**20),
    }
    return {"form": form, "pass": passes, "backend": backend, **figures}


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles every form with both backends, prints a table, and writes all figures."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_programs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--out", type=Path, help="a file for all figures")
    flags = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")  # where there is no GPU, jax would stop at that
    try:
        (device,) = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1").devices
    except (RuntimeError, NotImplementedError) as error:
        parser.error(f"XLA cannot compile for GPUs here (bash launch/install.sh gpu): {str(error).splitlines()[0]}")
    backends: tuple[Backend, ...] = ("scan", "parallel")
    cases = list(itertools.product(FORMS, (False, True), backends))
    rows = []
    for form, with_gradients, backend in tqdm(cases, unit="program"):
        rows.append(measure(device, form, backend, with_gradients, flags))
    names = ("form", "pass", "backend", "starts", "written_gib", "temporary_mib")
    print(
        "\n".join(
            table_lines(
                [names, *([f"{row[name]:,}" if name == "starts" else str(row[name]) for name in names] for row in rows)]
            )
        )
    )
    if flags.out:
        sizes = {name: getattr(flags, name) for name in SIZES}
        flags.out.write_text(json.dumps({"jax": jax.__version__, **sizes, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
