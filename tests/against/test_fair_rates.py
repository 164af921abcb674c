"""Oracles for sharing: lexicographic linear programs (scipy), SimGrid 4.1's recorded times, and sums worked out by hand."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from fat_tree import THREE_LEVELS, TWO_LEVELS, FatTree, all_to_all
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from simulator.errors import NetworkError
from simulator.network.flows import FlowTimes, fair_rates, flow_times

PATHS = [False, True] if importlib.util.find_spec("numba") else [False]
both = pytest.mark.parametrize("compiled", PATHS)


@st.composite
def traffic(draw, most=9):
    """Random flows over random links: indptr, links, capacity, weight."""
    links = draw(st.integers(1, 6))
    paths = draw(st.lists(st.lists(st.integers(0, links - 1), min_size=1, max_size=4, unique=True), min_size=1, max_size=most))
    capacity = draw(st.lists(st.sampled_from([1.0, 2.0, 3.0, 5.0, 7.5]), min_size=links, max_size=links))
    weight = draw(st.lists(st.sampled_from([1.0, 1.0, 2.0, 3.0]), min_size=len(paths), max_size=len(paths)))
    return np.cumsum([0] + [len(p) for p in paths]), np.concatenate(paths), np.array(capacity), np.array(weight)


def lexicographic(indptr, links, capacity, weight):
    """Max-min by linear programs: raise the lowest rate as far as it goes, fix the flows that cannot rise, repeat."""
    flows = len(weight)
    uses = np.zeros((len(capacity), flows))
    for f in range(flows):
        uses[links[indptr[f] : indptr[f + 1]], f] = weight[f]
    fixed: dict[int, float] = {}
    while len(fixed) < flows:
        free = [f for f in range(flows) if f not in fixed]
        at_least = np.zeros((len(free), flows + 1))
        at_least[np.arange(len(free)), free], at_least[:, -1] = -1, 1  # t <= rate
        bounds = [(fixed.get(f, 0), fixed.get(f)) for f in range(flows)]
        a, b = np.vstack([np.hstack([uses, np.zeros((len(capacity), 1))]), at_least]), np.append(capacity + 1e-12, np.zeros(len(free)))
        lowest = linprog(np.append(np.zeros(flows), -1.0), a, b, bounds=[*bounds, (0, None)]).x[-1]
        floor = [(lowest - 1e-9, None) if f in free else bounds[f] for f in range(flows)]
        for f in free:
            most = linprog(-np.eye(flows)[f], uses, capacity + 1e-9, bounds=floor)
            if -most.fun <= lowest + 1e-6:
                fixed[f] = lowest
    return np.array([fixed[f] for f in range(flows)])


@settings(max_examples=40, deadline=None)
@given(traffic(most=7))
def test_rates_equal_a_lexicographic_linear_program(case):
    assert fair_rates(*case) == pytest.approx(lexicographic(*case), rel=1e-5)


@given(traffic(most=12))
def test_every_flow_has_a_bottleneck(case):
    """Necessary and sufficient: on one of its links, full, nobody is faster (Bertsekas, Gallager, section 6.5.2)."""
    indptr, links, capacity, weight = case
    rate = fair_rates(*case)
    flow = np.repeat(np.arange(len(weight)), np.diff(indptr))
    used = np.bincount(links, (weight * rate)[flow], len(capacity))
    assert (used <= capacity * (1 + 1e-12)).all()
    fastest = np.zeros(len(capacity))
    np.maximum.at(fastest, links, rate[flow])
    tight = (used[links] >= capacity[links] * (1 - 1e-12)) & (rate[flow] >= fastest[links] * (1 - 1e-12))
    assert np.bincount(flow, tight, len(weight)).all()


def stepped(indptr, links, capacity, weight, size, ready) -> np.ndarray:
    """The definition: solve for every flow that is under way, go to the next begin or end, repeat."""
    left, finish = size.astype(float).copy(), np.full(len(size), np.inf)
    now = 0.0
    while np.isinf(finish).any():
        on = np.flatnonzero((ready <= now) & np.isinf(finish))
        later = ready[(ready > now) & np.isinf(finish)]
        until = later.min() - now if len(later) else np.inf
        if len(on):
            chosen = np.concatenate([links[indptr[f] : indptr[f + 1]] for f in on])
            rate = fair_rates(np.cumsum([0] + [indptr[f + 1] - indptr[f] for f in on]), chosen, capacity, weight[on])
            needs = left[on] / rate
            step = min(until, needs.min())
            left[on] -= rate * step
            ended = on[needs <= step * (1 + 1e-12) + 1e-15]
            finish[ended] = now + step
            now = later.min() if step == until else now + step
        else:
            now = later.min()
    return finish


@both
@settings(max_examples=60, deadline=None)
@given(case=traffic(), data=st.data())
def test_times_equal_step_by_step_solution(compiled, case, data):
    flows = len(case[3])
    size = np.array(data.draw(st.lists(st.sampled_from([1.0, 1.5, 4.0, 10.0]), min_size=flows, max_size=flows)))
    ready = np.array(data.draw(st.lists(st.sampled_from([0.0, 0.0, 0.5, 3.0]), min_size=flows, max_size=flows)))
    indptr, links, capacity, weight = case
    found = flow_times(indptr, links, capacity, size, ready, 0.0, weight, compiled=compiled)
    assert found.finish_s == pytest.approx(stepped(*case, size, ready), rel=1e-9)


@both
@given(case=traffic())
def test_a_weight_is_that_many_flows(compiled, case):
    indptr, links, capacity, weight = case
    again = np.repeat(np.arange(len(weight)), weight.astype(int))
    paths = [links[indptr[f] : indptr[f + 1]] for f in again]
    size = 1.0 + np.arange(len(weight))
    together = flow_times(indptr, links, capacity, size, weight=weight, compiled=compiled)
    single = flow_times(np.cumsum([0] + [len(p) for p in paths]), np.concatenate(paths), capacity, size[again], compiled=compiled)
    assert together.finish_s[again] == pytest.approx(single.finish_s, rel=1e-9)
    assert together.link_bytes == pytest.approx(single.link_bytes, rel=1e-12)


def on(tree: FatTree, source, target, size=1e6, **more) -> FlowTimes:
    indptr, links, capacity, latency = tree.paths(np.asarray(source), np.asarray(target))
    return flow_times(indptr, links, capacity, size, latency_s=latency, **more)


@both
@pytest.mark.parametrize(("tree", "simgrid_us"), [(TWO_LEVELS, 22.00), (THREE_LEVELS, 23.00)])
def test_ring_step_of_simgrid(compiled, tree, simgrid_us):
    hosts = np.arange(tree.hosts)
    assert on(tree, hosts, (hosts + 1) % tree.hosts, compiled=compiled).makespan_s * 1e6 == pytest.approx(simgrid_us, rel=1e-3)


@both
@pytest.mark.parametrize(
    ("tree", "hosts", "simgrid_us"), [(TWO_LEVELS, 64, 1261.00), (THREE_LEVELS, 64, 1262.00), (TWO_LEVELS, 256, 5101.00)]
)
def test_all_to_all_of_simgrid(compiled, tree, hosts, simgrid_us):
    assert on(tree, *all_to_all(hosts), compiled=compiled).makespan_s * 1e6 == pytest.approx(simgrid_us, rel=1e-3)


@pytest.mark.skipif(True not in PATHS, reason="numba is not installed")
@pytest.mark.parametrize("pattern", ["all-to-all", "permutation"])
def test_numba_and_numpy_give_the_same_times(pattern):
    rng = np.random.default_rng(4)
    tree = FatTree((8, 8), (1, 8))
    pairs = all_to_all(24) if pattern == "all-to-all" else (np.arange(64), rng.permutation(64))
    size = 1e6 * rng.uniform(0.9, 1.1, len(pairs[0]))
    numpy, numba = (on(tree, *pairs, size, compiled=c) for c in (False, True))
    assert numba.finish_s == pytest.approx(numpy.finish_s, rel=1e-9)


@both
def test_links_carry_what_is_sent(compiled):
    """Bytes sent = bytes received; what enters the top level leaves it; every host's first link carries what it sends."""
    rng = np.random.default_rng(5)
    tree, (source, target) = FatTree((4, 4, 2), (1, 4, 4)), all_to_all(32)
    size = rng.uniform(1, 2, len(source))
    times = on(tree, source, target, size, compiled=compiled)
    up, down = times.link_bytes.reshape(2, -1)
    assert up[:32] == pytest.approx(np.bincount(source, size))
    assert down[:32] == pytest.approx(np.bincount(target, size))
    assert up.sum() == pytest.approx(down.sum())
    assert (times.utilisation <= 1 + 1e-12).all()
    assert times.utilisation[times.hottest(1)[0]] == times.utilisation.max()


