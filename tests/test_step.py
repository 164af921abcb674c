"""The program of a step: which collectives it holds, in which order, and what waits for what."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from small import Small, dense, moe, scenario

from simulator.closed_forms import estimate
from simulator.lower_bound import bound
from simulator.pricing.operations import op_s
from simulator.scenario.overlap import Overlap
from simulator.scenario.plan import Plan
from simulator.simulate import classify, simulate_step
from simulator.workload.build import build_step
from simulator.workload.ops import Op
from simulator.workload.step import StepProgram


def program(s: Small) -> StepProgram:
    return build_step(s.model, s.plan, s.job, classify(s.plan, s.cluster, 1.0, every_rank=False))


def names(p: StepProgram, nodes: list[int]) -> list[str]:
    return [p.tasks[p.task[n]].name for n in nodes]


def counted(s: Small, stream: str = "dp") -> Counter[str]:
    p = program(s)
    return Counter(name for (_, on), nodes in p.streams().items() if on == stream for name in names(p, nodes))


# --- data-parallel collectives ---

BLOCKS, MICRO_BATCHES = 2 + 4, 6  # embedding, four layers, head


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize(
    ("zero", "reductions", "gathers"),
    [
        (0, BLOCKS, 0),
        (1, BLOCKS, BLOCKS),
        (2, BLOCKS * MICRO_BATCHES, BLOCKS),
        (3, BLOCKS * MICRO_BATCHES, 2 * BLOCKS * MICRO_BATCHES),
    ],
)
@pytest.mark.parametrize("ahead", [True, False])
def test_each_zero_stage_gathers_and_reduces_as_often_as_it_must(pp, zero, reductions, gathers, ahead):
    """ZeRO-2 and ZeRO-3 reduce, and ZeRO-3 gathers before either pass, for every micro-batch; one rank per stage is counted."""
    plan = Plan(pp=pp, zero=zero, overlap=Overlap(grad_reduce=ahead, param_gather=ahead))
    found = counted(scenario(dense(4), 4 * pp, plan, MICRO_BATCHES))
    assert (found["gradients.dp"], found["parameters.dp"]) == (reductions, gathers)
    assert found["optimizer.norm"] == pp


def test_experts_reduce_over_their_own_group_and_replicas_on_top():
    found = counted(scenario(moe(4), 16, Plan(ep=2, dp_replicate=2), 2))
    assert found == {
        "gradients.dp": 6, "gradients.dp.replicas": 6, "gradients.edp": 3, "gradients.edp.replicas": 3,
        "parameters.dp": 6, "parameters.edp": 3, "optimizer.norm": 1,
    }  # fmt: skip


def test_zero_3_gathers_a_block_while_the_one_before_it_computes():
    """In the backward pass too: the next gather goes before the reduction that waits for the block."""
    p = program(scenario(dense(2), 4, Plan(zero=3), 1))
    order = names(p, p.streams()[0, "dp"])
    gather, reduce = "parameters.dp", "gradients.dp"
    assert order == [gather] * 4 + [gather, gather, reduce, gather, reduce, gather, reduce, reduce, "optimizer.norm"]

    s = scenario(dense(8, 4096), 4, Plan(zero=3), 2, sequence_length=4096)
    spent = simulate_step(s).timeline.exposed().iloc[0]
    assert spent["dp_exposed_s"] < 0.2 * spent["dp_hidden_s"]  # only behind embedding and head, which compute for no time


# --- messages ---


def test_a_message_per_micro_batch_and_direction_between_stages():
    assert counted(scenario(dense(8), 4, Plan(pp=4, vpp=2, schedule="interleaved"), 8), "pp") == {"send": 2 * 7 * 8}


def test_chunks_of_one_rank_hand_over_without_a_message():
    s = scenario(dense(4), 2, Plan(vpp=2, schedule="interleaved", dp_shard=2), 4)
    plain = s.model_copy(update={"plan": s.plan.model_copy(update={"vpp": 1, "schedule": "1f1b"})})
    assert counted(s, "pp") == {}
    assert simulate_step(s).step_time_s == pytest.approx(estimate(s), rel=1e-12)
    assert simulate_step(s).step_time_s >= bound(plain)


def test_a_stage_without_blocks_hands_the_micro_batch_on():
    s = scenario(dense(2), 4, Plan(pp=4, layout="E||ttL|"), 3)
    t = simulate_step(s).timeline.table()
    assert len(t[t["name"] == "empty"]) == 2 * 2 * 3
    forwards = [t[(t["stage"] == stage) & (t["action"] == "0F1") & (t["stream"] != "pp")] for stage in range(4)]
    sent = [t[(t["stage"] == stage) & (t["action"] == "0F1") & (t["stream"] == "pp")]["end_s"].item() for stage in range(3)]
    for stage in range(1, 4):
        assert forwards[stage]["start_s"].min() >= sent[stage - 1]
    assert simulate_step(s).step_time_s == pytest.approx(estimate(s), rel=1e-12)


# --- price ---


def test_a_collective_of_nothing_takes_no_time():
    s = scenario(dense(2), 8, Plan(), 1)
    for kind in ("all_reduce", "all_gather", "reduce_scatter"):
        price = op_s(Op("x", kind, bytes=np.array([0.0, 1.0]), axis="dp"), s.model, s.plan, s.cluster)
        assert (price[0], price[1] > 0) == (0.0, True)
