"""The bundles of the kernels for TPUs, counted in what the compiler writes, and compared with those that are known."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tpu_bundles import Count, read_program, read_schedule
from benchmarks.tpu_schedule import Case, compilers, grown, needs, parse

GOLDEN = Path(__file__).with_name("tpu_schedule.json")
RENEW = "python -m benchmarks.tpu_schedule --golden=tests/aot/tpu_schedule.json"


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: bash launch/install.sh aot"
)
def test_kernels_need_no_more_bundles_spills_and_vmem_than_the_golden_file_says(tmp_path):
    known = json.loads(GOLDEN.read_text())
    if compilers() not in known:
        pytest.skip(f"{GOLDEN.name} has figures of {'; '.join(known)}, not of {compilers()}; to add them: {RENEW}")
    written = tmp_path / "golden.json"
    command = [sys.executable, "-m", "benchmarks.tpu_schedule", f"--golden={written}"]
    ended = subprocess.run(command, cwd=GOLDEN.parents[2], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    more = grown(known[compilers()], json.loads(written.read_text())[compilers()])
    assert not more, "\n".join(["more than 3% above the golden file:", *more, f"if it must be so: {RENEW}"])


def test_figures_are_named_that_grow_by_more_than_three_percent():
    before = {"a": {"forward": {"bundles": 1000, "spills": 0}}, "b": {"forward": {"bundles": 10}}}
    now = {"a": {"forward": {"bundles": 1030, "spills": 1}}, "b": {"forward": {"bundles": 5}}}
    assert grown(before, now) == ["a, forward: 0 spills, now 1"]
    now["a"]["forward"]["bundles"] = 1031
    assert "a, forward: 1,000 bundles, now 1,031" in grown(before, now)
    assert grown(before, {"a": now["a"] | before["a"]}) == ["b: not compiled"]


# Three bundles before a loop of two, of which one is empty, and one after it.
BUNDLES = """
LB: loop body
     0   :  { %s0 = smov 0 }
   0x1   :  { %v1 = vld [vmem:[%s0] sm:$0xff] }
   0x2 PF:  {}
   0x3 LB: > { %v2 = vmatmul %v1  ;;  %p4 = scmp.ge.s32.totalorder %s45, 10 /* loop exit test */ }
   0x4   :  {}
   0x5   :  { %s6 = sfence } /* exit bundle: %kernel.1 = custom-call(%x) */
"""
UNITS = """== CAPACTIY:
MXU, XLU, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL
    4     3     3     1     1     1
== UTILIZATION:
0 0 0 0 0 0
0 0 1 0 0 0
0 0 0 0 0 0
3 0 0 0 0 1
0 0 0 2 0 0
0 0 0 0 0 0
"""


@pytest.mark.parametrize(("steps", "times"), [(None, 8), (7, 7), (64, 8)])
def test_the_bundles_of_a_loop_count_as_often_as_it_has_steps(steps, times):
    """By its exit test, less the turns that fill and drain, if the HLO names no steps or more than turns."""
    schedule = read_schedule(BUNDLES, UNITS, steps)
    assert schedule.step == Count(bundles=2, spills=1, fills=2)
    assert schedule.total == Count(4 + 2 * times, times, 2 * times)
    assert schedule.unknown_loops == 0


# A kernel's body within the pipeline's condition: two conditions of its own, the first in one of the pipeline's.
CONDITIONS = """
   0x1 LB: > { %p1 = scmp.eq.s32.totalorder %s1, 0 }
   0x2   : > { %1 = sbr.rel (%p1) target = $region9 }
   0x3   : > { %v2 = vmatmul %v1 }
   0x4   : > { %2 = sbr.rel (%p2) target = $region5 }
"""
CONDITIONS += "".join(f"   {hex(5 + place)}   : > {{ %v3 = vadd %v1 }}\n" for place in range(6))
CONDITIONS += """   0xb PF: > { %3 = sbr.rel (!%p3) target = $region6 } /* Start/End empty region 5 */
"""
CONDITIONS += "".join(f"   {hex(12 + place)}   : > {{ %v3 = vadd %v1 }}\n" for place in range(7))
CONDITIONS += """  0x13 PF: > {} /* Start/End empty region 6 :: Start/End empty region 9 */
  0x14   : > { %p4 = scmp.ge.s32.totalorder %s45, 10 /* loop exit test */ }
