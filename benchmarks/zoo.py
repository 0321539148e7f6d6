"""Every mixer as a layer: time, ratio to DARK, FLOPs, and the state that decoding carries, in one run.

    python -m benchmarks.zoo                                       # every kind, L = 1024, 4096, 16384
    python -m benchmarks.zoo --mixers='softmax;dark(window=64);mamba2' --lengths=2048 --repeats=9

A layer is x -> y with its projections and gates: batch 1, 2 heads of 64 in a width of 128, float32, chunks of 64 and 64
random features, as many as a head has dimensions. "forward+backward" has the gradients of x and of every parameter. The
layers take turns, so noise hits all of them; a ratio is the median over pairs from the same turn. The state is what is
kept of one sequence of that length between two tokens; encoders' mixers, which are not causal here, have none. A layer
that needs more than 70% of the free memory is left out.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from benchmarks.attention import environment, interleave
from benchmarks.contenders import Problem, Row, Run, Skipped, jax_run
from darkformer_jax.config import base
from darkformer_jax.config.specs import mixer_specs
from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from darkformer_jax.mixers.encoders import EncoderMechanism
from darkformer_jax.mixers.spec import MixerSpec
from darkformer_jax.model.state_size import state_bytes

WIDTH, HEADS, HEAD_DIM, FEATURES, CHUNK = 128, 2, 64, 64, 64
LENGTHS = (1024, 4096, 16384)
BASE = "dark"  # ratios are to this mixer, if it is among them
NEEDED = {"decay": "gate", "local_window": CHUNK, "window": CHUNK}


def spec_of(entry: str, length: int) -> MixerSpec:
    """The layer that a pattern's entry names, for sequences of `length` tokens. Raises UserError."""
    if not entry:
        raise UserError("--mixers: an entry is empty")
    config = base.get_config()
    model, attention = config.model, config.model.attention
    model.embed_dim, model.num_heads, model.num_kv_heads, model.head_dim = WIDTH, HEADS, HEADS, HEAD_DIM
    model.dtype = "float32"
    attention.pattern, attention.num_features, attention.chunk_size = entry, FEATURES, CHUNK
    attention.horizon = length
    specs = mixer_specs(config)
    if len(specs) != 1:
        raise UserError(f"--mixers: {entry!r} is {len(specs)} layers; allowed: one, and a semicolon before the next")
    mixer = MIXERS[specs[0].kind]
    spec = dataclasses.replace(specs[0], causal=not issubclass(mixer, EncoderMechanism))
    mixer.check(spec)
    return spec


def every_mixer() -> list[str]:
    """An entry for each kind, with what it needs, and for DARK behind a window."""
    entries = []
    for kind, mixer in MIXERS.items():
        needs = ",".join(f"{name}={NEEDED[name]}" for name in sorted(mixer.needs) if name in NEEDED)
        entries.append(f"{kind}({needs})" if needs else kind)
    return [*entries, f"dark(window={CHUNK})"]


def build(entry: str, problem: Problem) -> Run:
    """Compiles the layer for a problem. Raises Skipped where memory does not suffice."""
    spec = spec_of(entry, problem.length)
    parts: Any = nnx.split(MIXERS[spec.kind].build(spec, 0, rngs=nnx.Rngs(0)), nnx.Param, ...)
    definition, params, fixed = parts
    ids = jnp.ones((1, problem.length), jnp.int32)
    positions = jnp.arange(problem.length, dtype=jnp.int32)[None]

    def attend(x: jax.Array, params: nnx.State) -> jax.Array:
        return nnx.merge(definition, params, fixed)(x, ids, positions)[0]

    x = jax.random.normal(jax.random.key(0), (1, problem.length, WIDTH))
    return jax_run(attend, (x, params), problem.backward)


def measure(length: int, entries: Sequence[str], repeats: int, bar: tqdm) -> list[Row]:
    """A row per layer at one length."""
    specs = {entry: spec_of(entry, length) for entry in entries}
    rows: dict[str, Row] = {
        entry: {
            "mixer": entry,
            "length": length,
            "state_bytes": state_bytes(spec, length, jnp.float32) if spec.causal else None,
            "flops_per_token": MIXERS[spec.kind].flops(spec, length),
        }
        for entry, spec in specs.items()
    }
    for backward in (False, True):
        name = "forward+backward" if backward else "forward"
        bar.set_description(f"L={length} {name}")
        runs: dict[str, Run] = {}
        for entry in entries:
            try:
                runs[entry] = build(entry, Problem(length, backward, "float32"))
            except Skipped as reason:
                rows[entry][name] = {"skipped": str(reason)}
                bar.update(repeats + 1)
        seconds = interleave(runs, repeats, bar)
        for entry, own in seconds.items():
            figures: Row = {"median_ms": 1e3 * statistics.median(own), "runs_ms": [1e3 * s for s in own]}
            if BASE in runs:
                figures["ratio"] = statistics.median(a / b for a, b in zip(own, seconds[BASE], strict=False))
            rows[entry][name] = figures
    return list(rows.values())


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""

    def cell(figures: Row) -> str:
        if "skipped" in figures:
            return figures["skipped"]
        return f"{figures['median_ms']:,.0f}" + (f" ({figures['ratio']:.2f}x)" if "ratio" in figures else "")

    state = lambda size: "none" if size is None else f"{size / 1024:,.0f}"
    lines = [
        "| L | mixer | forward, ms | forward+backward, ms | state, KiB | MFLOP per token |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['length']:,} | `{row['mixer']}` | {cell(row['forward'])} | {cell(row['forward+backward'])} "
            f"| {state(row['state_bytes'])} | {row['flops_per_token'] / 1e6:.2f} |"
        )
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    entries = every_mixer()
    parser.add_argument("--mixers", default=";".join(entries), help="layers, semicolons between (default: %(default)s)")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each; medians are reported (default: 5)")
    parser.add_argument("--out", type=Path, help="also write every turn to this JSON file")
    flags = parser.parse_args(arguments)
    flags.mixers = flags.mixers.split(";")
    try:
        flags.lengths = [int(length) for length in flags.lengths.split(",")]
        if flags.repeats < 1 or min(flags.lengths) < 1:
            parser.error("--repeats and --lengths must be at least 1")
        for entry in flags.mixers:
            spec_of(entry, max(flags.lengths))
    except ValueError:
        parser.error(f"--lengths={flags.lengths}: expected whole numbers, comma-separated")
    except UserError as error:
        parser.error(str(error))
    if flags.out and not flags.out.absolute().parent.is_dir():
        parser.error(f"--out={flags.out}: there is no directory {flags.out.absolute().parent}")
    return flags


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table of each length as soon as it is there."""
    flags = parse(arguments)
    jax.config.update("jax_default_matmul_precision", "float32")
    machine = environment("float32") | {
        "sizes": {"width": WIDTH, "heads": HEADS, "head_dim": HEAD_DIM, "features": FEATURES, "chunk": CHUNK}
    }
    print(f"{machine['device']}, {machine['cpus']} CPUs, load {machine['load_average'][0]:.1f}")
    rows: list[Row] = []
    total = len(flags.lengths) * 2 * len(flags.mixers) * (flags.repeats + 1)
    with tqdm(total=total, disable=None, leave=False) as bar:
        for length in flags.lengths:
            part = measure(length, flags.mixers, flags.repeats, bar)
            text = table(part)
            tqdm.write(text if not rows else text.split("\n", 2)[2])
            rows += part
            if flags.out:
                flags.out.write_text(json.dumps({"environment": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
