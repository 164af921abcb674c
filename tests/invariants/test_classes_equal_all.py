"""One rank of each class gives the same step as all ranks simulated one by one, span by span."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from small import dense, moe, scenario, scenarios

from simulator.engine.timeline import Timeline
from simulator.feasibility import check
from simulator.scenario.plan import Plan
from simulator.scenario.scenario import Scenario
from simulator.simulate import classify, simulate_events, simulate_step

TOLERANCE = 1e-9


def classes_of(s: Scenario):
    return classify(s.plan, s.cluster, s.job.expert_load if s.job.routing == "natural" else 1.0, every_rank=False)


def by_rank(timeline: Timeline) -> dict[int, np.ndarray]:
    """Return the nodes of each class in the order in which they were emitted."""
    order = np.argsort(timeline.rank_class, kind="stable")
    return dict(enumerate(np.split(order, np.flatnonzero(np.diff(timeline.rank_class[order])) + 1)))


def assert_same(s: Scenario) -> int:
    """Compare the two simulations of `s` on every rank; return the number of classes."""
    few, every = simulate_step(s), simulate_events(s, every_rank=True)
    classes = classes_of(s)
    slack = TOLERANCE * every.step_time_s
    assert few.step_time_s == pytest.approx(every.step_time_s, rel=TOLERANCE)
    mine, theirs = by_rank(few.timeline), by_rank(every.timeline)
    assert len(theirs) == s.plan.world
    for rank, nodes in theirs.items():
        like = mine[int(classes.labels[rank])]
        for what in ("stream", "name", "action", "stage"):
            assert (getattr(few.timeline, what)[like] == getattr(every.timeline, what)[nodes]).all(), (rank, what)
        for what in ("start_s", "end_s"):
            assert np.abs(getattr(few.timeline, what)[like] - getattr(every.timeline, what)[nodes]).max() <= slack, (rank, what)
    assert sum(few.timeline.ranks) == s.plan.world
    return len(mine)


@settings(max_examples=40, deadline=None)
@given(scenarios(hidden=(256,), micro_batches=5))
def test_uniform_ranks_need_one_class_per_stage(s):
    assert check(s) == []
    assert assert_same(s) == s.plan.pp


def test_one_slow_host_splits_its_classes():
    even = scenario(dense(4), 32, Plan(tp=2, pp=2), 4)
    slow = scenario(dense(4), 32, Plan(tp=2, pp=2), 4, slow_hosts={5: 1.3})  # ranks 20 to 23: two tensor-parallel pairs of stage 1
    assert (assert_same(even), assert_same(slow)) == (2, 4)
    assert simulate_step(slow).step_time_s > simulate_step(even).step_time_s


def test_one_heavier_expert_rank_splits_its_classes():
    even = scenario(moe(4, 1024), 32, Plan(pp=2, ep=4), 4)
    heavy = scenario(moe(4, 1024), 32, Plan(pp=2, ep=4), 4, routing="natural", expert_load=2.0)
    assert (assert_same(even), assert_same(heavy)) == (2, 4)
    assert simulate_step(heavy).step_time_s > simulate_step(even).step_time_s


def test_a_slow_host_and_a_heavier_expert_rank_together():
    s = scenario(moe(4), 64, Plan(tp=2, cp=2, pp=2, ep=4), 4, routing="natural", expert_load=1.5, slow_hosts={3: 1.2, 12: 1.5})
    assert 8 < assert_same(s) < 64


@settings(max_examples=30, deadline=None)
@given(scenarios(hidden=(256,), micro_batches=5, slow=True))
def test_slow_hosts(s):
    assert assert_same(s) >= s.plan.pp


@settings(max_examples=30, deadline=None)
@given(scenarios(hidden=(256,), micro_batches=5, natural=True))
def test_natural_routing(s):
    assert assert_same(s) >= s.plan.pp


@settings(max_examples=30, deadline=None)
@given(scenarios(hidden=(256,), micro_batches=5, slow=True, natural=True))
def test_slow_hosts_and_natural_routing(s):
    assert_same(s)
