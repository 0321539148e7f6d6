import pytest

from darkformer_jax.aot.collectives import Collective, collectives, mesh_groups
from darkformer_jax.aot.roofline import chip_of, roofline
from darkformer_jax.errors import UserError
from darkformer_jax.model.flops import peak_flops

# In the manner of XLA: a scan of 12 steps within one of 3, a conditional, an asynchronous pair, a fused one in pieces.
PROGRAM = """
HloModule jit_step, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%inner (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %all-reduce.1 = (f32[4,8]{1,0:T(8,128)S(1)}, f32[]{:T(128)}) all-reduce(%a, %b), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  %beside = bf16[4,64] fusion(%q), kind=kOutput, calls=%piece.3
}

%piece.3 (q: bf16[1,64]) -> bf16[4,64] {
  ROOT %all-gather.7 = bf16[4,64]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}, frontend_attributes={chain_id="2"}
}

%inner_condition (p: (s32[], f32[4,8])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(12)
  %count = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%count, %constant.3), direction=LT
}

%piece.1 (q: bf16[1,64]) -> bf16[4,64] {
  ROOT %all-gather.5 = bf16[4,64]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}, frontend_attributes={chain_id="2"}
}

%piece.2 (q: bf16[1,64]) -> bf16[4,64] {
  ROOT %all-gather.6 = bf16[4,64]{1,0:T(8,128)(2,1)} all-gather(%q), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}, frontend_attributes={chain_id="2"}
}

%all-reduce-scatter.2 (input: f32[16,8]) -> f32[2,8] {
  %all-reduce.9 = f32[16,8]{1,0} all-reduce(%input), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

%outer (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %while.1 = (s32[], f32[4,8]) while(%p), condition=%inner_condition, body=%inner
  %fusion.1 = bf16[4,64] fusion(%q), kind=kLoop, calls=%piece.1
  %fusion.2 = bf16[4,64] fusion(%q), kind=kLoop, calls=%piece.2
  %manual.1 = f32[4]{0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %manual.2 = f32[4]{0} all-gather(%y), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %scattered = f32[2,8] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.2
}

%unknown_condition (p: (s32[], f32[4,8])) -> pred[] {
  ROOT %flag = pred[] get-tuple-element(%p), index=0
}

%left (x: f32[2]) -> f32[2] {
  ROOT %permute = f32[2]{0} collective-permute(%x), channel_id=3, source_target_pairs={{0,4},{4,0}}
}

%right (x: f32[2]) -> f32[2] {
  ROOT %same = f32[2]{0} copy(%x)
}

ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %while.2 = (s32[], f32[4,8]) while(%p), condition=%any, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %while.3 = (s32[], f32[4,8]) while(%p), condition=%unknown_condition, body=%right
  %choice = f32[2] conditional(%flag, %x, %x), branch_computations={%left, %right}
  %start = (f32[2,8]{1,0}, f32[16,8]{1,0}, u32[]{:S(2)}, u32[]) all-gather-start(%shard), channel_id=5, replica_groups=[1,8]<=[2,4]T(1,0), dimensions={0}
  %done = f32[16,8]{1,0} all-gather-done(%start)
  ROOT %out = f32[1,8]{1,0} reduce-scatter(%done), channel_id=6, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}
"""  # noqa: E501
ONE_SLICE, TWO_SLICES = [0] * 8, [0] * 4 + [1] * 4


@pytest.mark.parametrize("slices", [ONE_SLICE, TWO_SLICES])
def test_every_collective_counts_as_often_as_it_runs(slices):
    counts, unknown_loops = collectives(PROGRAM, slices)
    two = 2 if slices is TWO_SLICES else 1
    assert unknown_loops == 1
    assert counts == {
        Collective("all-reduce", 4 * 8 * 4 + 4, 4): 36,
        Collective("all-gather", 4 * 64 * 2, 4): 3,  # three pieces of one
        Collective("all-gather", 4 * 4, 4): 6,  # two, though shard_map gives all the same channel
        Collective("reduce-scatter", 16 * 8 * 4, 8, two): 3,
        Collective("collective-permute", 2 * 4, 2, two): 1,
        Collective("all-gather", 16 * 8 * 4, 8, two): 1,
        Collective("reduce-scatter", 2 * 8 * 4, 2): 1,
    }


