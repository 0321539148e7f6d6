"""The messages that a compiled program sends between devices, read from its HLO text: jax has no other form of them."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from darkformer_jax.aot.hlo import computations, trip_count

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COLLECTIVE = re.compile(rf" ({'|'.join(KINDS)})(-start)?\(")
_CALLING = "calls|body|to_apply|called_computations|branch_computations|true_computation|false_computation"
_CALLED = re.compile(rf"(?:{_CALLING})=\{{?((?:%[\w.-]+(?:, )?)+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_SHAPE = re.compile(r"\b(pred|[a-z]+[0-9]+(?:e[0-9]+m[0-9]+\w*)?)\[([0-9,]*)\]")
_IOTA = re.compile(r"replica_groups=\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?")
_LISTED = re.compile(r"replica_groups=\{\{([0-9,]*)\}")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")
_BETWEEN_SLICES = re.compile(r' send\(.*_xla_megascale_target="\{([0-9,:]+)\}.*_xla_megascale_transfer_type="(\w+)"')
_PAIRS = re.compile(r"source_target_pairs=\{([0-9,{}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of message: `num_bytes` gathered or reduced among `group_size` devices in `num_slices` slices."""

    kind: str
    num_bytes: int
    group_size: int
    num_slices: int = 1

    @property
    def slice_bytes(self) -> float:
        """Bytes that one device sends within its slice: its part of the ring there."""
        if self.kind == "collective-permute":
            return self.num_bytes if self.num_slices == 1 else 0
        inside = self.group_size / self.num_slices
        return self._passes * (inside - 1) / inside * self.num_bytes

    @property
    def network_bytes(self) -> float:
        """Bytes that one device sends to other slices. The devices of a slice share that work."""
        if self.kind == "collective-permute":
            return self.num_bytes if self.num_slices > 1 else 0
        return self._passes * (self.num_slices - 1) / self.group_size * self.num_bytes

    @property
    def _passes(self) -> int:
        """How often the bytes go round: an all-reduce scatters sums, then gathers them."""
        return 2 if self.kind == "all-reduce" else 1


def collectives(hlo: str, slices: Sequence[int]) -> tuple[Counter[Collective], int]:
    """How often each collective runs in one execution of the program, and how many loops have an unknown length.

    Loop bodies count as often as they run. The body of a loop without a known length counts once.

    Args:
      hlo: `compiled.as_text()` of a program for len(slices) devices.
      slices: the slice (pod) that each device belongs to, in the order of the mesh.
    """
    bodies, entry = computations(hlo)
    found: dict[tuple[str, ...], tuple[Collective, int]] = {}
    unknown_loops = 0
    pending = [(entry, 1)]
    while pending:
        name, times = pending.pop()
        for line in bodies[name]:
            if match := _COLLECTIVE.search(line):
                key = _identity(name, line)
                least = min(times, found[key][1] if key in found else times)
                found[key] = _parse(line, match, slices, name.startswith("all-reduce-scatter")), least
            if match := _BETWEEN_SLICES.search(line):
                found[name, line] = _between_slices(line, match), times
            calls = [call.strip(" %") for group in _CALLED.findall(line) for call in group.split(",") if call.strip()]
            trips = trip_count(line, bodies) if " while(" in line else 1
            unknown_loops += trips is None
            pending += [(call, times * (trips or 1)) for call in calls if call in bodies]
    counts: Counter[Collective] = Counter()
    for collective, times in found.values():
        counts[collective] += times
    return counts, unknown_loops


def _identity(computation: str, line: str) -> tuple[str, ...]:
    """The key that tells one collective from another.

    TPU programs cut a collective into a chain of fusions that run beside other work, and each fusion repeats the
    collective's text. The other work may be a loop's body, so the collective runs as often as its rarest fusion.
    """
    chain = _CHAIN.search(line)
    if not chain:
        return computation, line
    channel, groups = _CHANNEL.search(line), line.find("replica_groups=")
    return chain[1], channel[1] if channel else "", line[groups : line.find("}", groups)]


