"""Oracle: collective times on round numbers, worked out by hand; groups counted rank by rank; what must hold for all numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from simulator.network.collectives import (
    all_gather_s,
    all_reduce_s,
    crossings,
    expert_all_to_all_s,
    latency_s,
    reduce_scatter_s,
    send_s,
)
from simulator.scenario.cluster import Cluster, Fabric, Host, Protocols
from simulator.scenario.mesh import Group, members
from simulator.scenario.mesh import group as axis_group
from simulator.scenario.plan import Plan
from simulator.scenario.profiles import CLUSTERS
from simulator.workload.classes import AXES

H100 = CLUSTERS.load("h100-rail-10240")
GB = 1e9


def latencies(scale: float) -> Protocols:
    return H100.host.hop_latency_s.model_copy(update={"ll": scale, "ll128": 2 * scale, "simple": 4 * scale})


def machine(
    latency: float = 0.0, oversubscription: tuple[float, ...] = (1, 1), nic: float = 50 * GB, efficiency: float = 0.8, bus: float = 300 * GB
) -> Cluster:
    """Hosts of 8 with 300 GB/s inside and 40 GB/s per NIC; leaves of 32, a spine of 128, a core of 512; payload 1/2, 3/4, 1."""
    host: Host = H100.host.model_copy(
        update={
            "bus_bytes_per_s": dict.fromkeys(("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"), bus),
            "nic_bytes_per_s": nic,
            "base_latency_s": latencies(10 * latency),
            "hop_latency_s": latencies(latency),
            "protocol_share": {"ll": 0.5, "ll128": 0.75, "simple": 1.0},
            "tree_share": 0.9,
            "reduction_share": 0.0,
            "fill_s": 0.0,
        }
    )
    reach = zip(("leaf", "spine", "core"), (32, 128, 512), (*oversubscription, 1), (3, 5, 7), strict=True)
    like = H100.fabric.tiers[0]
    tiers = tuple(
        like.model_copy(update={"name": n, "accelerators": a, "oversubscription": o, "latency_s": t * latency}) for n, a, o, t in reach
    )
    fabric: Fabric = H100.fabric.model_copy(
        update={"efficiency": efficiency, "hop_latency_s": latencies(2 * latency), "fill_s": 0.0, "tiers": tiers}
    )
    return H100.model_copy(update={"host": host, "fabric": fabric, "accelerators": 512})


FREE = machine()
INSIDE, ACROSS = Group(8, 1), Group(64, 1)  # one host; 8 hosts with 8 members each
ALONE_IN_HOST = Group(8, 8)  # 8 hosts with one member each


def price(function, size: float, group: Group, cluster: Cluster = FREE) -> float:
    return float(function(size, group, cluster))


# --- bandwidth ---


@pytest.mark.parametrize("function", [all_gather_s, reduce_scatter_s])
@pytest.mark.parametrize(
    ("group", "bus"),
    [
        (INSIDE, 300 * GB),
        (ACROSS, 300 * GB),  # 8 NICs carry 320 GB/s, so the links inside decide
        (Group(32, 2), 160 * GB),  # 4 members per host: 4 NICs
        (ALONE_IN_HOST, 40 * GB),
    ],
)
def test_ring_moves_its_share_at_the_bus_bandwidth(function, group, bus):
    n = group.size
    assert price(function, 8 * GB, group) == pytest.approx((n - 1) / n * 8 * GB / bus, rel=1e-14)


@pytest.mark.parametrize("group", [INSIDE, ACROSS, ALONE_IN_HOST])
def test_all_reduce_is_a_reduce_scatter_and_an_all_gather(group):
    parts = price(reduce_scatter_s, 8 * GB, group) + price(all_gather_s, 8 * GB, group)
    assert price(all_reduce_s, 8 * GB, group) == pytest.approx(parts, rel=1e-14)


@pytest.mark.parametrize("function", [all_gather_s, reduce_scatter_s, all_reduce_s])
def test_one_rank_has_nothing_to_say(function):
    assert price(function, 8 * GB, Group(1, 8), machine(1e-6)) == 0.0
    assert float(expert_all_to_all_s(8 * GB, Group(1, 8), machine(1e-6), 0.0, 0.0)) == 0.0


# --- latency ---


def test_ring_latency_and_protocols():
    """8 ranks of one host, hops of 1, 2, 4 us behind starts of 10, 20, 40: LL for small messages, Simple for large ones."""
    cluster = machine(1e-6)
    assert price(all_gather_s, 8.0, INSIDE, cluster) == pytest.approx(17e-6 + 7 / (150 * GB), rel=1e-12)
    assert price(all_gather_s, 8e6, INSIDE, cluster) == pytest.approx(
        min(17e-6 + 7e6 / 150e9, 34e-6 + 7e6 / 225e9, 68e-6 + 7e6 / 300e9), rel=1e-12
    )
    assert price(all_gather_s, 8e9, INSIDE, cluster) == pytest.approx(68e-6 + 7 / 300, rel=1e-12)


def test_ring_hops_between_hosts():
    """64 ranks of 8 hosts: 63 hops, 7 of them over the network at 2 us."""
    assert price(all_gather_s, 64.0, ACROSS, machine(1e-6)) == pytest.approx(10e-6 + 56e-6 + 14e-6 + 63 / (150 * GB), rel=1e-12)


def test_tree_beats_the_ring_on_small_messages():
    """Chain of 8 in each host, tree of depth 3 between 8 hosts, up and down; the ring would take 126 hops."""
    assert price(all_reduce_s, 64.0, ACROSS, machine(1e-6)) == pytest.approx(
        10e-6 + 2 * (7 + 3 * 2) * 1e-6 + 126 / (150 * GB * 0.9), rel=1e-12
    )


@pytest.mark.parametrize(
    ("group", "latency"),
    [(INSIDE, 1), (Group(16, 1), 3), (Group(4, 8), 3), (ACROSS, 5), (Group(2, 64), 5), (Group(512, 1), 7), (Group(1, 1), 0)],
)
def test_latency_is_that_of_the_highest_tier(group, latency):
    assert float(latency_s(group, machine(1e-6))) == pytest.approx(latency * 1e-6, rel=1e-14)


# --- oversubscription: every group of the same kind communicates at once ---


@pytest.mark.parametrize(
    ("group", "rate"),
    [
        # one ring through 512 ranks enters a leaf of 4 hosts with 8 NICs of its 32: 4 to 1 costs nothing, but is all there is
        (Group(512, 1), 40 * GB),
        # rings of one rank per host, two hosts per leaf meet: 16 of 32 NICs leave through a quarter
        (Group(32, 16), 20 * GB),
        # rings of one rank per leaf: everything leaves
        (Group(16, 32), 10 * GB),
        # rings inside a leaf: nothing leaves
        (Group(4, 8), 40 * GB),
    ],
)
def test_ring_through_an_oversubscribed_leaf(group, rate):
    cluster = machine(oversubscription=(4, 1), bus=1e15)
    inside = float(crossings(group, cluster)[0])
    assert price(all_gather_s, 8 * GB, group, cluster) == pytest.approx((group.size - 1) / group.size * 8 * GB / (inside * rate), rel=1e-12)


def test_ring_that_fills_its_leaf_uplinks():
    """8 to 1: the ring's 8 NICs would need 8 of a leaf's 4 uplinks."""
    cluster = machine(oversubscription=(8, 1), bus=1e15)
    assert price(all_gather_s, 8 * GB, Group(512, 1), cluster) == pytest.approx(511 / 512 * 8 / 160, rel=1e-12)


def test_oversubscription_multiplies_up_the_tiers():
    """2 to 1 at the leaf and 4 to 1 at the spine: an eighth for rings of one rank per spine."""
    cluster = machine(oversubscription=(2, 4), bus=1e15)
    assert price(all_gather_s, 8 * GB, Group(4, 128), cluster) == pytest.approx(3 / 4 * 8 / 5, rel=1e-12)


def test_headroom_is_no_use_to_anyone():
    assert price(all_gather_s, 8 * GB, Group(4, 128), machine(oversubscription=(0.5, 1))) == price(all_gather_s, 8 * GB, Group(4, 128))


@pytest.mark.parametrize(
    ("group", "out", "slower"),
    [
        (Group(16, 1), 1.0, 1),  # two hosts under one leaf
        (Group(64, 1), 1.0, 4 * 32 / 56),  # 2 leaves: of the 56 members in other hosts 32 are beyond the leaf
        (Group(16, 32), 1.0, 4),  # one member per leaf: everything leaves
    ],
)
def test_all_to_all_through_an_oversubscribed_leaf(group, out, slower):
    cluster = machine(oversubscription=(4, 1))
    assert float(expert_all_to_all_s(GB, group, cluster, out, 0.0)) == pytest.approx(GB * out / (40 * GB) * slower, rel=1e-12)


# --- all-to-all and sends ---


def test_all_to_all_is_as_slow_as_the_slower_of_its_networks():
    assert float(expert_all_to_all_s(GB, ACROSS, FREE, 4.0, 6.0)) == pytest.approx(4 / 40, rel=1e-14)
    assert float(expert_all_to_all_s(GB, ACROSS, FREE, 0.5, 6.0)) == pytest.approx(6 / 300, rel=1e-14)


def test_all_to_all_latency():
    """Start, one hop; between hosts also the network's hop and the way through the spine."""
    assert float(expert_all_to_all_s(0.0, INSIDE, machine(1e-6), 0.0, 1.0)) == pytest.approx(11e-6, rel=1e-12)
    assert float(expert_all_to_all_s(0.0, ACROSS, machine(1e-6), 1.0, 1.0)) == pytest.approx((10 + 2 + 5) * 1e-6, rel=1e-12)