@pytest.mark.parametrize(
    ("axes", "groups"),
    [
        ("'a'", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("'a','b'", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("'b':(1)2", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("'b':(2)2", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ],
)
def test_groups_along_axes_of_a_named_mesh(axes, groups):
    assert mesh_groups("'a'=2,'b'=4", axes) == groups


def test_bytes_on_the_wire():
    assert Collective("all-reduce", 800, 8).slice_bytes == 1400
    assert Collective("all-gather", 800, 8).slice_bytes == 700
    assert Collective("reduce-scatter", 800, 8).slice_bytes == 700
    assert Collective("collective-permute", 800, 2).slice_bytes == 800
    assert Collective("all-gather", 800, 8).network_bytes == 0
    # Of 4 devices in each of 2 slices, each fetches a fourth of the other slice's half and passes it on.
    two = Collective("all-gather", 800, 8, 2)
    assert (two.network_bytes, two.slice_bytes) == (100, 600)
    pair = Collective("collective-permute", 800, 2, 2)
    assert (pair.network_bytes, pair.slice_bytes) == (800, 0)


def test_the_slowest_part_bounds_the_step():
    counts, _ = collectives(PROGRAM, TWO_SLICES)
    chip, peak = chip_of("TPU v5 lite"), 8 * peak_flops("TPU v5 lite")
    bound = roofline(
        "TPU v5 lite", 8, model_flops=3 * peak, recomputed_flops=peak, hbm_traffic=chip.hbm_bandwidth, messages=counts
    )
    assert (bound.compute, bound.memory, bound.step, bound.mfu) == (4, 1, 4, 0.75)
    inside = 36 * 1.5 * 132 + 6 * 0.75 * 16 + 3 * 0.75 * 512 + 3 * 0.75 * 512 + 0.75 * 512 + 0.5 * 64
    across = 3 * 512 / 8 + 8 + 512 / 8
    assert bound.interconnect == pytest.approx(inside / chip.ici_bandwidth)
    assert bound.network == pytest.approx(across / chip.dcn_bandwidth)
    slow = roofline(
        "TPU v5 lite", 8, model_flops=peak, recomputed_flops=0, hbm_traffic=2 * chip.hbm_bandwidth, messages=counts
    )
    assert (slow.step, slow.mfu) == (2, 0.5)
    with pytest.raises(UserError, match="figures of 'abacus' are not known; known: TPU v4, TPU v5 lite"):
        chip_of("abacus")


def test_messages_between_slices_are_sends_of_the_runtime():
    hlo = """
ENTRY %main (p: f32[4,8]) -> f32[4,8] {
  %after-all.1 = token[] after-all(), frontend_attributes={MegascaleRendezvousKeyName="all-reduce.1_0"}
  %recv.1 = (f32[4,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%after-all.1), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send.1 = (f32[4,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%bitcast.1, %after-all.1), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send.2 = (bf16[16]{0}, u32[], token[]) send(%bitcast.2, %after-all.1), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1:4}x{0:3}",_xla_megascale_transfer_type="ALL_GATHER"}
}
"""  # noqa: E501 (as the compiler writes it)
    counts, unknown_loops = collectives(hlo, [0, 0, 0, 0, 1, 1, 1, 1])
    summed, gathered = Collective("all-reduce", 16384, 2, 2), Collective("all-gather", 128, 4, 4)
    assert counts == {summed: 1, gathered: 1} and not unknown_loops
    assert (summed.slice_bytes, summed.network_bytes) == (0, 16384)
    assert (gathered.slice_bytes, gathered.network_bytes) == (0, 96)
