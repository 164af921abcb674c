"""Memory of ranks whose experts receive uneven tokens: even ones to the byte, an uneven case by hand, capacity as a limit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from small import any_schedule, moe, roomy, scenario

from simulator.expert_memory import RankActivations, memory_per_rank
from simulator.feasibility import check, memory
from simulator.pricing.durations import Uneven
from simulator.scenario.plan import Plan
from simulator.scenario.routing import Routing
from simulator.simulate import simulate_ranks
from simulator.workload.memory import memory_per_stage
from simulator.workload.routing import moe_layer_count
from simulator.workload.stages import blocks, stage_blocks

PLAN = Plan(pp=2, ep=4)


def question(plan: Plan = PLAN, micro_batches: int = 4, routing: Routing | None = None, layers: int = 4, **changes):
    s = scenario(moe(layers), 8, plan, micro_batches, **changes)
    return s.model_copy(update={"routing": routing})


def of_experts(s) -> float:
    """Return the bytes that one micro-batch leaves in the experts of one layer: inputs, gate and up, their product, in bf16."""
    e, copies = s.model.experts, s.plan.micro_batch * s.job.sequence_length * s.model.experts.top_k
    return 2.0 * copies * (s.model.hidden + 3 * e.ffn)


@settings(max_examples=30, deadline=None)
@given(any_schedule(experts=True))
def test_even_tokens_are_todays_figure_to_the_byte(s):
    s = roomy(s)
    m, p, j = s.model, s.plan, s.job
    today = memory_per_stage(m, p, j, stage_blocks(m, p, j), blocks(m, p, j), s.micro_batches)
    shape = (moe_layer_count(m), s.micro_batches, p.world // p.pp)
    even = memory_per_rank(s, Uneven(np.ones((p.pp, shape[-1])), load=np.ones(shape)))
    for name, part in today.items():
        assert even[name].tolist() == part.tolist()
    assert np.unique(RankActivations(s, None).peaks(), axis=1).ravel().tolist() == today["activations"].tolist()


def test_an_uneven_case_by_hand():
    """Two stages of two layers, 1F1B: the first holds two micro-batches at once, the last one."""
    s = question()
    load = np.ones((moe_layer_count(s.model), s.micro_batches, 4))
    load[:, 1, 2], load[:, 1, 3] = 3.0, 0.0  # in micro-batch 1 the third rank gets three times its share, the fourth nothing
    layers = [sum(s.model.moe_layers[:2]), sum(s.model.moe_layers[2:])]
    even, uneven = (RankActivations(s, which).peaks() for which in (None, load))
    each = of_experts(s)
    more = (uneven - even).tolist()
    assert more[0] == pytest.approx([0, 0, 2 * layers[0] * each, 0], abs=1e-3)  # the fourth still holds 2 and 3 together
    assert more[1] == pytest.approx([0, 0, 2 * layers[1] * each, 0], abs=1e-3)


def test_a_jobs_heaviest_rank_is_another_one_on_each_layer():
    """A scalar load tells nothing of the sum over layers: memory is that of even experts, drawn routing has its own."""
    even = question()
    natural = even.model_copy(update={"job": even.job.model_copy(update={"routing": "natural", "expert_load": 2.0})})
    assert memory(natural)["total"].tolist() == memory(even)["total"].tolist()


def test_drawn_routing_decides_what_fits():
    skewed = Routing(distribution="zipf", exponent=1.2)
    s = question(routing=skewed, micro_batches=8)
    need, even = (float(memory(x)["total"].max()) for x in (s, question(micro_batches=8)))
    assert need > even
    between = s.cluster.accelerator.model_copy(update={"hbm_bytes": (need + even) / 2})
    tight = s.model_copy(update={"cluster": s.cluster.model_copy(update={"accelerator": between})})
    assert check(tight.model_copy(update={"routing": None})) == []
    assert [p.rule for p in check(tight)] == ["the model fits in memory"]


def test_capacity_bounds_the_peak():
    """What experts keep is at most the capacity factor times that of even tokens, but for rounding up the tokens of a slot."""
    capped = Routing(distribution="zipf", exponent=1.5, capacity_factor=1.25)
    free = capped.model_copy(update={"capacity_factor": None})
    peaks = {}
    for name, routing in (("free", free), ("capped", capped), ("even", None)):
        found = simulate_ranks(question(routing=routing)).activations()
        peaks[name] = found.groupby("stage")["peak_bytes"].max().to_numpy()
    s = question()
    layers, in_flight = np.array([sum(s.model.moe_layers[:2]), sum(s.model.moe_layers[2:])]), np.array([2, 1])
    experts = in_flight * layers * of_experts(s)
    assert (peaks["free"] > peaks["even"] + 0.3 * experts).all()
    assert (peaks["capped"] <= peaks["even"] + 0.26 * experts).all()


def test_over_time_reaches_the_peak_and_gives_all_back():
    result = simulate_ranks(question(routing=Routing(distribution="zipf", exponent=1.0)))
    peaks = result.activations()
    for rank in (0, int(peaks["peak_bytes"].idxmax()), 7):
        held = result.activations_over_time(rank)
        assert held["activations_bytes"].max() == pytest.approx(peaks["peak_bytes"][rank])
        assert held["activations_bytes"].iloc[-1] == pytest.approx(0.0, abs=1e-3)
    most = peaks.groupby("stage")["peak_bytes"].max().to_numpy()
    assert result.memory()["activations_bytes"].to_numpy() == pytest.approx(most)


def test_redundant_experts_that_do_not_divide_are_refused():
    (problem,) = check(question(routing=Routing(distribution="zipf", exponent=1.0, redundant_experts=3)))
    assert problem.rule == "expert slots divide by ep"
