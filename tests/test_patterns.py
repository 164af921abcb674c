"""Collectives as flows on an uncongested switch take what the formulas say; nothing is lost on the way."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.errors import NetworkError
from simulator.network import algorithms, patterns
from simulator.network.algorithms import Reach
from simulator.network.flows import flow_times
from simulator.network.patterns import SWITCH, Phase
from simulator.scenario.cluster import Protocols

RATE, SIZE = 50e9, 1e9
NOTHING = Protocols(ll="0 s", ll128="0 s", simple="0 s")


def on_switch(phases: Iterable[Phase], ranks: int, inside: int = 1, link: float = RATE) -> float:
    """Seconds of phases, one after the other, over one NIC per rank and, in a domain, one scale-up link per rank of `link`."""
    seconds = 0.0
    capacity = np.concatenate([np.full(2 * ranks, RATE), np.full(2 * ranks, link)])
    for source, target, size in phases:
        within = (source // inside == target // inside) | (source == SWITCH) | (target == SWITCH)
        up, down = source + 2 * ranks * within, target + ranks + 2 * ranks * within
        paths = [[u] * int(s != SWITCH) + [d] * int(t != SWITCH) for u, d, s, t in zip(up, down, source, target, strict=True)]
        seconds += flow_times(np.cumsum([0] + [len(p) for p in paths]), np.concatenate(paths), capacity, size).makespan_s
    return seconds


def reach(ranks: int, inside: int = 1, bus: float = RATE, reduce: float = 0.0) -> Reach:
    """Links without latency, filling or overhead."""
    return Reach(ranks, inside, ranks // inside, bus, reduce, RATE, 1.0, NOTHING, NOTHING, NOTHING, {"simple": 1.0}, 0.0, 0.0)


@pytest.mark.parametrize("ranks", [2, 3, 8, 13])
@pytest.mark.parametrize(("passes", "formula"), [(1, lambda r: algorithms.GATHER["ring"]), (2, lambda r: algorithms.ALL_REDUCE["ring"])])
def test_ring(ranks, passes, formula):
    expected = float(formula(ranks)(SIZE, reach(ranks), "simple"))
    assert on_switch(patterns.ring(ranks, SIZE, passes), ranks) == pytest.approx(expected, rel=1e-12)
    assert on_switch(patterns.ring_steps(ranks, SIZE, passes), ranks) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("ranks", [2, 4, 7, 8, 16, 21])
def test_double_tree(ranks):
    """Every rank sends 2 x size: up once as a leaf, up once and down twice half of it inside; of two ranks 1 x size."""
    found = on_switch(patterns.double_tree(ranks, SIZE), ranks)
    assert found == pytest.approx(float(algorithms.tree_s(SIZE, reach(ranks), "simple")), rel=1e-12)


@pytest.mark.parametrize("ranks", [2, 3, 8, 9, 32])
def test_leaves_of_one_tree_are_inside_the_other(ranks):
    phase = next(patterns.double_tree(ranks, 2.0))
    out = np.bincount(phase.source, phase.size_bytes, ranks)
    assert out.max() <= 4.0
    assert np.bincount(phase.target, phase.size_bytes, ranks) == pytest.approx(out)  # up and down are the same edges
    assert len(phase.source) == 4 * (ranks - 1)


@pytest.mark.parametrize("ranks", [2, 8, 64])
def test_halving_doubling(ranks):
    expected = float(algorithms.halving_doubling_s(SIZE, reach(ranks), "simple"))
    assert on_switch(patterns.halving_doubling(ranks, SIZE), ranks) == pytest.approx(expected, rel=1e-9)
    assert expected == pytest.approx(2 * (ranks - 1) / ranks * SIZE / RATE, rel=1e-12)


def test_halving_doubling_needs_a_power_of_two():
    with pytest.raises(NetworkError, match=r"needs 2\^k ranks; found 6: use a ring, or 4"):
        next(patterns.halving_doubling(6, SIZE))
    assert np.isinf(algorithms.halving_doubling_s(SIZE, reach(6), "simple"))


@pytest.mark.parametrize("ranks", [3, 8, 72])
def test_in_network_reduction(ranks):
    here = reach(ranks, ranks, 300e9, 300e9)
    found = on_switch(patterns.in_network(ranks, SIZE), ranks, ranks, 300e9)
    assert found + algorithms.IN_NETWORK_S == pytest.approx(float(algorithms.in_network_s(SIZE, here)), rel=1e-12)


def test_the_switches_wait_for_full_chunks():
    """20 domains of 72: 24 channels of 64 KiB per member are 113 MB a stage, 2 copies and 2 log2 20 levels of them fill the pipeline."""
    here = replace(reach(1440, 72, 800e9, 450e9), reduce_channels=24)
    loop = 24 * 72 * 64 * 2**10
    wire = 2 * 2e9 * (1 + 1 / 72) / 450e9
    expected = algorithms.IN_NETWORK_S + wire * (1 + (2 + 2 * np.log2(20)) * loop / 2e9)
    assert float(algorithms.in_network_s(2e9, here)) == pytest.approx(expected, rel=1e-12)
    assert float(algorithms.cheapest("all_reduce", 2e9, here)) == pytest.approx(expected)
    assert expected > float(algorithms.ring_s(2e9, here, "simple", 2)), "the tuner does not see what full chunks cost"


@pytest.mark.parametrize(
    ("domains", "size", "chunk"),
    [(1, 1e6, 16), (1, 20e6, 32), (1, 200e6, 64), (1, 2e9, 128), (2, 1e9, 128), (2, 50e6, 64), (8, 1e9, 64), (8, 5e6, 32)],
)
def test_chunks_are_as_long_as_the_buffer_allows(domains, size, chunk):
    """8 members and 16 channels: `size` over 128 chunks of 128 KiB is 0.06 to 119 loops."""
    here = replace(reach(8 * domains, 8, 300e9, 300e9), reduce_channels=16)
    assert float(algorithms.loop_bytes(size, here)) == 128 * chunk * 2**10


@pytest.mark.parametrize(("ranks", "inside"), [(16, 8), (32, 8), (24, 4)])
def test_hierarchical(ranks, inside):
    found = on_switch(patterns.hierarchical(ranks, SIZE, inside), ranks, inside, 300e9)
    assert found == pytest.approx(float(algorithms.hierarchical_s(SIZE, reach(ranks, inside, 300e9), "simple")), rel=1e-9)


@pytest.mark.parametrize("ranks", [2, 5, 8, 12])
def test_pat(ranks):
    assert on_switch(patterns.pat(ranks, SIZE), ranks) == pytest.approx(float(algorithms.pat_s(SIZE, reach(ranks), "simple")), rel=1e-9)


@pytest.mark.parametrize("pattern", [patterns.pairwise, patterns.all_to_all])
@pytest.mark.parametrize("ranks", [2, 5, 16])
def test_all_to_all(pattern, ranks):
    assert on_switch(pattern(ranks, SIZE), ranks) == pytest.approx((ranks - 1) / ranks * SIZE / RATE, rel=1e-9)


def test_hierarchical_all_to_all():
    """4 domains of 8: inside 7 x 4 blocks over the links, then 3 x 8 blocks over the NIC."""
    block = SIZE / 32
    found = on_switch(patterns.hierarchical_all_to_all(32, SIZE, 8), 32, 8, 300e9)
    assert found == pytest.approx(28 * block / 300e9 + 24 * block / RATE, rel=1e-9)


def test_expert_dispatch_is_as_slow_as_the_slower_of_its_networks():
    dispatch, combine = (
        on_switch(pattern(32, SIZE, 8, 2.7, 6.4), 32, 8, 150e9) for pattern in (patterns.expert_dispatch, patterns.expert_combine)
    )
    assert dispatch == combine == pytest.approx(max(2.7 * SIZE / RATE, 6.4 * SIZE / 150e9), rel=1e-12)
    assert on_switch(patterns.expert_dispatch(32, SIZE, 8, 1.0, 6.4), 32, 8, 150e9) == pytest.approx(6.4 * SIZE / 150e9, rel=1e-12)


def test_pxn_keeps_flows_on_their_rails():
    """Without: 24 of 32 ranks are reached by own NIC across rails. With: the fabric sees flows between equal rails only."""
    phase = next(patterns.all_to_all(32, SIZE))
    plain, proxied = (patterns.across_rails(phase, 8, pxn) for pxn in (False, True))
    leaves = proxied.source // 8 != proxied.target // 8
    assert (proxied.source[leaves] % 8 == proxied.target[leaves] % 8).all()
    assert proxied.size_bytes[leaves].sum() == pytest.approx(plain.size_bytes[plain.source // 8 != plain.target // 8].sum())
    out = np.bincount(proxied.source[leaves], proxied.size_bytes[leaves], 32)
    assert out == pytest.approx(np.full(32, 24 / 32 * SIZE))  # no NIC sends more than before
    assert len(proxied.source[leaves]) == 32 * 3
    assert on_switch([proxied], 32, 8, 300e9) == pytest.approx(24 / 32 * SIZE / RATE, rel=1e-12)


EVERY = [
    lambda n, g: patterns.ring_steps(n, SIZE, 2),
    lambda n, g: patterns.double_tree(n, SIZE),
    lambda n, g: patterns.hierarchical(n, SIZE, g),
    lambda n, g: patterns.pat(n, SIZE),
    lambda n, g: patterns.pairwise(n, SIZE),
    lambda n, g: patterns.hierarchical_all_to_all(n, SIZE, g),
    lambda n, g: patterns.expert_dispatch(n, SIZE, g, 2.0, 3.0),
    lambda n, g: patterns.expert_combine(n, SIZE, g, 2.0, 3.0),
]


@pytest.mark.parametrize("pattern", EVERY)
@given(domains=st.integers(1, 5), inside=st.integers(1, 6))
def test_bytes_sent_are_bytes_received(pattern, domains, inside):
    """Of every rank, over a whole collective: what it sends it receives, as all ranks do the same work."""
    n = domains * inside
    sent, received = np.zeros(n), np.zeros(n)
    for source, target, size in pattern(n, inside):
        assert ((source >= 0) & (source < n) & (target >= 0) & (target < n) & (source != target) & (size > 0)).all()
        sent += np.bincount(source, size, n)
        received += np.bincount(target, size, n)
    assert received == pytest.approx(sent, rel=1e-12)


def test_gathers_bring_everyone_everything():
    """PAT and the ring deliver each block once: n - 1 blocks received by each rank."""
    for pattern in (patterns.pat(12, 12.0), patterns.ring_steps(12, 12.0, 1)):
        received = sum(np.bincount(p.target, p.size_bytes, 12) for p in pattern)
        assert received == pytest.approx(np.full(12, 11.0))


@pytest.mark.parametrize("name", patterns.ALL_REDUCE)
def test_every_all_reduce_has_a_pattern_and_a_formula(name):
    assert name in algorithms.ALL_REDUCE
    assert sum(len(p.source) for p in patterns.ALL_REDUCE[name](16, SIZE, 8)) > 0
