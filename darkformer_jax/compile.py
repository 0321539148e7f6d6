"""Compiles a config's training step for TPUs that are not there: does it fit, and how fast can it be at best?

python -m darkformer_jax.compile --config=configs/lm_1b.py --topology=v5e:4x4
python -m darkformer_jax.compile --config=configs/lm_1b.py --topology=v5e:16x16 --num_slices=2 --config.mesh.fsdp=16

Without --config it takes the defaults. It compiles the program that train.py would run there, on the config's mesh, and
prints

    memory        what a device needs at the peak and what for, and what it has
    collectives   those of one step
    step time     the least that computing, memory traffic, the links within a slice and the network between slices
                  need, each as if it were alone

Exit status 1 means that the program does not fit. The verb needs libtpu, but no TPUs, and no data but a labelled
task's files, whose labels are the classes. Memory and collectives are the compiler's. The times come from the chips'
published figures; none was measured on a TPU.
"""

import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from absl import app, flags
from jax.experimental.compilation_cache import compilation_cache

from darkformer_jax.aot.collectives import Collective, collectives
from darkformer_jax.aot.roofline import GIB, Roofline, chip_of, roofline
from darkformer_jax.aot.topology import topology_devices
from darkformer_jax.cli.experiment_flags import define_whole_number, overridden_fields, parse_experiment_flags
from darkformer_jax.cli.output import lost_output_is_no_crash
from darkformer_jax.cli.parser import one_line_errors
from darkformer_jax.config import base
from darkformer_jax.config.usage import require_new_uses
from darkformer_jax.config.validation import validate
from darkformer_jax.errors import UserError, one_line
from darkformer_jax.model.flops import layers_flops
from darkformer_jax.runs.inherit import inherit
from darkformer_jax.tasks import TASKS
from darkformer_jax.training.experiment import Experiment, bytes_per_device

FLAGS = flags.FLAGS


class DoesNotFit(Exception):
    """The compiler found no way to run the program in a device's memory."""


def parse_flags(argv: list[str]) -> list[str]:
    """Defines and parses the flags; a mistake is one line and exit status 2."""
    return parse_experiment_flags(argv, "compile", __doc__, base.__file__, define_flags)


def define_flags() -> None:
    """Defines the flags beside --config."""
    flags.DEFINE_string("topology", "v5e:4x4", "Generation and shape in chips of one slice: v5e:16x16, v5p:4x4x4.")
    define_whole_number("num_slices", 1, "Number of such slices, with the data center's network between them.")


def main(argv: list[str]) -> None:
    """Prints the plan. Exit status: 1 if it does not fit, 2 after a mistake."""
    del argv
    with one_line_errors("nothing was written"):
        devices = topology_devices(FLAGS.topology, FLAGS.num_slices)
        try:
            print(plan(FLAGS.config, devices, FLAGS.topology, overridden_fields()))
        except DoesNotFit as error:
            print(f"does not fit: {error}")
            sys.exit(1)


def plan(
    config: ml_collections.ConfigDict, devices: list[jax.Device], topology: str, overridden: Sequence[str] = ()
) -> str:
    """The text that `main` prints.

    overridden: the fields that the command line sets; see `require_new_uses`.

    Raises:
      DoesNotFit: with the compiler's message.
      UserError: the config and the devices do not fit together.
    """
    config = inherit(config)
    validate(config, overridden)
    require_new_uses(config, overridden)
    for name in ("weight", "hidden_weight"):
        if config.distill[name]:
            raise UserError(f"distill.{name} = {config.distill[name]}: compile plans without a teacher; allowed: 0")
    experiment = Experiment.of(config, TASKS[config.task.name].objective_of(config), devices)
    kind = devices[0].device_kind
    chip_of(kind)  # raises before the long part
    print(f"compiling for {len(devices)} x {kind} ({topology}) ...", file=sys.stderr)
    started = time.perf_counter()
    compiled = compile_step(experiment)
    seconds = time.perf_counter() - started
    slices = [int(getattr(device, "slice_index", 0) or 0) for device in experiment.mesh.devices.flat]
    messages, unknown_loops = collectives(compiled.as_text() or "", slices)
    bound = _bound(experiment, kind, messages, compiled.memory_analysis())
    parts = [
        experiment.describe(),
        f"compiled       in {seconds:.0f} s for {len(devices)} x {kind}, {len(set(slices))} slice(s)",
        _memory(experiment, compiled.memory_analysis(), kind),
        _messages(messages, unknown_loops),
        _times(experiment, bound),
    ]
    return "\n\n".join(parts)


