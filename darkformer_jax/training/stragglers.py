"""Which process keeps the others waiting: what each does alone, between its waits for the device, compared."""

import time
from typing import NamedTuple

from darkformer_jax.distributed import processes


class HostTimes(NamedTuple):
    """Seconds per step that processes spend on their hosts: reading the batch, dispatching, writing metrics.

    A step's collectives end for all at once, so its time says nothing about who was late; this does. What a slow device
    costs is not in it.
    """

    own: float
    largest: float
    straggler: int  # the process with the largest

    def __str__(self) -> str:
        return f"the slowest host is that of process {self.straggler}: {self.largest:.4f} s per step beside its device"


class HostTimer:
    """Adds up what this process does between waits for its device."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """What was since the last `read` does not count: an evaluation, a save."""
        self._began, self._waited, self._steps = time.perf_counter(), 0.0, 0

    def waited(self, seconds: float) -> None:
        """For the device, as a step's metrics were read."""
        self._waited += seconds
        self._steps += 1

    def read(self) -> HostTimes:
        """Since the last `read`, beside what the others have told last; waits for none of them. Then it restarts."""
        own = (time.perf_counter() - self._began - self._waited) / max(1, self._steps)
        self.restart()
        told = processes.tell("host_seconds", own)
        straggler = max(told, key=lambda process: told[process])
        return HostTimes(own, told[straggler], straggler)
