import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from darkformer_jax.config.specs import model_spec
from darkformer_jax.distributed.sharding import (
    MESH_AXES,
    RULES,
    Part,
    constrain,
    device_array,
    make_mesh,
    part_of_process,
    spec_of,
)
from darkformer_jax.errors import UserError
from darkformer_jax.model.network import Network, logical_axes
from tests.tiny_runs import tiny_config

GOLDEN = Path(__file__).parent / "golden" / "shardings.json"


class Sizes:
    """As much of a mesh as `spec_of` looks at."""

    def __init__(self, data, fsdp, tensor, context=1):
        self.shape = dict(zip(MESH_AXES, (data, fsdp, tensor, context), strict=True))


def test_dimensions_go_to_their_mesh_axes():
    mesh = Sizes(2, 2, 2)
    assert spec_of("x", ("batch", None), (8, 5), mesh) == P(("data", "fsdp"), None)
    assert spec_of("w", (None, "embed", "mlp"), (3, 4, 6), mesh) == P(None, ("fsdp",), ("tensor",))
    assert spec_of("w", (None, "embed", "mlp"), (3, 5, 6), Sizes(8, 1, 1)) == P(None, None, None)
    assert spec_of("e", ("vocab", "embed"), (6, 3), Sizes(1, 1, 2)) == P(("tensor",), None)
    assert spec_of("x", ("batch", "sequence"), (8, 6), Sizes(2, 2, 1, 2)) == P(("data", "fsdp"), ("context",))
    assert spec_of("w", ("embed", "mlp"), (4, 6), Sizes(1, 2, 1, 2)) == P(("fsdp", "context"), None)
    assert spec_of("w", ("embed", "mlp"), (6, 6), Sizes(1, 2, 1, 2)) == P(("fsdp",), None)  # not by both
    assert spec_of("w", ("embed", "mlp"), (5, 6), Sizes(2, 1, 1, 2)) == P(None, None)
    assert len(RULES) <= 15


def test_features_are_split_where_heads_cannot_be():
    mesh, axes = Sizes(1, 1, 2), ("kv_heads", "features", None)
    assert spec_of("w", axes, (4, 6, 3), mesh) == P(("tensor",), None, None)
    assert spec_of("w", axes, (4, 5, 3), mesh) == P(("tensor",), None, None)
    assert spec_of("w", axes, (1, 6, 3), mesh) == P(None, ("tensor",), None)
    assert spec_of("k", ("embed", "kv_heads", None), (4, 3, 8), mesh) == P(None, None, None)
    with pytest.raises(UserError, match="w: dimension 'features' of size 5 is not divisible by 2"):
        spec_of("w", axes, (1, 5, 3), mesh)


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (("batch",), (6,), r"thing: dimension 'batch' of size 6 is not divisible by 4 = mesh axes \('data', 'fsdp'\)"),
        (("embed", "heads"), (4, 3), r"dimension 'heads' of size 3 is not divisible by 2 = mesh axes \('tensor',\)"),
        (("heads", "mlp"), (4, 4), r"thing: two of its dimensions \('heads', 'mlp'\) are split over mesh axes"),
        (("batch", "embed"), (4, 4), r"thing: two of its dimensions \('batch', 'embed'\) are split"),
        (("embed",), (4, 4), r"thing has shape \(4, 4\) and axes \('embed',\): their lengths differ"),
    ],
)
def test_what_cannot_be_split_is_refused(axes, shape, message):
    with pytest.raises(UserError, match=message):
        spec_of("thing", axes, shape, Sizes(2, 2, 2))


def test_mesh_sizes():
    devices = jax.devices()[:1] * 8
    for sizes, shape in (((-1, 2, 2, 1), (2, 2, 2, 1)), ((8, 1, 1, 1), (8, 1, 1, 1)), ((1, 1, 4, -1), (1, 1, 4, 2))):
        named = dict(zip(MESH_AXES, sizes, strict=True))
        mesh = make_mesh(named, devices)
        assert tuple(mesh.shape.values()) == shape
    assert tuple(make_mesh({"fsdp": 8}, devices).shape.values()) == (1, 8, 1, 1)


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as laying out a mesh looks at."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"
    process_index: int = 0


@pytest.mark.parametrize(
    ("shape", "across"),
    [((4, 2, 1, 1), "data"), ((1, 8, 1, 1), "fsdp"), ((1, 2, 2, 2), "fsdp"), ((1, 1, 1, 8), "context")],
)
def test_slices_are_joined_by_one_axis(shape, across):
    mixed = [Device(i, slice_index=i % 2) for i in range(8)]
    array = device_array(shape, mixed)
    assert array.shape == shape
    assert {device.id for device in array.flat} == set(range(8))
    slices = np.vectorize(lambda device: device.slice_index)(array)
    halves = np.split(slices, 2, axis=MESH_AXES.index(across))
    assert [set(half.flat) for half in halves] == [{0}, {1}]


