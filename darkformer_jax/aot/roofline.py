"""The speed of chips, and the least time that a training step needs on them."""

import dataclasses
from collections import Counter

from darkformer_jax.aot.collectives import Collective
from darkformer_jax.errors import UserError
from darkformer_jax.model.flops import peak_flops

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One jax device. Bandwidths are in bytes per second; `ici_bandwidth` is what it sends over all its links.

    `dcn_bandwidth` is a device's share of its host's network.
    """

    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float


# By the start of device_kind; the first match counts. From Google Cloud's page on each TPU.
_CHIPS = (
    ("TPU v4", Chip(32 * GIB, 1228e9, 300e9, 6.25e9)),
    ("TPU v5 lite", Chip(16 * GIB, 819e9, 200e9, 3.125e9)),
    ("TPU v5e", Chip(16 * GIB, 819e9, 200e9, 3.125e9)),
    ("TPU v5", Chip(95 * GIB, 2765e9, 600e9, 6.25e9)),
    ("TPU v6", Chip(32 * GIB, 1640e9, 448e9, 12.5e9)),
    ("TPU7x", Chip(96 * GIB, 3690e9, 600e9, 12.5e9)),  # half a chip: a chip is two jax devices
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that one step takes for each resource alone, and the model FLOP/s utilisation that the longest allows.

    They are estimates from published figures, and assume that every message keeps all links of a chip busy.
    """

    compute: float
    memory: float
    interconnect: float
    network: float
    mfu: float

    @property
    def step(self) -> float:
        """Seconds of a step that uses all four resources at once."""
        return max(self.compute, self.memory, self.interconnect, self.network)


def chip_of(device_kind: str) -> Chip:
    """The figures of a `device_kind`. Raises UserError for one that is not in the table."""
    for kind, chip in _CHIPS:
        if device_kind.startswith(kind) and peak_flops(device_kind) is not None:
            return chip
    raise UserError(f"figures of {device_kind!r} are not known; known: {', '.join(kind for kind, _ in _CHIPS)}")


def roofline(
    device_kind: str,
    num_devices: int,
    *,
    model_flops: float,
    recomputed_flops: float,
    hbm_traffic: float,
    messages: Counter[Collective],
) -> Roofline:
    """The estimate of one step.

    Args:
      model_flops: of the step, on all devices; see `model.flops.train_step_flops`.
      recomputed_flops: FLOPs that rematerialisation adds.
      hbm_traffic: the fewest bytes that one device reads and writes.
      messages: how often each collective runs.
    """
    chip, peak = chip_of(device_kind), peak_flops(device_kind)
    assert peak is not None
    peak *= num_devices
    bounds = {
        "compute": (model_flops + recomputed_flops) / peak,
        "memory": hbm_traffic / chip.hbm_bandwidth,
        "interconnect": sum(m.slice_bytes * times for m, times in messages.items()) / chip.ici_bandwidth,
        "network": sum(m.network_bytes * times for m, times in messages.items()) / chip.dcn_bandwidth,
    }
    return Roofline(**bounds, mfu=model_flops / peak / max(bounds.values()))
