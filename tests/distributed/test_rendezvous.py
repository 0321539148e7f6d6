import concurrent.futures
import socket
import time

import pytest

from darkformer_jax.distributed.rendezvous import Missing, rendezvous
from tests.tiny_runs import free_port


def test_a_process_killed_while_it_waits_is_missing_and_may_be_started_again():
    def arrive(number, timeout=30.0):
        return arrivals.submit(rendezvous, "127.0.0.1", port, 3, number, timeout)

    def arrive_and_die():
        while True:
            try:
                connection = socket.create_connection(("127.0.0.1", port))
                break
            except ConnectionRefusedError:
                time.sleep(0.01)
        with connection:
            connection.sendall(b'{"process": 1, "of": 3}\n')
            time.sleep(0.2)

    with concurrent.futures.ThreadPoolExecutor() as arrivals:
        port = free_port()
        first = arrive(0)
        arrive_and_die()
        others = [arrive(1), arrive(2)]
        assert [one.result() for one in (first, *others)] == [None] * 3
        port = free_port()
        first = arrive(0, 2.0)
        arrive_and_die()
        with pytest.raises(Missing, match="process 1 of 3 did not come within 2 s"):
            arrive(2).result()
        with pytest.raises(Missing, match="process 1 of 3"):
            first.result()
