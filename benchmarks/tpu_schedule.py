"""What TPUs would execute for DARK attention, the scan and the Pallas kernels, by their compiler's schedule.

    python -m benchmarks.tpu_schedule --out=docs/results/tpu_schedule.json           # the table; needs no TPU
    python -m benchmarks.tpu_schedule --chips=v5e --dims=128 --forms=kernel          # part of it
    python -m benchmarks.tpu_schedule --window=256 --sinks=4                         # the hybrid instead
    python -m benchmarks.tpu_schedule --golden=tests/aot/tpu_schedule.json           # renews what a test compares

`dark_attention` in bfloat16, batch 1, 8 query heads, 256 features, is compiled for one chip by libtpu
(`bash launch/install.sh aot`), and the VLIW bundles of the program are counted. Nothing runs, and no time is measured.

Counted: one cycle per bundle, loops as often as they have steps (tpu_bundles.py says how), for everything that XLA or a
kernel computes, the copies of q, k, v and out from [B, L, H, d] to heads in front included (`besides`), which a whole
layer may spare. Not counted: waiting for memory or for the matrix units, messages to HBM that no bundle waits for,
scalar work between instructions. So `by bundles` is a lower bound of the time.

    chunk          tokens of a chunk
    per chunk      bundles per chunk and key/value head: kernels one by one, of the scan a share of its loops. What a
                   head's first and last chunk need besides is in the times, not what float32 asks to do again
    kernels, besides, by bundles    ms: bundles / clock, of kernels, of all else, and their sum
    XLA            ms: the compiler's own estimate, which it makes without looking at bundles, and not of kernels
    roofline       ms: the larger of FLOPs / peak and bytes / bandwidth, q, k, v and out in HBM once; gradients need
                   twice the FLOPs of the forward pass more, what is computed again is not counted as needed
    share          roofline / by bundles; so at most this share of the chip is reached
    spills         stores and loads of vector registers per chunk, as `per chunk`
    VMEM           MiB that the hungriest kernel, or of the scan instruction, asks for; a kernel may have 48
"""

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from benchmarks.roofline import forward_flops
from benchmarks.tpu_bundles import Program, read_program, record_bundles
from darkformer_jax import dark_attention
from darkformer_jax.aot.roofline import chip_of
from darkformer_jax.aot.topology import topology_devices
from darkformer_jax.errors import UserError
from darkformer_jax.model.flops import peak_flops
from darkformer_jax.ops.pallas_tpu import chunk_of

FEATURES = 256
KV_HEADS = {64: 8, 128: 8, 256: 1}  # of 8 query heads, by their size
CLOCKS = {"v5e": 1.5e9, "v6e": 1.75e9}  # in Hz, at which all matrix units together have the published peak
FORMS, PASSES = ("scan", "kernel"), ("forward", "forward+backward")
SLACK = 0.03


