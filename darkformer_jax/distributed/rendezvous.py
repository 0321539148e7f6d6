"""The rendezvous of all processes before `jax.distributed`, which ends with a stack trace if one of them is missing.

Process 0 listens on the coordinator's port, and the others say who they are. Process 0 tells all of them at once
whether to go on. Then the port is free again, and jax's own coordinator takes it.
"""

import contextlib
import json
import socket
import time
from collections.abc import Container
from typing import Any

from darkformer_jax.errors import Transient, UserError, one_line


class Missing(Transient):
    """A process did not come, or cannot be reached."""


_HELLO_SECONDS = 5.0  # to wait for the few bytes that a new connection sends
_RETRY_SECONDS = 0.2
_LONGEST_LINE = 10_000


def rendezvous(host: str, port: int, num_processes: int, process_id: int, timeout: float) -> None:
    """Returns in every process once all have come.

    Args:
      host, port: where process 0 is reached.
      num_processes, process_id: n, and 0 <= i < n.
      timeout: seconds that this process waits for the others.

    Raises:
      Missing: in every process that came, if others did not come (it names them) or the coordinator cannot be reached.
      UserError: in every process that came, if two of them do not fit together (it names them).
    """
    deadline = time.monotonic() + timeout
    if process_id == 0:
        _gather(port, num_processes, deadline, timeout)
    else:
        _register(host, port, num_processes, process_id, deadline, timeout)


def _gather(port: int, num_processes: int, deadline: float, timeout: float) -> None:
    """The part of process 0: waits for the others and answers all of them."""
    with contextlib.ExitStack() as stack:
        here: dict[int, socket.socket] = {}
        newest: list[socket.socket] = []
        error: UserError | None = None
        try:
            server = stack.enter_context(_listen(port))
        except OSError as failure:
            raise Missing(f"process 0 cannot listen on port {port}: {failure.strerror or failure}") from failure
        while not error:
            _forget_gone(here)
            if len(here) == num_processes - 1:
                break
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection = stack.enter_context(server.accept()[0])
            except TimeoutError:
                missing = [number for number in range(1, num_processes) if number not in here]
                error = Missing(f"{named(missing)} of {num_processes} did not come within {timeout:.0f} s")
                break
            hello = _read(connection, _HELLO_SECONDS)
            if hello is None or not isinstance(hello.get("process"), int):  # a port scanner, or a process that died
                continue
            _forget_gone(here)  # it may be this one, started again
            error = _misfit(hello["process"], hello.get("of"), here, num_processes)
            if error:
                newest.append(connection)
            else:
                here[hello["process"]] = connection
        for connection in (*here.values(), *newest):
            with contextlib.suppress(OSError):
                connection.sendall(
                    json.dumps({"error": str(error or ""), "again": isinstance(error, Missing)}).encode() + b"\n"
                )
        if error:
            raise error


def _register(host: str, port: int, num_processes: int, process_id: int, deadline: float, timeout: float) -> None:
    """The part of every other process: says who it is and waits for the answer."""
    hello = json.dumps({"process": process_id, "of": num_processes}).encode() + b"\n"
    reason = "it gave no answer"
    while True:
        try:
            with socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.1)) as connection:
                connection.sendall(hello)
                # Process 0 may have begun later than this one, and it waits as long.
                answer = _read(connection, timeout + _HELLO_SECONDS)
            if answer is not None and "error" in answer:
                if answer["error"]:
                    raise (Missing if answer["again"] else UserError)(answer["error"])
                return
            reason = "it gave no answer"
        except OSError as failure:
            reason = one_line(failure)
        if time.monotonic() + _RETRY_SECONDS > deadline:
            raise Missing(
                f"process {process_id} of {num_processes}: coordinator {host}:{port} cannot be reached within "
                f"{timeout:.0f} s: {reason}"
            )
        time.sleep(_RETRY_SECONDS)


def _listen(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)


def _read(connection: socket.socket, seconds: float) -> dict[str, Any] | None:
    """The JSON object in the line that the other side sent; None if it sent none in time."""
    connection.settimeout(seconds)
    try:
        with connection.makefile("rb") as stream:
            line = json.loads(stream.readline(_LONGEST_LINE))
    except (OSError, ValueError):
        return None
    return line if isinstance(line, dict) else None


def _forget_gone(here: dict[int, socket.socket]) -> None:
    """Removes the processes that have closed their connection: they were killed."""
    for number, connection in tuple(here.items()):
        connection.setblocking(False)
        try:
            gone = not connection.recv(1, socket.MSG_PEEK)
        except OSError as error:
            gone = not isinstance(error, BlockingIOError)  # it is waiting
        connection.settimeout(_HELLO_SECONDS)
        if gone:
            del here[number]


def _misfit(number: int, of: Any, here: Container[int], num_processes: int) -> UserError | None:
    if of != num_processes:
        return UserError(f"process {number} was started as one of {of} processes, process 0 as one of {num_processes}")
    if number in here:
        return UserError(f"two processes were started as process {number} of {num_processes}")
    return None


def named(numbers: list[int]) -> str:
    """`process 3`, `processes 1, 2`."""
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"process {shown}" if len(numbers) == 1 else f"processes {shown}"