@pytest.mark.parametrize(
    ("pipeline", "rate", "latency"),
    [
        (Group(4, 2), 300, 1),  # inside a host
        (Group(4, 4), 40, 3),  # two hosts: the second hop leaves
        (Group(4, 8), 40, 3),
        (Group(16, 32), 40, 7),
    ],
)
def test_send_over_the_slowest_hop(pipeline, rate, latency):
    assert float(send_s(GB, pipeline, machine(1e-6))) == pytest.approx(latency * 1e-6 + 1 / rate, rel=1e-12)


@pytest.mark.parametrize(("stride", "slower"), [(8, 2), (16, 4), (32, 8), (64, 8)])
def test_send_out_of_an_oversubscribed_leaf(stride, slower):
    """8 to 1, pipelines of 8: the last `stride` of a leaf's 32 ranks send to the next leaf through 4 uplinks."""
    assert float(send_s(GB, Group(8, stride), machine(oversubscription=(8, 1)))) == pytest.approx(slower / 40, rel=1e-12)


@pytest.mark.parametrize(
    ("function", "factor", "measured"), [(all_gather_s, 1, 335 * GB), (reduce_scatter_s, 1, 336 * GB), (all_reduce_s, 2, 445 * GB)]
)
def test_nccl_tests_definition_of_bus_bandwidth(function, factor, measured):
    """busbw = size / time * (n - 1)/n, twice that for all-reduce; against aiconfigurator's 8 H100 at 512 MiB."""
    n, size = 8, 512 * 2**20
    assert factor * (n - 1) / n * size / price(function, size, Group(n, 1), H100) == pytest.approx(measured, rel=0.05)