def test_four_slices_are_joined_by_two_axes():
    array = device_array((2, 4, 1, 1), [Device(i, slice_index=i // 2) for i in range(8)])
    assert [[device.slice_index for device in row[:, 0, 0]] for row in array] == [[0, 0, 1, 1], [2, 2, 3, 3]]


def test_slices_that_do_not_fit_are_named():
    devices = [Device(i, slice_index=i % 2) for i in range(8)]
    with pytest.raises(
        UserError, match=r"mesh .*'tensor': 8.* does not fit 2 slices of 4 devices: .*data x fsdp x con"
    ):
        device_array((1, 1, 8, 1), devices)
    with pytest.raises(UserError, match=r"does not fit 2 slices of 2, 4 devices: the slices must be equal"):
        device_array((6, 1, 1, 1), [device for device in devices if device.id not in (0, 2)])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1, 1), "does not fit the 8 devices"),
        ((-1, 3, 1, 1), "does not fit the 8 devices"),
        ((4, 1, 1, 4), "does not fit the 8 devices"),
        ((-1, 1, 1, -1), "at most one may be -1"),
        ((0, 8, 1, 1), "sizes must be at least 1"),
        ((-2, 4, 1, 1), "sizes must be at least 1"),
    ],
)
def test_bad_mesh_sizes_are_named(sizes, message):
    named = dict(zip(MESH_AXES, sizes, strict=True))
    with pytest.raises(UserError, match=message) as error:
        make_mesh(named, jax.devices()[:1] * 8)
    assert str(named) in str(error.value)


def test_constrain_is_nothing_without_a_mesh():
    x = np.ones((3, 2))
    assert constrain(x, "batch", None) is x


def shardings():
    """{model: {array: its dimensions, each with the mesh axes that split it}} of models that have every kind of array.

    Every axis of the mesh has two devices.
    """
    changes = {
        "num_layers": 5,
        "num_heads": 4,
        "qk_norm": True,
        "qkv_bias": True,
        "tie_embeddings": False,
        "lora_rank": 2,
        "attention__pattern": "softmax,dark,lfk,mamba2,gated_deltanet",
        "attention__window": 16,
        "attention__far_gain": True,
        "attention__balanced": True,
    }
    mesh, result = Sizes(2, 2, 2, 2), {}
    for kv_heads in (1, 2):
        fields = {f"model__{name}": value for name, value in (changes | {"num_kv_heads": kv_heads}).items()}
        network = Network.of(model_spec(tiny_config(**fields), 264))
        arrays = result[f"{kv_heads} key/value heads"] = {}

        def note(path, variable, arrays=arrays):
            name = "/".join(path)
            spec = spec_of(name, logical_axes(variable), variable.shape, mesh)
            split = [((axes,) if isinstance(axes, str) else axes) or () for axes in spec]
            pairs = zip(variable.shape, split, strict=True)
            arrays[name] = ", ".join(f"{size} {'*'.join(axes)}".strip() for size, axes in pairs)

        network.map_params(note)
        network.map_projections(note)
    return result


def test_every_array_is_split_as_noted():
    """`python -m tests.distributed.test_sharding` writes golden/shardings.json anew: read what changed."""
    assert shardings() == json.loads(GOLDEN.read_text())


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(shardings(), indent=1, sort_keys=True) + "\n")


class Batch:
    """As much of the sharding of a batch as `part_of_process` looks at; devices are numbered as the mesh has them."""

    is_fully_addressable = False

    def __init__(self, data, fsdp, tensor, context, processes):
        self.mesh = Sizes(data, fsdp, tensor, context)
        self.num_devices, self.parts = data * fsdp * tensor * context, data * fsdp
        self.devices = [Device(number, 0, process_index=process) for number, process in enumerate(processes)]

    def devices_indices_map(self, shape):
        size, sharing = shape[0] // self.parts, self.num_devices // self.parts
        starts = (number // sharing * size for number in range(self.num_devices))
        return {device: (slice(start, start + size), None) for device, start in zip(self.devices, starts, strict=True)}


@pytest.mark.parametrize(
    ("sizes", "processes", "expected"),
    [
        ((8, 1, 1, 1), (0, 0, 1, 1, 2, 2, 3, 3), [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((1, 2, 2, 2), (0, 0, 1, 1, 2, 2, 3, 3), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ((2, 2, 1, 2), (0, 0, 0, 0, 1, 1, 1, 1), [(0, 2), (1, 2)]),
        ((1, 1, 2, 4), (0, 0, 1, 1, 2, 2, 3, 3), [(0, 1)] * 4),
        ((2, 1, 1, 4), (0, 1, 0, 1, 2, 3, 2, 3), [(0, 2), (0, 2), (1, 2), (1, 2)]),  # hosts of 2 x 2 chips
        ((4, 1, 1, 2), (2, 2, 3, 3, 0, 0, 1, 1), [(2, 4), (3, 4), (0, 4), (1, 4)]),
        ((4, 1, 1, 1), (0, 1, 0, 1), [(0, 2), (1, 2)]),
    ],
)
def test_the_rows_of_a_batch_that_each_process_reads(sizes, processes, expected):
    batch = Batch(*sizes, processes)
    parts = [part_of_process(batch, process) for process in sorted(set(processes))]
    assert parts == [Part(*part) for part in expected]


@pytest.mark.parametrize(("sizes", "processes"), [((4, 1, 1, 1), (0, 0, 0, 1)), ((3, 1, 2, 1), (0, 0, 0, 1, 1, 1))])
def test_meshes_whose_processes_cannot_read_parts_of_a_batch(sizes, processes):
    with pytest.raises(UserError, match="let data x fsdp be a multiple or a divisor of the 2 processes"):
        part_of_process(Batch(*sizes, processes), 0)
