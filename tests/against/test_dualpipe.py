"""Oracle: the phases of DeepSeek-V3's training step with DualPipe on 2,048 H800, predicted from facts and the plan alone.

"Insights into DeepSeek-V3" (ISCA 2025, arXiv 2505.09343), table 4: 19.926 s = 1F 1.13 + bubble 2.06 + 1B 1.99 + 1W 0.48 +
1F1B 13.95 + optimizer 0.29 s. The plan is the published one (DeepSeek-V3 technical report, arXiv 2412.19437): DualPipe on 16
ranks, EP64, ZeRO-1, no TP, FP8 linear layers and dispatch, bf16 moments, fp32 gradients and master weights, RMSNorm and MLA
up-projections recomputed, SwiGLU's inputs cached in FP8 and its outputs recomputed, the dense and shared ones' too (sections
3.2.3 and 3.3).

A micro-batch of one sequence is not printed, but follows: with two, a pair would take 1.9 times as long as its halves alone
(`test_the_published_phases_leave_one_sequence_per_micro_batch`). Assumed: layers balanced over the stages, the phases means over
ranks. The run was no benchmark with forced routing. How far its experts were from balanced is not printed, so it
shown at both ends: balanced, and natural routing with the simulator's default for any model (heaviest rank at 1.25 of the mean).

Target: the step within 10 %, each phase above 1 s (forwards, backwards, pairs, bubble) within 20 %. Found, with no number
fitted to this row, published in brackets:

    routing   step            1F              1B              1F1B            bubble          1W            optimizer
    balanced  19.08  (-4.2 %) 1.19  (+5 %)    1.81  (-9 %)    14.55  (+4 %)   0.96 (-53 %)    0.31 (-36 %)  0.26
    natural   21.69  (+8.8 %) 1.39 (+23 %)    2.05  (+3 %)    16.42 (+18 %)   1.22 (-41 %)    0.31 (-36 %)  0.30

So the step and all phases but the bubble are met with balanced experts. With natural routing the step is met, too, and forwards are
missed by three points. Missed at both ends: the bubble, by two fifths to a half.

The bubble is 0.79 (balanced) and 0.86 (natural) of what DualPipe's own formula, (pp / 2 - 1) (F&B + B - 3 W), gives with our mean times
of an action (`test_bubble_is_the_formulas`); most of that gap opened when the wait for the host left the queue of kernels inside pairs,
and why is not established. With the published times the formula gives 0.98 s, half of what is published: the rest is waiting for stages,
ranks and micro-batches that differ, which the source does not describe; jitter explains little of it (`test_jitter`).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from simulator.errors import PlanError
from simulator.scenario.scenario import Scenario
from simulator.scenario.variation import Variation
from simulator.schedules import Pair, schedule
from simulator.simulate import simulate_step

EXAMPLE = Path(__file__).parents[2] / "examples" / "deepseek-v3-2048-h800.yaml"
PUBLISHED = {"forward_s": 1.13, "backward_s": 1.99, "weight_s": 0.48, "pair_s": 13.95, "optimizer_s": 0.29, "bubble_s": 2.06}
PUBLISHED_STEP_S = 19.926


def dualpipe(routing: str) -> Scenario:
    plain = Scenario.load(EXAMPLE)
    job = plain.job.model_copy(update={"routing": routing})
    precision = plain.plan.precision.model_copy(update={"activations": "fp8"})
    return plain.model_copy(update={"job": job}).with_plan(
        schedule="dualpipe", vpp=2, precision=precision, recompute_modules=(*plain.plan.recompute_modules, "mlp_act")
    )


@pytest.fixture(scope="module", params=["balanced", "natural"])
def step(request):
    return simulate_step(dualpipe(request.param))


def phases(step) -> dict[str, float]:
    """Return the published phases, as means over ranks; the table's 1B counts input gradients and whole backwards."""
    table = step.phases()
    mean = {name: float((table[name] * table["ranks"]).sum() / table["ranks"].sum()) for name in table.columns if name.endswith("_s")}
    mean["backward_s"] += mean.pop("input_s")
    return mean


def misses(step) -> dict[str, float]:
    return {name: seconds / PUBLISHED[name] - 1 for name, seconds in phases(step).items()}


def test_published_phases_add_up():
    assert sum(PUBLISHED.values()) == pytest.approx(PUBLISHED_STEP_S, abs=0.03)


def test_phases_add_up(step):
    assert sum(phases(step).values()) == pytest.approx(step.step_time_s, rel=1e-9)


