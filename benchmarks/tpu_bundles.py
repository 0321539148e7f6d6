"""The VLIW bundles of a program for a TPU, counted in what libtpu writes of its own compilation.

libtpu schedules a program while it compiles: a bundle is what one core issues in one cycle, if nothing makes it wait.
It writes a file of bundles, and one of the units they use, per instruction of the HLO; `record_bundles` asks for them.
A loop counts as often as it has steps: those that the HLO notes, or, in a kernel, two less than the test at its end
says, for a pipeline's first and last turn skip most of its body. A branch counts as if taken, but for the first ones in
a kernel's body, as many as the caller names: what a kernel does under conditions of its own (`pl.when`).
"""

import dataclasses
import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from darkformer_jax.aot.hlo import computations, trip_count

_OPTIONS = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final"
_BUNDLES, _UNITS = "-final_bundles.txt", "-final_hlo-static-per-bundle-utilization.txt"
_FILE = re.compile(r"\d+-(.+)-\d+$")
_BUNDLE = re.compile(r"^ *(?:0x)?[0-9a-f]+ +([A-Z]*) *: +((?:> *)*)\{(\}?)")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test")
_SCHEDULED = re.compile(r"inlined_call.*?/\* %([\w.-]+) = ")
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%([\w.-]+) = (.*?) ([\w-]+)\((.*)$")
_NAME = re.compile(r"%([\w.-]+)")
_CALLS = re.compile(r"calls=%([\w.-]+)")
_NOTES = re.compile(r", (?:metadata|sharding|frontend_attributes|backend_config)=.*")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_STEPS = re.compile(r'"iteration_bounds":\[([^\]]*)\]')
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"')
_BRANCH = re.compile(r"sbr\.rel \(\S+\) target = \$region(\d+)")
_JOIN = re.compile(r"Start/End empty region (\d+)")
_BODY = re.compile(r"body=%([\w.-]+)")

_FILL_AND_DRAIN = 2
_DELAY = 4  # bundles after a branch that run whether it is taken or not


class Count(NamedTuple):
    """What was counted over bundles."""

    bundles: int = 0
    spills: int = 0  # vector registers that are stored to VMEM for want of registers
    fills: int = 0  # and loaded again

    def plus(self, other: "Count", times: int = 1) -> "Count":
        return Count(*(a + times * b for a, b in zip(self, other, strict=True)))


_NOTHING = Count()


class Scheduled(NamedTuple):
    """An instruction of the HLO: all that it runs, and one pass through its longest loop (all of it, without one).

    conditional: what neither has, once: the kernel's own conditions in their order.
    """

    total: Count
    step: Count
    conditional: tuple[Count, ...]
    unknown_loops: int  # whose bodies were counted once


@dataclasses.dataclass
class Kernel:
    """A Pallas kernel of the program, in the order of the HLO."""

    times: int
    schedule: Scheduled
    vmem_bytes: int  # of its blocks and scratch; operands that XLA has put in VMEM are not among them


@dataclasses.dataclass
class Program:
    """One run of a program, its loops counted."""

    kernels: list[Kernel] = dataclasses.field(default_factory=list)
    besides: Count = _NOTHING  # of all that is no kernel
    besides_in_loops: Count = _NOTHING  # the part of `besides` in the HLO's own loops
    estimated_cycles: int = 0  # by the compiler, of all that is no kernel
    vmem_bytes: int = 0  # of the one instruction that is no kernel and needs most
    unknown_loops: int = 0


def record_bundles(directory: Path) -> None:
    """Has libtpu write the bundles of what it compiles into the directory. Before libtpu is loaded, once a process."""
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = f"{given} {_OPTIONS.format(directory)}".strip()


def read_program(hlo: str, directory: Path, conditions: int = 0) -> Program:
    """Counts a program's bundles, and empties the directory for the next one.

    Args:
      hlo: `compiled.as_text()`.
      directory: of `record_bundles`, with the files of this program alone.
      conditions: how many each kernel's body has.

    Raises:
      ValueError: an instruction's bundles are missing, or a file is not as expected: another libtpu writes otherwise.
    """
    bodies, entry = computations(hlo)
    kernels = {found[1] for line in itertools.chain.from_iterable(bodies.values()) if (found := _kernel(line))}
    written = _read_files(directory, _steps(bodies), dict.fromkeys(kernels, conditions))
    signatures = _signatures(bodies)
    by_signature = {signatures[name]: schedule for name, schedule in written.schedules.items() if name in signatures}
    program = Program()
    for line, times, in_loop in _executed(bodies, entry, program):
        name = _matched(_INSTRUCTION, line)[1]
        if name not in written.called:
            continue
        schedule = written.schedules.get(name) or by_signature.get(signatures[name])  # equal ones are scheduled once
        if schedule is None:
            raise ValueError(f"libtpu wrote no bundles of {name}: {line.strip()[:200]}")
        _add(program, line, schedule, times, in_loop)
    return program


def _add(program: Program, line: str, schedule: Scheduled, times: int, in_loop: bool) -> None:
    vmem = int(found[1]) if (found := _VMEM.search(line)) else 0
    program.unknown_loops += schedule.unknown_loops
    if _kernel(line):
        program.kernels.append(Kernel(times, schedule, vmem))
        return
    program.besides = program.besides.plus(schedule.total, times)
    if in_loop:
        program.besides_in_loops = program.besides_in_loops.plus(schedule.total, times)
    program.estimated_cycles += times * (int(found[1]) if (found := _CYCLES.search(line)) else 0)
    program.vmem_bytes = max(program.vmem_bytes, vmem)


def _kernel(line: str) -> re.Match[str] | None:
    return _INSTRUCTION.match(line) if 'custom_call_target="tpu_custom_call"' in line else None


def _executed(bodies: dict[str, list[str]], entry: str, program: Program) -> Iterator[tuple[str, int, bool]]:
    """Each instruction with how often it runs, and whether it does in a loop."""
    pending = [(entry, 1, False)]
    while pending:
        name, times, in_loop = pending.pop()
        for line in bodies[name]:
            if " while(" not in line:
                yield line, times, in_loop
                continue
            trips = trip_count(line, bodies)
            program.unknown_loops += trips is None
            pending.append((_matched(_BODY, line)[1], times * (trips or 1), True))


class _Written(NamedTuple):
    schedules: dict[str, Scheduled]  # by instruction
    called: set[str]  # the instructions that have bundles, their own or those of an equal one


def _steps(bodies: dict[str, list[str]]) -> dict[str, int]:
    """Per instruction the steps of its loop, where they are noted."""
    noted = {}
    for line in itertools.chain.from_iterable(bodies.values()):
        if (found := _INSTRUCTION.match(line)) and (bounds := _STEPS.search(line)):
            noted[found[1]] = math.prod(int(number) for number in re.findall(r"\d+", bounds[1]))
    return noted


def _read_files(directory: Path, steps: dict[str, int], conditions: dict[str, int]) -> _Written:
    schedules: dict[str, Scheduled] = {}
    called: set[str] = set()
    for path in sorted(directory.glob(f"*{_BUNDLES}")):
        bundles = path.read_text()
        stem = path.name.removesuffix(_BUNDLES)
        found = _matched(_FILE, stem)
        if found[1] == "TLP":  # the program's top level, which calls the others
            called |= set(_SCHEDULED.findall(bundles))
            continue
        units = next(directory.glob(f"{stem.rsplit('-', 1)[0]}-*{_UNITS}"))
        schedules[found[1]] = read_schedule(
            bundles, units.read_text(), steps.get(found[1]), conditions.get(found[1], 0)
        )
    for path in directory.iterdir():
        path.unlink()
    if not called:
        raise ValueError(f"libtpu wrote no bundles of a program into {directory}: it knows other options")
    return _Written(schedules, called)


class _Loop:
    def __init__(self) -> None:
        self.own, self.trips = Count(), 0


def read_schedule(bundles: str, units: str, steps: int | None = None, conditions: int = 0) -> Scheduled:
    """The counts of an instruction's two files.

    Args:
      steps: of its loop; None takes them from the loop's test, as do more steps than turns (some are unrolled).
      conditions: in a kernel's body.

    Raises:
      ValueError: the files do not fit each other.
    """
    used = iter(_units(units))
    stack, unknown = [_Loop()], 0
    longest, step = 0, Count()

    def close() -> None:
        nonlocal unknown, longest, step
        loop = stack.pop()
        unknown += not loop.trips
        stack[-1].own = stack[-1].own.plus(loop.own, loop.trips or 1)
        if loop.own.bundles * (loop.trips or 1) > longest:
            longest, step = loop.own.bundles * (loop.trips or 1), loop.own

    lines = bundles.splitlines()
    apart = _under_conditions(lines, conditions)
    conditional = [Count() for _ in range(conditions)]
    for number, line in enumerate(lines):
        if not (found := _BUNDLE.match(line)):
            continue
        depth, begins = found[2].count(">"), found[1] == "LB"
        if found[3]:  # an empty bundle is written without its loop
            depth = max(depth, len(stack) - 1)
        while len(stack) - 1 > depth or (begins and len(stack) - 1 == depth):
            close()
        while len(stack) - 1 < depth:
            stack.append(_Loop())
        if exit_test := _EXIT.search(line):
            turns = int(exit_test[1])
            stack[-1].trips = steps if steps is not None and steps <= turns else turns - _FILL_AND_DRAIN
        count = next(used, Count())
        if number in apart:
            conditional[apart[number]] = conditional[apart[number]].plus(count)
        else:
            stack[-1].own = stack[-1].own.plus(count)
    while len(stack) > 1:
        close()
    if next(used, None) is not None:
        raise ValueError("libtpu's lists of bundles and of their units differ in length: it writes otherwise")
    return Scheduled(stack[0].own, step if longest else stack[0].own, tuple(conditional), unknown)


def _under_conditions(lines: list[str], conditions: int) -> dict[int, int]:
    """Which condition a line is under, of the first ones in the longest branch, the one around a kernel's body."""
    branches: list[range] = []
    opened: dict[str, int] = {}
    for number, line in enumerate(lines):
        for joined in _JOIN.findall(line):
            if joined in opened:
                branches.append(range(opened.pop(joined) + 1, number))
        if branch := _BRANCH.search(line):
            opened[branch[1]] = number
    body = max(branches, key=len, default=range(0))
    inside = [x for x in branches if x != body and x.start in body and x.stop <= body.stop]
    outermost = [x for x in inside if not any(x != y and x.start in y for y in inside)]
    own = sorted(outermost, key=lambda x: x.start)[:conditions]
    return {number: index for index, x in enumerate(own) for number in x[_DELAY:]}


def _units(text: str) -> Iterator[Count]:
    """One count per bundle."""
    lines = [line for line in text.splitlines() if not line.startswith("==")]
    names = [name.strip() for name in lines[0].split(",")]
    spill, fill = names.index("VSTORE:SPILL"), names.index("VLOAD:FILL")
    for line in lines[2:]:
        row = [int(number) for number in line.split()]
        yield Count(1, row[spill], row[fill])


def _signatures(bodies: dict[str, list[str]]) -> dict[str, str]:
    """Per instruction a text that is the same for instructions that do the same, whatever their names."""
    types = {found[1]: found[2] for lines in bodies.values() for line in lines if (found := _INSTRUCTION.match(line))}
    signatures = {}
    for lines in bodies.values():
        for line in lines:
            if found := _INSTRUCTION.match(line):
                operands = [types[name] for name in _NAME.findall(_NOTES.sub("", found[4])) if name in types]
                called = bodies[calls[1]] if (calls := _CALLS.search(line)) else []
                signatures[found[1]] = _anonymous("\n".join([line, *called])) + "\n" + "\n".join(operands)
    return signatures


def _anonymous(text: str) -> str:
    numbers: Counter[str] = Counter()
    text = "\n".join(_NOTES.sub("", line).removeprefix("  ROOT") for line in text.splitlines())
    return _NAME.sub(lambda found: f"%{numbers.setdefault(found[1], len(numbers))}", text)


def _matched(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    found = pattern.search(text)
    if found is None:
        raise ValueError(f"expected {pattern.pattern} in {text.strip()[:200]!r}")
    return found
