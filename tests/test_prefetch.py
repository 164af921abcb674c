"""Parameters gathered ahead under ZeRO-3: one block as FSDP2 does by itself, fewer or more as the plan says."""

from __future__ import annotations

import pytest
from small import dense, scenario

from simulator.closed_forms import estimate
from simulator.scenario.plan import Overlap, Plan
from simulator.simulate import simulate_step

LAYERS = 6


def question(ahead: int, hidden: int):
    plan = Plan(zero=3, overlap=Overlap(prefetch=ahead))
    return scenario(dense(LAYERS, hidden), 16, plan, micro_batches=2)


def test_none_ahead_waits_for_every_gather():
    """Without prefetch compute waits for each gather as a whole; the first of a step waits in any case."""
    result = simulate_step(question(0, 2048))
    spans = result.timeline.table()
    gathers = spans[spans["name"].str.startswith("parameters")]
    computes = spans[(spans["stream"] == "compute") & (spans["rank_class"] == 0)]
    for start, end in gathers[["start_s", "end_s"]].to_numpy():
        beside = computes[(computes["start_s"] < end - 1e-12) & (computes["end_s"] > start + 1e-12)]
        assert beside.empty


def test_one_ahead_is_the_default():
    assert Overlap().prefetch == 1


@pytest.mark.parametrize("hidden", [256, 2048])
def test_more_ahead_never_takes_longer_and_levels_off(hidden):
    steps = [simulate_step(question(ahead, hidden)).step_time_s for ahead in range(LAYERS + 3)]
    assert steps[1] < steps[0]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in zip(steps[:2], steps[1:3], strict=True))
    assert steps[-1] == pytest.approx(steps[-2], rel=1e-9)


@pytest.mark.parametrize("ahead", [0, 1, 2, 4])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "dualpipe"])
def test_the_estimate_gathers_as_many_ahead(ahead, schedule):
    plan = Plan(pp=2, vpp=2 if schedule == "dualpipe" else 1, schedule=schedule, zero=3, overlap=Overlap(prefetch=ahead))
    s = scenario(dense(8, 2048), 16, plan, micro_batches=8)
    assert estimate(s) == pytest.approx(simulate_step(s).step_time_s, rel=0.02)
