from typing import Any

import jax
import numpy as np
import pytest

from darkformer_jax.training.memory import device_memory_bytes, host_memory_bytes


def test_host_memory_follows_an_allocation() -> None:
    before = host_memory_bytes()
    block = np.ones(64 * 2**20, np.uint8)
    assert host_memory_bytes() - before > 0.9 * block.nbytes


def test_device_memory_is_the_largest_peak_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        def __init__(self, stats: dict[str, int] | None) -> None:
            self.memory_stats = lambda: stats

    def among(*stats: Any) -> int | None:
        monkeypatch.setattr(jax, "local_devices", lambda: [Device(stat) for stat in stats])
        return device_memory_bytes()

    assert among(None, None) is None
    assert among({"bytes_in_use": 1}) is None
    assert among({"peak_bytes_in_use": 5}, {"peak_bytes_in_use": 9}, None) == 9
