"""The closed forms against the simulation: bound never above it, estimate on it where the rhythm of the schedule is regular."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import dense, moe, scenario, scenarios

from simulator.closed_forms import estimate
from simulator.feasibility import check
from simulator.lower_bound import bound
from simulator.scenario.overlap import Overlap
from simulator.scenario.plan import Plan
from simulator.scenario.scenario import Scenario
from simulator.simulate import simulate_step

ROUNDING = 1e-9


def replayed_whole(s: Scenario) -> bool:
    """Whether `estimate` replays every micro-batch instead of continuing at the pace of the first rounds."""
    micro_batches = s.job.global_batch // (s.plan.dp * s.plan.micro_batch)
    return s.plan.schedule == "gpipe" or micro_batches <= 8 * s.plan.pp or (s.plan.vpp > 1 and micro_batches % s.plan.pp > 0)


@settings(max_examples=100, deadline=None)
@given(scenarios())
def test_bound_below_and_estimate_on_the_simulation(s):
    assert check(s) == []
    step = simulate_step(s).step_time_s
    assert bound(s) <= step * (1 + ROUNDING)
    if replayed_whole(s):
        assert estimate(s) == pytest.approx(step, rel=ROUNDING)
    else:
        assert estimate(s) == pytest.approx(step, rel=0.02)


@settings(max_examples=40, deadline=None)
@given(scenarios(worlds=(4, 8), micro_batches=80, uneven=False))
def test_long_steps_of_even_stages_continue_at_their_pace(s):
    step = simulate_step(s).step_time_s
    assert bound(s) <= step * (1 + ROUNDING)
    assert estimate(s) == pytest.approx(step, rel=0.02)


@st.composite
def written_layouts(draw: st.DrawFn) -> Scenario:
    """Draw a pipeline whose stages hold anything, nothing included."""
    pp = draw(st.sampled_from((2, 4)))
    vpp = draw(st.sampled_from((1, 2, 3)))
    layers = draw(st.integers(1, 8))
    letters = "E" + "t" * layers + "L"
    cuts = sorted(draw(st.lists(st.integers(0, len(letters)), min_size=pp * vpp - 1, max_size=pp * vpp - 1)))
    layout = "|".join(letters[a:b] for a, b in zip([0, *cuts], [*cuts, len(letters)], strict=True))
    schedule = "interleaved" if vpp > 1 else draw(st.sampled_from(("gpipe", "1f1b")))
    overlap = Overlap(grad_reduce=draw(st.booleans()), param_gather=draw(st.booleans()))
    plan = Plan(pp=pp, vpp=vpp, schedule=schedule, layout=layout, zero=draw(st.sampled_from((0, 1, 2, 3))), overlap=overlap)
    model = draw(st.sampled_from((dense, moe) if layers > 1 else (dense,)))(layers, draw(st.sampled_from((256, 1024))))
    return scenario(model, 8, plan, pp * draw(st.integers(1, 12)))


@settings(max_examples=100, deadline=None)
@given(written_layouts())
def test_unbalanced_layouts(s):
    step = simulate_step(s).step_time_s
    assert bound(s) <= step * (1 + ROUNDING)
    assert estimate(s) == pytest.approx(step, rel=ROUNDING if replayed_whole(s) else 0.05)


@settings(max_examples=40, deadline=None)
@given(scenarios(slow=True, natural=True))
def test_bound_holds_with_slow_hosts_and_natural_routing(s):
    assert bound(s) <= simulate_step(s).step_time_s * (1 + ROUNDING)