def test_slowdown_by_sharing():
    """Two flows over one link, one alone: 2, 2 and 1 times as long as alone."""
    times = flow_times([0, 1, 2, 3], [0, 0, 1], [10.0, 10.0], 100.0)
    assert times.slowdown.tolist() == [2.0, 2.0, 1.0]
    assert times.link_bytes.tolist() == [200.0, 100.0]


def test_flows_that_need_no_link_or_send_nothing():
    times = flow_times([0, 0, 1], [0], [10.0], [5.0, 0.0], start_s=[1.0, 2.0], latency_s=0.5)
    assert times.finish_s.tolist() == [1.5, 2.5]
    assert fair_rates([0, 0, 1], [0], [10.0]).tolist() == [np.inf, 10.0]


@both
def test_grain_ends_flows_together_and_never_early_by_more(compiled):
    rng = np.random.default_rng(6)
    tree, pairs = FatTree((8, 8), (1, 8)), all_to_all(24)
    size = 1e6 * rng.uniform(0.9, 1.1, len(pairs[0]))
    exact, coarse = (on(tree, *pairs, size, grain=g, compiled=compiled) for g in (0.0, 0.01))
    assert coarse.solves < exact.solves / 5
    assert coarse.finish_s == pytest.approx(exact.finish_s, rel=0.02)
    assert coarse.makespan_s == pytest.approx(exact.makespan_s, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1], [3], [1.0], 1.0), "capacity has links 0 to 0"),
        (([0, 2], [0], [1.0], 1.0), "indptr must rise from 0 to the 1 entries"),
        (([0, 1], [0], [0.0], 1.0), "link 0 carries flows at 0 bytes/s; give it a rate"),
        (([0, 1], [0], [1.0], -1.0), "size_bytes must be finite and not negative; found -1"),
        (([0, 1], [0], [1.0], [1.0, 2.0]), "size_bytes has shape (2,); give one number, or one for each of 1 flows"),
        (([0, 1], [0], [1.0], 1.0, np.nan), "start_s must be finite"),
        (([0, 1], [0], [1.0], 1.0, 0.0, 0.0, 0.0), "weight must be above 0; found 0"),
    ],
)
def test_bad_traffic(arguments, message):
    with pytest.raises(NetworkError) as error:
        flow_times(*arguments)
    assert message in str(error.value)