# --- groups ---


@given(size=st.integers(1, 24), stride=st.integers(1, 24), block=st.integers(1, 72))
def test_members_in_a_block_are_exact_where_groups_fall_evenly(size, stride, block):
    """Brute force over every group of an axis; where the groups do not fall evenly, no fewer than one and no more than the fullest."""
    counts = []
    for first in range(0, size * stride * block, size * stride):
        for offset in range(stride):
            ranks = first + offset + stride * np.arange(size)
            counts.append(np.unique(ranks // block, return_counts=True)[1])
    every = np.concatenate(counts)
    found = int(Group(size, stride).within(block))
    if every.min() == every.max():
        assert found == every[0]
    assert 1 <= found <= every.max()


@given(
    tp=st.sampled_from([1, 2, 4]), cp=st.sampled_from([1, 2]), pp=st.sampled_from([1, 2, 4]), ep=st.sampled_from([1, 2, 4]),
    etp=st.sampled_from([1, 2]), shard=st.sampled_from([1, 2, 4]), replicas=st.sampled_from([1, 2]),
)  # fmt: skip
def test_groups_of_an_axis_partition_the_ranks(tp, cp, pp, ep, etp, shard, replicas):
    plan = Plan(tp=tp, cp=cp, pp=pp, ep=ep, etp=etp, dp_shard=shard, dp_replicate=replicas)
    assume((shard * cp * tp) % (ep * etp) == 0)
    for axis in AXES:
        labels, counts = np.unique(members(plan, axis), return_counts=True)
        assert set(counts) == {axis_group(plan, axis).size}
        assert len(labels) * counts[0] == plan.world
    stage = np.arange(plan.world) // (plan.world // pp)
    for axis in ("tp", "ep", "etp", "dp", "edp", "dp_replicate"):  # no group spans stages
        for label in np.unique(members(plan, axis)):
            assert len(set(stage[members(plan, axis) == label])) == 1


# --- for all numbers ---

PRICES = [
    all_gather_s,
    reduce_scatter_s,
    all_reduce_s,
    send_s,
    lambda size, group, cluster: expert_all_to_all_s(size, group, cluster, 2.5, 4.0),
]
GROUPS = st.builds(Group, st.integers(2, 64), st.sampled_from([1, 2, 4, 8, 16, 32]))


@given(group=GROUPS, size=st.floats(1, 1e11), more=st.floats(1, 10), latency=st.sampled_from([0.0, 1e-6]), down=st.floats(0.5, 16))
def test_more_bytes_are_never_faster(group, size, more, latency, down):
    cluster = machine(latency, (down, 1))
    for function in PRICES:
        assert price(function, size, group, cluster) <= price(function, size * more, group, cluster) * (1 + 1e-12)


@given(group=GROUPS, size=st.floats(1, 1e11), more=st.floats(1, 4), down=st.floats(1, 16))
def test_a_faster_link_is_never_slower(group, size, more, down):
    slow = machine(1e-6, (down, 1), nic=20 * GB, efficiency=0.5, bus=200 * GB)
    better = [
        machine(1e-6, (down, 1), nic=20 * GB * more, efficiency=0.5, bus=200 * GB),
        machine(1e-6, (down, 1), nic=20 * GB, efficiency=min(0.5 * more, 1.0), bus=200 * GB),
        machine(1e-6, (down, 1), nic=20 * GB, efficiency=0.5, bus=200 * GB * more),
        machine(1e-6, (1 + (down - 1) / more, 1), nic=20 * GB, efficiency=0.5, bus=200 * GB),
        machine(1e-6 / more, (down, 1), nic=20 * GB, efficiency=0.5, bus=200 * GB),
    ]
    for function in PRICES:
        base = price(function, size, group, slow)
        assert all(price(function, size, group, cluster) <= base * (1 + 1e-12) for cluster in better)


@given(rows=st.lists(st.tuples(st.floats(1, 1e11), st.integers(1, 64), st.sampled_from([1, 2, 4, 8, 32])), min_size=1, max_size=6))
def test_columns_are_priced_as_rows(rows):
    size, count, stride = (np.array(c) for c in zip(*rows, strict=True))
    for cluster in (machine(1e-6, (4, 2)), H100):
        for function in PRICES:
            together = np.asarray(function(size, Group(count, stride), cluster))
            assert together.tolist() == [float(function(s, Group(n, d), cluster)) for s, n, d in rows]
