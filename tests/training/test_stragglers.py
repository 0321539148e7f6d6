from darkformer_jax.distributed import processes
from darkformer_jax.training import stragglers
from darkformer_jax.training.stragglers import HostTimer, HostTimes


def test_the_time_without_the_device_is_compared(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stragglers.time, "perf_counter", lambda: now[0])
    clock = HostTimer()
    for host, device in ((0.5, 2.0), (1.5, 3.0)):
        now[0] += host + device
        clock.waited(device)
    assert clock.read() == HostTimes(own=1.0, largest=1.0, straggler=0)  # there are no others
    now[0] += 50
    clock.restart()  # that was an evaluation
    now[0] += 0.25 + 1
    clock.waited(1)
    monkeypatch.setattr(processes, "tell", lambda what, value: {0: value, 1: 0.1, 2: 4.0})
    times = clock.read()
    assert times == HostTimes(own=0.25, largest=4.0, straggler=2)
    assert str(times) == "the slowest host is process 2's: 4.0000 s per step, without its device"
