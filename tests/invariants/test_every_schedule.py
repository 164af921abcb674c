"""Every schedule against the event simulation: the bound below it, the estimate near it, one class per stage or all ranks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import any_schedule

from simulator.closed_forms import bound, estimate
from simulator.feasibility import structure
from simulator.simulate import simulate_events, simulate_step


@pytest.mark.parametrize("experts", [False, True])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bound_and_estimate(experts, data):
    s = data.draw(any_schedule(experts))
    assert structure(s) == []
    step = simulate_step(s).step_time_s
    assert bound(s) <= step * (1 + 1e-9)
    assert estimate(s) == pytest.approx(step, rel=1e-6)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_classes_equal_every_rank(data):
    s = data.draw(any_schedule(experts=True))
    every = simulate_events(s, every_rank=True).step_time_s
    assert simulate_step(s).step_time_s == pytest.approx(every, rel=1e-9)
    assert simulate_step(s, ranks="all").step_time_s == pytest.approx(every, rel=1e-9)
