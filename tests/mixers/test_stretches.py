"""Every mechanism on sequences, rows and heads that the mesh splits."""

import numpy as np

from darkformer_jax.errors import UserError
from darkformer_jax.mixers import MIXERS
from tests.mixers.test_mechanisms import ALL, make
from tests.tiny_runs import on_eight_devices

LENGTH = 64
MESH = {"data": 2, "fsdp": 1, "tensor": 1, "context": 4}


def can_split(spec):
    try:
        MIXERS[spec.kind].check_stretch(spec, LENGTH // MESH["context"])
    except UserError:
        return False
    return True


CASES = [(kind, spec) for kind, spec in ALL if can_split(spec)]
assert {kind for kind, _ in ALL} - {kind for kind, _ in CASES} == {"rfa_gate"}  # a mechanism more here is a loss


ROWS = {"data": 2, "tensor": 2}

# Of the exact part's two query heads, four devices get none each: the compiler splits what it can.
UNEVEN = {"data": 1, "fsdp": 1, "tensor": 4, "context": 2}
SPLIT = [(kind, spec) for kind, spec in CASES if spec.exact_kv_heads and kind == "dark" and spec.window]


def outputs(cases=CASES):
    """Of each case, on two rows of two documents."""
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((2, LENGTH, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    ids = np.where(np.arange(LENGTH) < np.array([[24], [40]]), 1, 2).astype(np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (2, 1))
    return [np.asarray(make(kind, spec)[1](q, k, v, ids, positions)[0]) for kind, spec in cases]


def test_a_sequence_or_a_batch_on_several_devices_gives_what_one_device_gives(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import jax, numpy as np\n"
        "from darkformer_jax.distributed.sharding import make_mesh\n"
        "from tests.mixers.test_stretches import MESH, ROWS, SPLIT, UNEVEN, outputs\n"
        "with jax.set_mesh(make_mesh(MESH)):\n"
        f"    np.savez({str(tmp_path / 'split.npz')!r}, *outputs())\n"
        "with jax.set_mesh(make_mesh(UNEVEN)):\n"
        f"    np.savez({str(tmp_path / 'uneven.npz')!r}, *outputs(SPLIT))\n"
        "with jax.set_mesh(make_mesh(ROWS, jax.devices()[:4])):\n"
        f"    np.savez({str(tmp_path / 'rows.npz')!r}, *outputs())\n"
    )
    command = on_eight_devices(program, tmp_path)
    whole = outputs()
    ended = command.wait()
    assert ended.status == 0, ended.err
    for file in ("split.npz", "rows.npz"):
        with np.load(tmp_path / file) as split:
            for (kind, _), name, expected in zip(CASES, split.files, whole, strict=True):
                np.testing.assert_allclose(split[name], expected, rtol=2e-5, atol=2e-5, err_msg=f"{kind}, {file}")
    with np.load(tmp_path / "uneven.npz") as uneven:
        assert len(uneven.files) == len(SPLIT) > 0
        for (_, spec), name in zip(SPLIT, uneven.files, strict=True):
            expected = whole[CASES.index(("dark", spec))]
            np.testing.assert_allclose(uneven[name], expected, rtol=2e-5, atol=2e-5)
