"""Parameters gathered ahead under ZeRO-3: one block as FSDP2 does by itself, fewer or more as the plan says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small import dense, scenario

from simulator.closed_forms import estimate
from simulator.lower_bound import bound
from simulator.pricing.operations import op_s
from simulator.pricing.stage_times import beside
from simulator.scenario.overlap import Overlap
from simulator.scenario.plan import Plan
from simulator.simulate import simulate_step
from simulator.workload.ops import Op
from simulator.workload.stages import blocks

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


@pytest.mark.parametrize(("ahead", "shares"), [(0, False), (1, True)])
def test_kernels_slow_only_for_gathers_that_run_beside_them(ahead, shares):
    s = question(ahead, 2048)
    block = blocks(s.model, s.plan, s.job)["layer0"]
    assert any(op.name.startswith("parameters") for op in beside(block, "F", s.plan)) == shares


def test_one_ahead_is_the_default():
    assert Overlap().prefetch == 1


@pytest.mark.parametrize("hidden", [256, 2048])
def test_more_ahead_never_takes_longer_and_levels_off(hidden):
    """Where gathers hide it levels off. Where communication never rests, too many ahead leave the last kernels nothing to run beside."""
    steps = [simulate_step(question(ahead, hidden)).step_time_s for ahead in range(LAYERS + 3)]
    assert steps[1] < steps[0]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in zip(steps[:2], steps[1:3], strict=True))
    if hidden == 2048:
        assert steps[-1] == pytest.approx(steps[-2], rel=1e-9)
    assert max(steps[2:]) <= steps[1]


@pytest.mark.parametrize("ahead", [0, 1, 2, 4])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "dualpipe"])
def test_the_estimate_gathers_as_many_ahead(ahead, schedule):
    plan = Plan(pp=2, vpp=2 if schedule == "dualpipe" else 1, schedule=schedule, zero=3, overlap=Overlap(prefetch=ahead))
    s = scenario(dense(8, 2048), 16, plan, micro_batches=8)
    assert estimate(s) == pytest.approx(simulate_step(s).step_time_s, rel=0.02)


def by_tensor(recompute: str, **overlap):
    plan = Plan(zero=3, recompute=recompute, overlap=Overlap(prefetch=0, **overlap))
    return scenario(dense(LAYERS, 2048), 16, plan, micro_batches=2)


def test_matrix_by_matrix_a_layer_is_gathered_once_more_for_its_recompute():
    """Three gathers of a layer instead of two, and as many parameters in each as when all move at once."""

    def gathers(s):
        spans = simulate_step(s).timeline.table()
        return (spans["name"].str.startswith("parameters") & (spans["rank_class"] == 0)).sum()

    blocks = LAYERS + 2  # with embedding and head
    assert gathers(by_tensor("none", by_tensor=True)) == 2 * 2 * blocks
    assert gathers(by_tensor("full", by_tensor=True)) == 2 * 3 * blocks
    assert gathers(by_tensor("full")) == 2 * 2 * blocks


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_estimate_knows_matrix_by_matrix(recompute):
    s = by_tensor(recompute, by_tensor=True)
    assert estimate(s) == pytest.approx(simulate_step(s).step_time_s, rel=0.02)
    assert bound(s) <= simulate_step(s).step_time_s
    assert estimate(s) > estimate(by_tensor(recompute))


def test_a_collective_matrix_by_matrix_is_that_many_of_its_parts_and_a_copy_for_every_rank():
    s = by_tensor("none", by_tensor=True)
    host = s.cluster.host.model_copy(update={"dispatch_s": 50e-6})
    args = s.model, s.plan, s.cluster.model_copy(update={"host": host})
    whole = Op("parameters.dp", "all_gather", bytes=4e8, axis="dp")
    part = float(op_s(replace(whole, bytes=1e8), *args))
    assert float(op_s(replace(whole, turns=4), *args)) == pytest.approx(4 * part, rel=1e-12)
    ranks, memory = s.plan.on(s.cluster.accelerators).dp_shard, s.cluster.accelerator
    launched = ranks * 0.12 * 50e-6
    streamed = 2 * 1e8 / (memory.hbm_bytes_per_s * memory.hbm_efficiency * memory.in_training.get("memory", 1.0)) + ranks * memory.launch_s
    listed = float(op_s(replace(whole, turns=4, listed=True), *args))
    assert listed == pytest.approx(4 * (part + max(launched, streamed)), rel=1e-12)
