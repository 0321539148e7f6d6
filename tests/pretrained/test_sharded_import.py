"""On eight devices each array is spread over them, and the checkpoint holds what it holds on one."""

import os
import subprocess
import sys

from tests.pretrained.tiny_sources import import_source, write_llama
from tests.tiny_runs import ROOT, saved_arrays

PROGRAM = """
import sys
import jax
from darkformer_jax.config import base
from darkformer_jax.pretrained import load
from darkformer_jax.pretrained.source import open_source

assert len(jax.devices()) == 8
plan = load.plan_import(open_source(sys.argv[1]), base.get_config())
for array in plan.arrays:
    leaf = load._on_devices(array, load._mesh(16))
    shards = [shard.data.size for shard in leaf.addressable_shards]
    assert shards == [leaf.size // 8] * 8, (array.path, leaf.shape, shards)
load.run_import(plan, sys.argv[2])
"""


def test_eight_devices(tmp_path):
    source = write_llama(tmp_path / "hf", shard_bytes=3000)
    import_source(source, tmp_path / "one")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    subprocess.run(
        [sys.executable, "-c", PROGRAM, str(source), str(tmp_path / "eight")],
        check=True,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
    )
    assert saved_arrays(tmp_path / "one") == saved_arrays(tmp_path / "eight")