def _parse(line: str, found: re.Match[str], slices: Sequence[int], scattered: bool) -> Collective:
    """The collective of a line. `scattered`: each device keeps its part of the all-reduce, as in a reduce-scatter."""
    kind, start = found[1], bool(found[2])
    arrays = [
        _num_bytes(dtype, dims)
        for dtype, dims in _SHAPE.findall(line[line.index(" = ") : found.start()])
        if not (start and not dims)  # the context scalars of an asynchronous start
    ]
    if start and len(arrays) > 1 and kind != "all-reduce":  # (operands, results)
        arrays = arrays[len(arrays) // 2 :]
    groups = _groups(line, len(slices))
    size = len(groups[0])
    total = sum(arrays) * (size if kind == "reduce-scatter" else 1)
    num_slices = max(len({slices[device] for device in group}) for group in groups)
    return Collective("reduce-scatter" if scattered else kind, total, size, num_slices)


def _between_slices(line: str, found: re.Match[str]) -> Collective:
    """A collective of TPUs over the data center's network: a device sends to those in its place in the other slices.

    The compiler writes such a collective as a send and a receive by the runtime. In "{1,2}x{0:3}" the slices come
    first, then the devices of a slice.
    """
    ends = [[int(end) for end in part.split(":")] for part in found[1].split(",")]
    num_slices = sum(part[-1] - part[0] + 1 for part in ends)
    kind = found[2].lower().replace("_", "-")
    size = _num_bytes(*_SHAPE.findall(line[line.index(" = ") :])[0])
    total = size * num_slices if kind == "all-gather" else size
    return Collective(kind if kind in KINDS else "collective-permute", total, num_slices, num_slices)


def _num_bytes(dtype: str, dims: str) -> int:
    """Bytes of an array such as bf16[4,64]. The name of every type but pred contains its number of bits."""
    bits = re.search(r"\d+", dtype)
    return math.prod(int(n) for n in dims.split(",") if n) * max(1, int(bits[0]) // 8 if bits else 1)


def _groups(line: str, num_devices: int) -> list[list[int]]:
    """The groups of devices that talk to each other; for a permutation, its pairs."""
    if pairs := _PAIRS.search(line):
        ends = [int(n) for n in re.findall(r"\d+", pairs[1])]
        return [ends[i : i + 2] for i in range(0, len(ends), 2)] or [[0]]
    if mesh := _MESH.search(line):
        return mesh_groups(mesh[1], mesh[2])
    if iota := _IOTA.search(line):
        shape, dims, order = ([int(n) for n in part.split(",")] if part else None for part in iota.groups())
        assert shape and dims
        ids = np.arange(np.prod(dims)).reshape(dims)
        return np.transpose(ids, order).reshape(shape).tolist()
    if (listed := _LISTED.search(line)) and listed[1]:
        begin = line.index("replica_groups=")
        groups = re.findall(r"\{([0-9,]+)\}", line[begin : line.index("}}", begin) + 1])
        return [[int(n) for n in group.split(",")] for group in groups]
    return [list(range(num_devices))]


def mesh_groups(mesh: str, axes: str) -> list[list[int]]:
    """Groups of devices that differ only in the given axes: for "'a'=2,'b'=4" and "'b'", one group for every a.

    "'b':(2)2" names a part of b: the one of size 2 that follows a first part of size 2.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    shape: list[int] = []
    grouped: list[bool] = []
    wanted = {name: (int(before or 1), int(size or 0)) for name, before, size in _AXIS.findall(axes)}
    for name, size in sizes.items():
        before, part = wanted.get(name, (1, 1))
        part = part or size
        shape += [before, part, size // (before * part)]
        grouped += [False, name in wanted, False]
    inside = np.flatnonzero(grouped)
    ids = np.moveaxis(np.arange(math.prod(shape)).reshape(shape), inside, np.arange(-len(inside), 0))
    return ids.reshape(-1, math.prod(shape[axis] for axis in inside)).tolist()