@dataclasses.dataclass(frozen=True)
class Case:
    """A program. Batch 1."""

    chip: str
    dim: int
    form: str
    passes: str
    length: int = 8192
    heads: int = 8
    kv_heads: int = 8
    gates: bool = False
    window: int = 0
    sinks: int = 0

    @property
    def chunk(self) -> int:
        """Without a window, the kernel chooses its own; the scan gets the same."""
        return chunk_of(self.heads // self.kv_heads)

    @property
    def conditions(self) -> int:
        """Of a kernel: its first chunk; of features everywhere, one that `pallas_safe` does again; its last chunk."""
        return 2 if self.window else 3

    @property
    def name(self) -> str:
        heads = f"{self.heads} heads" if self.heads == self.kv_heads else f"{self.heads} to {self.kv_heads} heads"
        gates = ", gates" if self.gates else ""
        window = f", window {self.window}, {self.sinks} sinks" if self.window else ""
        return f"{self.chip}, d {self.dim}, {heads}{gates}{window}, {self.form}, {self.passes}"


# What the test compiles. XLA puts less of a large program in VMEM, whose kernels have some bundles more per chunk.
GOLDEN = (
    Case("v5e", 128, "kernel", "forward+backward", length=1024, heads=2, kv_heads=2),
    Case("v6e", 64, "kernel", "forward+backward", length=1024, heads=2, kv_heads=2),
    Case("v5e", 128, "kernel", "forward+backward", length=1024, heads=2, kv_heads=2, window=256, sinks=4),
)


def compile_case(case: Case, directory: Path) -> tuple[Program, str]:
    """The program, and the kind of its device. `directory` is that of `record_bundles`."""
    device = topology_devices(f"{case.chip}:1x1")[0]
    mesh = Mesh(np.array([device]), ("x",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    of = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)
    q, k = (of(1, case.length, heads, case.dim) for heads in (case.heads, case.kv_heads))
    w, geometry = (of(case.kv_heads, rows, case.dim, dtype=jnp.float32) for rows in (FEATURES, case.dim))
    options: dict[str, Any] = {"backend": "pallas"} if case.form == "kernel" else {}
    if case.form == "scan" or case.window:
        options["chunk_size"] = case.chunk
    if case.window:
        options |= {"window": case.window, "num_sinks": case.sinks, "window_kernel": "softmax"}
    learned = [geometry, *([of(1, case.length, case.kv_heads, dtype=jnp.float32)] if case.gates else [])]

    def forward(w: Array, q: Array, k: Array, v: Array, geometry: Array, log_decay: Array | None = None) -> Array:
        return dark_attention(q, k, v, projections=w, geometry=geometry, log_decay=log_decay, **options)

    def both(w: Array, out: Array, *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
        """With the gradients of q, k, v, M and the gates, by that of out."""
        result, pull_back = jax.vjp(lambda *arrays: forward(w, *arrays), *arrays)
        return result, pull_back(out)

    with jax.set_mesh(mesh):
        if case.passes == "forward":
            lowered = jax.jit(forward).lower(w, q, k, k, *learned)
        else:
            lowered = jax.jit(both).lower(w, q, q, k, k, *learned)
        hlo = lowered.compile().as_text()
    assert hlo is not None
    return read_program(hlo, directory, case.conditions), device.device_kind


def figures_of(case: Case, program: Program, device_kind: str) -> dict[str, Any]:
    """A row of the table, as --out writes it."""
    chunks = case.kv_heads * -(-case.length // case.chunk)
    loops = program.besides_in_loops
    steps = [kernel.schedule.step for kernel in program.kernels]
    ms = lambda cycles: 1e3 * cycles / CLOCKS[case.chip]
    conditional = [[count.bundles for count in kernel.schedule.conditional] for kernel in program.kernels]
    again = [] if case.window else [bundles.pop(1) for bundles in conditional]
    kernels = sum(kernel.times * kernel.schedule.total.bundles for kernel in program.kernels)
    kernels += case.kv_heads * sum(map(sum, conditional))
    by_bundles = ms(kernels + program.besides.bundles)
    flops, num_bytes = needs(case)
    peak = peak_flops(device_kind)
    assert peak is not None
    least = 1e3 * max(flops / peak, num_bytes / chip_of(device_kind).hbm_bandwidth)
    return dataclasses.asdict(case) | {
        "chunk": case.chunk,
        "bundles_per_chunk": [step.bundles for step in steps] or [round(loops.bundles / chunks)],
        "spills_per_chunk": [step.spills + step.fills for step in steps]
        or [round((loops.spills + loops.fills) / chunks)],
        "bundles_of_kernels": kernels,
        "bundles_done_again": again,
        "bundles_besides": program.besides.bundles,
        "kernels_ms": ms(kernels),
        "besides_ms": ms(program.besides.bundles),
        "by_bundles_ms": by_bundles,
        "xla_estimate_ms": None if program.kernels else ms(program.estimated_cycles),
        "roofline_ms": least,
        "flops": flops,
        "bytes": num_bytes,
        "share": least / by_bundles,
        "vmem_bytes": max((kernel.vmem_bytes for kernel in program.kernels), default=program.vmem_bytes),
        "loops_counted_once": program.unknown_loops,
    }


def needs(case: Case) -> tuple[float, float]:
    """The FLOPs and the bytes of HBM that the mathematics needs: q, k, v, out, and their gradients, each once."""
    flops = forward_flops(case.length, case.heads, case.kv_heads, case.dim, FEATURES, case.chunk, case.window)
    arrays = 2 * 2 * case.length * case.dim * (case.heads + case.kv_heads)
    # Backward: q, k, v, out and its gradient are read, dq, dk and dv are written.
    again = 2 * case.length * case.dim * (4 * case.heads + 4 * case.kv_heads)
    return (flops, arrays) if case.passes == "forward" else (3 * flops, arrays + again)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    names = "chip | d | heads | form | pass | chunk | per chunk | kernels | besides | by bundles | XLA | roofline"
    lines = [f"| {names} | share | spills | VMEM |", "|" + "---|" * 15]
    joined = lambda numbers: " + ".join(f"{number:,}" for number in numbers)
    for row in rows:
        heads = f"{row['heads']}:{row['kv_heads']}"
        estimate = "" if row["xla_estimate_ms"] is None else f"{row['xla_estimate_ms']:.2f}"
        times = [f"{row[name]:.3f}" for name in ("kernels_ms", "besides_ms", "by_bundles_ms")]
        times[0] = times[0] if row["bundles_of_kernels"] else ""
        cells = [row["chip"], row["dim"], heads, row["form"], row["passes"], row["chunk"]]
        cells += [
            joined(row["bundles_per_chunk"]),
            *times,
            estimate,
            f"{row['roofline_ms']:.3f}",
            f"{row['share']:.0%}",
        ]
        cells += [joined(row["spills_per_chunk"]), f"{row['vmem_bytes'] / 2**20:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def compilers() -> str:
    """Whose figures these are."""
    return f"jax {metadata.version('jax')}, libtpu {metadata.version('libtpu')}"


def golden_figures(program: Program) -> dict[str, dict[str, int]]:
    """What a change of the kernels must not make grow, per kernel and chunk."""
    forward, backward = program.kernels
    figures = {}
    for name, kernel in (("forward", forward), ("backward", backward)):
        step = kernel.schedule.step
        counted = {"bundles": step.bundles, "spills": step.spills + step.fills, "vmem_bytes": kernel.vmem_bytes}
        figures[name] = counted
    return figures


def grown(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The figures of `golden_figures`, by case, that are more than 3% larger now; a case that is missing counts."""
    found = []
    for case, kernels in before.items():
        if case not in now:
            found.append(f"{case}: not compiled")
            continue
        for kernel, figures in kernels.items():
            for name, value in figures.items():
                if now[case][kernel][name] > (1 + SLACK) * value:
                    found.append(f"{case}, {kernel}: {value:,} {name}, now {now[case][kernel][name]:,}")
    return found


def write_golden(path: Path, directory: Path) -> None:
    """Writes the figures of these compilers into the file; those of others stay."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known[compilers()] = {case.name: golden_figures(compile_case(case, directory)[0]) for case in GOLDEN}
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    print(f"figures of {compilers()} written to {path}")


def write_table(flags: argparse.Namespace, directory: Path) -> None:
    """Compiles and prints what the flags name."""
    print(
        f"{compilers()}: what was compiled, not run; bfloat16, batch 1, L = {flags.length:,}, {FEATURES} features"
        + (", gates" if flags.gates else "")
        + (f", a window of {flags.window} and {flags.sinks} sinks" if flags.window else "")
    )
    rows = []
    for chip, dim, form, passes in itertools.product(flags.chips, flags.dims, flags.forms, flags.passes):
        sizes = {"length": flags.length, "kv_heads": KV_HEADS[dim], "window": flags.window, "sinks": flags.sinks}
        case = Case(chip, dim, form, passes, gates=flags.gates, **sizes)
        print(f"compiling {case.name}", file=sys.stderr)
        rows.append(figures_of(case, *compile_case(case, directory)))
    print(table(rows))
    once = sum(row["loops_counted_once"] for row in rows)
    if once:
        print(f"\n{once} loops of copies, whose length is known at run time only, are counted once.")
    if flags.out:
        flags.out.write_text(json.dumps({"compilers": compilers(), "rows": rows}, indent=1) + "\n")
        print(f"\nwritten to {flags.out}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tpu_schedule",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    lists: dict[str, Sequence[Any]] = {
        "chips": tuple(CLOCKS),
        "dims": tuple(KV_HEADS),
        "forms": FORMS,
        "passes": PASSES,
    }
    for name, allowed in lists.items():
        text = ",".join(map(str, allowed))
        parser.add_argument(f"--{name}", default=text, help="comma-separated (default %(default)s, which is all)")
    parser.add_argument("--length", type=int, default=8192, help="tokens (default %(default)s)")
    parser.add_argument("--gates", action="store_true", help="with a log decay per token and key/value head")
    parser.add_argument("--window", type=int, default=0, help="tokens with an exact kernel, in chunks (default none)")
    parser.add_argument("--sinks", type=int, default=0, help="first tokens with an exact kernel (default none)")
    parser.add_argument("--out", type=Path, help="also write the table to this JSON file")
    parser.add_argument("--golden", type=Path, help="instead: write the figures of small kernels to this JSON file")
    flags = parser.parse_args(arguments)
    for name, allowed in lists.items():
        given = getattr(flags, name).split(",")
        unknown = [value for value in given if value not in map(str, allowed)]
        if unknown:
            parser.error(f"--{name}: unknown {', '.join(unknown)}; allowed: {', '.join(map(str, allowed))}")
        setattr(flags, name, [value for value in allowed if str(value) in given])
    if flags.sinks and not flags.window:
        parser.error(f"--sinks={flags.sinks} needs a --window")
    if flags.gates and flags.window and "kernel" in flags.forms:
        parser.error("--gates with --window: the kernels do not have both; allowed: --forms=scan")
    if flags.length < 1:
        parser.error(f"--length={flags.length}: must be at least 1")
    for name in ("out", "golden"):
        path = getattr(flags, name)
        if path and not path.absolute().parent.is_dir():
            parser.error(f"--{name}={path}: there is no directory {path.absolute().parent}")
    return flags


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what the flags ask for. In a process of its own: libtpu reads once where it shall write."""
    flags = parse(arguments)
    # Programs for a chip that is not attached cannot be read back from a cache, and bundles are written by compiling.
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_disable_most_optimizations", False)
    with tempfile.TemporaryDirectory() as directory:
        record_bundles(Path(directory))
        try:
            topology_devices("v5e:1x1")  # which refuses where there is no libtpu
            if flags.golden:
                write_golden(flags.golden, Path(directory))
            else:
                write_table(flags, Path(directory))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
