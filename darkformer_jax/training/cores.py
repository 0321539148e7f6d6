"""A run on CPUs divides the rows of its batches over the cores: it starts with a JAX device for each of them.

On one CPU device, XLA computes the few small products of a chunk of linear attention on one core, and a second core is
idle for most of the time. Devices of a mesh compute their rows at the same time, each on a core.
"""

import math
import os

import jax
import ml_collections

from darkformer_jax.config.specs import model_spec
from darkformer_jax.distributed import processes
from darkformer_jax.distributed.platform import computes_on_cpu, num_cores
from darkformer_jax.model.flops import train_step_flops
from darkformer_jax.runs.workdir import Workdir
from darkformer_jax.tasks.tokenizer import vocab_size_of

STATE_BYTES = 16  # per parameter: the weight, its gradient and two moments in float32
MOST_BYTES = 2**30  # of all devices' states
_NUMBER = "xla_force_host_platform_device_count"
# XLA ends the process where a device waits so long for another one: 40 s by default, which pass while a run is stopped
# (Ctrl-Z), or while other programs keep one device from computing.
_PATIENCE, _SECONDS = "xla_cpu_collective_timeout_seconds", 24 * 3600


def divide_over_cores(config: ml_collections.ConfigDict, workdir: Workdir | None) -> None:
    """Sets the number of JAX's CPU devices before JAX starts them, and lets several wait for each other for a day.

    A mesh that `config.mesh` describes gets its devices, if there are as many cores. The mesh as it comes gets one per
    core that the rows divide by, but not beside a teacher. The number stays where it is decided already: the run
    computes on something else or in several processes; XLA_FLAGS is a file; JAX_NUM_CPU_DEVICES or XLA_FLAGS has a
    number; this process has used its devices.

    config: validated, with a value for every field.
    """
    xla_flags = os.environ.get("XLA_FLAGS", "").strip()
    is_file = bool(xla_flags) and not xla_flags.startswith("-")
    given = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    if given == 1 or is_file or not computes_on_cpu() or processes.is_distributed():
        return
    if given == -1 and _NUMBER not in xla_flags:
        number = _wanted(config, workdir, num_cores())
        if number == 1:
            return
        try:
            jax.config.update("jax_num_cpu_devices", number)
        except RuntimeError:  # a program that has used its devices keeps them
            return
    if _PATIENCE not in xla_flags:
        os.environ["XLA_FLAGS"] = f"{xla_flags} --{_PATIENCE}={_SECONDS}".strip()


def _wanted(config: ml_collections.ConfigDict, workdir: Workdir | None, cores: int) -> int:
    sizes = config.mesh.to_dict()
    if sizes == {"data": -1, "fsdp": 1, "tensor": 1, "context": 1}:
        return 1 if config.distill.workdir else num_devices(config, vocab_size_of(config, workdir), cores)
    described = math.prod(sizes.values())
    return described if min(sizes.values()) > 0 and described <= cores else 1


def num_devices(config: ml_collections.ConfigDict, vocab_size: int, cores: int) -> int:
    """The largest number of devices, at most one per core, that the rows divide by and whose states are small."""
    spec = model_spec(config, vocab_size)
    looked_up = 0 if spec.tie_embeddings else vocab_size * spec.embed_dim
    num_params = train_step_flops(spec, 1, 1) / 6 + looked_up
    most = min(cores, int(MOST_BYTES / (STATE_BYTES * num_params)))
    rows = (config.batch_size // config.accumulation_steps, config.eval.batch_size)
    return max((n for n in range(1, most + 1) if not any(count % n for count in rows)), default=1)
