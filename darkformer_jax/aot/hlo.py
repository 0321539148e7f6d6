"""The computations and loops of a compiled program, read from its HLO text: jax has no other form of them."""

import re

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONDITION = re.compile(r"condition=%([\w.-]+)")
_CONSTANT = re.compile(r" constant\((\d+)\)")


def computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The instructions of every computation, and the entry's name."""
    bodies: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        if found := _COMPUTATION.match(line):
            lines = bodies[found[1]] = []
            entry = found[1] if line.startswith("ENTRY") else entry
        elif line.startswith(" "):
            lines.append(line)
    return bodies, entry


def trip_count(line: str, bodies: dict[str, list[str]]) -> int | None:
    """How often a loop's body runs: the count that the compiler noted, or the constant that a scan counts up to."""
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = _CONDITION.search(line)
    lines = bodies.get(condition[1], []) if condition else []
    constants = [found[1] for other in lines if (found := _CONSTANT.search(other))]
    is_scan = any(" compare(" in other and "direction=LT" in other for other in lines)
    return int(constants[0]) if is_scan and len(constants) == 1 else None