"""


@pytest.mark.parametrize(("conditions", "apart"), [(0, ()), (1, (2,)), (2, (2, 3)), (3, (2, 3, 0))])
def test_what_a_kernel_does_under_conditions_of_its_own_is_counted_apart(conditions, apart):
    units = "MXU, VLOAD:FILL, VSTORE:SPILL\n1 1 1\n" + "0 0 0\n" * 20
    schedule = read_schedule(CONDITIONS, units, conditions=conditions)
    assert tuple(x.bundles for x in schedule.conditional) == apart
    assert (schedule.step.bundles, schedule.total.bundles) == (20 - sum(apart), 8 * (20 - sum(apart)))


def test_a_loop_without_a_count_is_counted_once_and_said():
    schedule = read_schedule(BUNDLES.replace("scmp.ge.s32.totalorder %s45, 10", "scmp.ge %s45, %s46"), UNITS)
    assert (schedule.total.bundles, schedule.unknown_loops) == (6, 1)


def test_files_that_do_not_fit_each_other_are_refused():
    with pytest.raises(ValueError, match="differ in length"):
        read_schedule(BUNDLES, UNITS + "0 0 0 0 0 0\n")


HLO = """
HloModule jit_f

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x.1 = f32[8]{0} get-tuple-element(%p), index=1
  %exp.2 = f32[8]{0} exponential(%x.1), metadata={op_name="b"}, backend_config={"iteration_bounds":["2","3"],"estimated_cycles":"50"}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %exp.1 = f32[8]{0} exponential(%a), metadata={op_name="a"}, backend_config={"iteration_bounds":["2","3"],"estimated_cycles":"50","used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}]}
  %kernel.1 = f32[8]{0} custom-call(%exp.1), custom_call_target="tpu_custom_call", backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"8192"}]}
  ROOT %while.1 = (s32[], f32[8]) while(%kernel.1), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""  # noqa: E501 (as the compiler writes it)


def write_dump(directory, *names):
    calls = "".join(f"  0x1  :  {{ %1 = inlined_call %s1 /* %{name} = op(%a) */ }}\n" for name in ("exp.1", *names))
    (directory / "17-TLP-03-final_bundles.txt").write_text(calls)
    for number, name in enumerate(("exp.1", "kernel.1")):
        (directory / f"{number}-{name}-03-final_bundles.txt").write_text(BUNDLES)
        (directory / f"{number}-{name}-01-final_hlo-static-per-bundle-utilization.txt").write_text(UNITS)


def test_loops_and_instructions_that_were_scheduled_once_for_all_are_counted(tmp_path):
    write_dump(tmp_path, "exp.2", "kernel.1")
    program = read_program(HLO, tmp_path)
    (kernel,) = program.kernels
    assert (kernel.schedule.total.bundles, kernel.vmem_bytes) == (4 + 2 * 8, 8192)
    of_exp = 4 + 2 * 6
    assert (program.besides.bundles, program.besides_in_loops.bundles) == (of_exp * (1 + 5), of_exp * 5)
    assert (program.estimated_cycles, program.vmem_bytes) == (50 * 6, 4096)
    assert not list(tmp_path.iterdir())  # the next program's go there


def test_an_instruction_without_bundles_is_named(tmp_path):
    write_dump(tmp_path, "while.2", "kernel.1", "x.1")
    with pytest.raises(ValueError, match=r"libtpu wrote no bundles of x\.1"):
        read_program(HLO, tmp_path)
    with pytest.raises(ValueError, match="libtpu wrote no bundles of a program"):
        read_program(HLO, tmp_path)  # which is empty now


def test_the_roofline_counts_the_mathematics():
    whole = needs(Case("v5e", 128, "kernel", "forward"))
    assert whole == (8192 * 8 * (4 * 128**2 + 8 * 128 * 256 + 2 * 256 * (256 + 128) + 2 * 256), 4 * 2 * 8192 * 8 * 128)
    flops, num_bytes = needs(Case("v5e", 128, "scan", "forward+backward"))
    assert (flops, num_bytes) == (3 * whole[0], 3 * whole[1])
    grouped = needs(Case("v5e", 256, "kernel", "forward", kv_heads=1))
    assert grouped[1] == 2 * 8192 * 256 * (2 * 8 + 2)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--chips=v9", "--chips: unknown v9; allowed: v5e, v6e"),
        ("--dims=128,129", "--dims: unknown 129; allowed: 64, 128, 256"),
        ("--length=0", "--length=0: must be at least 1"),
        ("--golden=nowhere/x.json", "--golden=nowhere/x.json: there is no directory"),
    ],
)
def test_a_wrong_flag_is_one_line(flag, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parse([flag])
    assert ended.value.code == 2 and message in capsys.readouterr().err
