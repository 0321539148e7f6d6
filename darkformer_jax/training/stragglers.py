"""Finds the straggler: compares the time that each process spends between its waits for the device."""

import time
from typing import NamedTuple

from darkformer_jax.distributed import processes


class HostTimes(NamedTuple):
    """Seconds per step that processes spend on their hosts: reading the batch, dispatching, writing metrics.

    The collectives of a step end for all processes at once, so the step time does not show which process was late, but
    these times do. They do not include what a slow device costs.
    """

    own: float
    largest: float
    straggler: int  # the process with the largest

    def __str__(self) -> str:
        return f"the slowest host is process {self.straggler}'s: {self.largest:.4f} s per step, without its device"


class HostTimer:
    """Adds up the time that this process spends between its waits for the device."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Discards the time since the last `read`, such as that of an evaluation or a save."""
        self._began, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def waited(self, seconds: float) -> None:
        """Notes a wait for the device, when a step's metrics were read."""
        self._waited += seconds
        self._steps += 1

    def read(self) -> HostTimes:
        """The time since the last `read`, and the others' latest times; it waits for none of them. Then it restarts."""
        own = (time.perf_counter() - self._began - self._waited) / max(1, self._steps)
        self.restart()
        told = processes.tell("host_seconds", own)
        straggler = max(told, key=lambda process: told[process])
        return HostTimes(own, told[straggler], straggler)