def compile_step(experiment: Experiment) -> jax.stages.Compiled:
    """The training step, compiled for the devices of the experiment's mesh.

    Raises DoesNotFit.
    """
    cached = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)  # programs for absent devices cannot be read back
    compilation_cache.reset_cache()  # jax reads the setting once, at its first compilation
    try:
        with jax.set_mesh(experiment.mesh):
            return experiment.train_step().lower(experiment.sharded_state, experiment.sharded_batch).compile()
    except jax.errors.JaxRuntimeError as error:
        message = one_line(error)
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        said = message.partition("RESOURCE_EXHAUSTED: ")[2]
        raise DoesNotFit(re.split(r"(?<=[a-z)])\. ", said)[0].rstrip(".")) from error
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
        compilation_cache.reset_cache()


def _bound(experiment: Experiment, kind: str, messages: Counter[Collective], memory: Any) -> Roofline:
    layers = layers_flops(experiment.network.spec, experiment.config.sequence_length) * experiment.tokens_per_step
    return roofline(
        kind,
        experiment.mesh.size,
        model_flops=experiment.step_flops,
        recomputed_flops=layers if experiment.config.model.remat == "full" else 0.0,
        # The state is read and written once; what is in memory at the peak was written once and is read once.
        hbm_traffic=2 * memory.argument_size_in_bytes + 2 * _temporary(memory),
        messages=messages,
    )


def _temporary(memory: Any) -> int:
    """The bytes at the peak that are neither state nor batch."""
    return max(0, memory.peak_memory_in_bytes - memory.argument_size_in_bytes)


def _memory(experiment: Experiment, memory: Any, kind: str) -> str:
    has, peak = chip_of(kind).hbm_bytes, memory.peak_memory_in_bytes
    state, shardings = experiment.abstract, experiment.shardings
    parts = {
        "parameters": bytes_per_device(state.params, shardings.params),
        "optimizer": bytes_per_device(state.optimizer, shardings.optimizer),
        "projections": bytes_per_device(state.projections, shardings.projections),
        "activations, gradients, copies": _temporary(memory),
    }
    lines = [
        f"memory         {peak / GIB:.2f} GiB per device at the peak, {peak / has:.0%} of {has / GIB:.0f} GiB: it fits"
    ]
    lines += [f"  {name:30s} {size / GIB:8.3f} GiB" for name, size in parts.items()]
    return "\n".join(lines)


def _messages(messages: Counter[Collective], unknown_loops: int) -> str:
    if not messages:
        return "collectives    none"
    lines = ["collectives    of one step, and what each device sends for them"]
    ordered = sorted(messages.items(), key=lambda item: -(item[0].slice_bytes + item[0].network_bytes) * item[1])
    for message, times in ordered:
        size = f"{message.num_bytes / 2**20:10.3f} MiB among {message.group_size:4d}"
        sent = f"{times * message.slice_bytes / GIB:9.3f} GiB within the slice"
        if message.num_slices > 1:
            sent += f", {times * message.network_bytes / GIB:.3f} GiB to others"
        lines.append(f"  {times:5d} x {message.kind:18s} {size} {sent}")
    if unknown_loops:
        lines.append(f"  {unknown_loops} loop(s) of unknown length count once")
    return "\n".join(lines)


def _times(experiment: Experiment, bound: Roofline) -> str:
    tokens = experiment.tokens_per_step / bound.step
    rows = {
        "computing": bound.compute,
        "memory traffic, at least": bound.memory,
        "links within a slice": bound.interconnect,
        "network between slices": bound.network,
    }
    speed = f"{tokens:,.0f} tokens/s, model FLOP/s utilisation up to {bound.mfu:.0%}"
    lines = [f"step time      {1e3 * bound.step:.1f} ms at best, estimated: {speed}"]
    return "\n".join(lines + [f"  {name:30s} {1e3 * seconds:8.1f} ms" for name, seconds in rows.items()])


if __name__ == "__main__":
    with lost_output_is_no_crash():
        app.run(main, flags_parser=parse_flags)