def test_step(step):
    """Target 10 %: met with balanced experts and with natural routing."""
    known = {"natural": 0.088, "balanced": -0.042}[step.scenario.job.routing]
    assert step.step_time_s / PUBLISHED_STEP_S - 1 == pytest.approx(known, abs=0.05)


def test_phases(step):
    """Target 20 % above 1 s: met by 1F, 1B and 1F1B with balanced experts, missed by the bubble; by 1B and 1F1B with natural."""
    found = misses(step)
    met = ("backward_s", "pair_s") if step.scenario.job.routing == "natural" else ("forward_s", "backward_s", "pair_s")
    assert max(abs(found[name]) for name in met) < 0.20
    known = {"natural": (0.23, 0.18, -0.41), "balanced": (0.05, 0.04, -0.54)}[step.scenario.job.routing]  # what is missed stays known
    assert (found["forward_s"], found["pair_s"], found["bubble_s"]) == pytest.approx(known, abs=0.05)


def actions_s(phase: dict[str, float], micro_batches: int = 120) -> dict[str, float]:
    """Return the mean seconds of a pair, a forward, a weight gradient and a whole backward (I and W) that phases of a rank amount to."""
    order, count = schedule("dualpipe", 16, 2, micro_batches), dict.fromkeys("FBIW+", 0.0)
    for entry in (entry for row in order.table for entry in row):
        count["+" if isinstance(entry, Pair) else entry.kind] += 1 / 16
    pair, forward, weight = phase["pair_s"] / count["+"], phase["forward_s"] / count["F"], phase["weight_s"] / count["W"]
    return {"+": pair, "F": forward, "W": weight, "B": (phase["backward_s"] + count["I"] * weight) / (count["B"] + count["I"])}


def formula_s(phase: dict[str, float]) -> float:
    """Return DualPipe's bubble for the mean seconds that a rank spends in each phase."""
    each = actions_s(phase)
    return 7 * (each["+"] + each["B"] - 3 * each["W"])


def test_the_published_phases_leave_one_sequence_per_micro_batch():
    """Pairs hide communication: they are shorter than their halves one after the other. So they are with 120 micro-batches, not with 60."""
    ratio = {count: each["+"] / (each["F"] + each["B"]) for count in (120, 60) for each in [actions_s(PUBLISHED, count)]}
    assert ratio == {120: pytest.approx(0.76, abs=0.01), 60: pytest.approx(1.88, abs=0.01)}
    with pytest.raises(PlanError, match="an even number from 32 on"):
        schedule("dualpipe", 16, 2, 30)


def test_bubble_is_the_formulas(step):
    """Of our times a fifth to a seventh less; of the published ones half of the published bubble: what we lack is not in the schedule."""
    known = {"natural": 0.86, "balanced": 0.79}[step.scenario.job.routing]
    assert phases(step)["bubble_s"] / formula_s(phases(step)) == pytest.approx(known, abs=0.05)
    assert formula_s(PUBLISHED) == pytest.approx(0.98, abs=0.01)


def test_small_phases_have_the_right_size(step):
    """Below 1 s, no target: weight gradients on their own come out at 0.6, what follows the last of them as published."""
    found = phases(step)
    assert found["weight_s"] == pytest.approx(0.31, abs=0.03)
    assert found["optimizer_s"] == pytest.approx(PUBLISHED["optimizer_s"], rel=0.2)


def test_all_to_all_hides_in_pairs(step):
    parts = step.breakdown().set_index("part")
    assert parts.loc["exposed: ep", "hidden_s"] > 0.4 * (parts.loc["exposed: ep", "seconds"] + parts.loc["exposed: ep", "hidden_s"])


def test_jitter(step):
    """2 % of jitter on every kernel of every rank costs about 1 % of the step: not what the bubble lacks."""
    every = simulate_step(step.scenario, ranks="all", variation=Variation(jitter=0.02))
    assert every.step_time_s / step.step_time_s - 1 == pytest.approx(0.01, abs=0.008)


def test_every_part_of_the_memory_counts(step):
    """82.9 GB of the 85.5 that the part has; with SwiGLU's inputs in bf16 it would not fit."""
    assert step.peak_memory_bytes == pytest.approx(82.9e9, rel=0.02)
    s = step.scenario
    plain = s.with_plan(precision=s.plan.precision.model_copy(update={"activations": "bf16"}))
    with pytest.raises(Exception, match="the model fits in memory"):
        simulate_step(plain)
