"""Oracle: what zero-bubble schedules gained on A100, as ratios of step times that are predicted from facts and plans alone.

"Zero Bubble Pipeline Parallelism" (ICLR 2024), table 4: GPT of 1.5, 6.2, 14.6 and 28.3 billion parameters on 8 to 32 A100, each
with 1F1B, 1F1B-I (every layer a chunk), ZB-1p and ZB-2p at three numbers of micro-batches. These 48 rows are partial: the
vocabulary is not printed, nor for 1F1B-I the chunks. Assumed: 32,000 words, as of the SentencePiece tokenizer of the authors'
script; as many chunks as make every layer one.

All their zero-bubble runs skip the global barrier: each rank updates its parameters at once and validates afterwards, so that
the next step begins in the slope of the last (`simulate_steps`). Their pace is that of the longest row, first action to last and
its own optimizer, to rounding (`test_steps_follow_at_the_pace_of_the_longest_row`), which is what is compared. The tables are
searched for the plan's own times, as their scheduler did with profiled ones.

Their Megatron-LM sends between stages in line with compute (``--no-overlap-p2p-communication`` in the authors' script,
sail-sg/zero-bubble-pipeline-parallelism, examples/pretrain_zero_bubble.sh; 1F1B never overlaps), which costs 1F1B-I, with a
message for every layer, 0.6 to 7 % of its step; their own schedules send aside.

Target: ZB-1p and ZB-2p over 1F1B and over 1F1B-I within 3 points of the measured ratios. Found, in points over the 12 cases,
predicted less measured, with nothing fitted to these ratios:

    ZB-1p over 1F1B    +0.5 ... +7.0, mean +3.2    6 of 12 within 3 points
    ZB-2p over 1F1B    +0.5 ... +3.4, mean +1.7   11 of 12
    ZB-1p over 1F1B-I  -3.0 ... +4.2, mean +0.2   10 of 12
    ZB-2p over 1F1B-I  -3.4 ... +1.1, mean -1.5   10 of 12

So 37 of the 48 ratios are met, none is off by more than 7.0 points. What remains can be named. The runs used attention that is not
fused (their activations grow with 5 a s^2), which takes time in F and I but none in W: W is 0.50 to 0.74 of F in the paper's
profile and more here, because the A100's matrix products are priced slower, those that add to fp32 gradients of small micro-batches
most, and its kernels that memory bounds faster, than theirs. The more of a step is W, the more zero bubble gains.

V-half, V-min and ZB-V are in rows of another source only, without batch and sequence length (Primus): no ratio can be formed of
them.
"""

from __future__ import annotations

import numpy as np
import pytest

from simulator.planning.zero_bubble import zero_bubble
from simulator.results.step import StepResult
from simulator.simulate import simulate_step, simulate_steps
from simulator.validation.published import measured_step_s, published_runs, scenario_from_row

VOCABULARY = "32000"
CASES = [("1.5b", (24, 32, 64)), ("6.2b", (24, 32, 64)), ("14.6b", (48, 64, 128)), ("28.3b", (96, 128, 256))]
SCHEDULES = ("1f1b", "1f1b-i", "zb-1p", "zb-2p")


def pace_s(step: StepResult) -> float:
    """Return the longest row of any rank: from its first action to its last, and its own optimizer."""
    t, rows = step.timeline, []
    for c in range(len(t.ranks)):
        mine = t.rank_class == c
        passes, after = mine & (t.action != "") & (t.stream != "pp"), mine & (t.action == "") & (t.stream == "compute")
        rows.append(t.end_s[passes].max() - t.start_s[passes].min() + (t.end_s - t.start_s)[after].sum())
    return max(rows)


@pytest.fixture(scope="module")
def steps() -> dict[tuple[str, int, str], tuple[float, StepResult]]:
    """(model, micro-batches, schedule) -> (measured step, simulated step)."""
    table, found = published_runs().set_index("id"), {}
    for model, counts in CASES:
        for m in counts:
            for name in SCHEDULES:
                row = dict(table.loc[f"zb-{model}-{name}-{m}"]) | {"vocab": VOCABULARY}
                if name == "1f1b-i":
                    row["vpp"] = str((int(row["layers"]) + 2) // int(row["pp"]))
                scenario, _ = scenario_from_row(row)
                if name.startswith("zb"):
                    scenario = zero_bubble(scenario, scenario.plan.pp * int(name[3]))
                found[model, m, name] = measured_step_s(row), simulate_step(scenario)
    return found


def points(steps, over: str, name: str) -> np.ndarray:
    """Return predicted less measured ratios of `over` to `name`, in points."""
    differ = []
    for model, counts in CASES:
        for m in counts:
            (base, slow), (measured, fast) = steps[model, m, over], steps[model, m, name]
            differ.append(100 * (slow.step_time_s / pace_s(fast) - base / measured))
    return np.array(differ)


def test_rows_become_the_plans_they_print(steps):
    plans = {name: steps["6.2b", 24, name][1].scenario.plan for name in SCHEDULES}
    assert [plans[name].schedule for name in SCHEDULES] == ["1f1b", "interleaved", "table", "table"]  # searched
    assert plans["zb-1p"].layout == "Et*3|t*4|t*4|t*4|t*4|t*4|t*4|t*3L"
    assert plans["1f1b-i"].vpp == 4
    assert [plans[name].overlap.pp for name in SCHEDULES] == [False, False, True, True]


@pytest.mark.parametrize(
    ("over", "name", "within"), [("1f1b", "zb-1p", 6), ("1f1b", "zb-2p", 11), ("1f1b-i", "zb-1p", 10), ("1f1b-i", "zb-2p", 10)]
)
def test_gains(steps, over, name, within):
    found = points(steps, over, name)
    assert (abs(found) <= 3).sum() >= within
    assert abs(found).max() < 7.5


def test_steps_follow_at_the_pace_of_the_longest_row(steps):
    for name in ("zb-1p", "zb-2p"):
        one = steps["1.5b", 24, name][1]
        assert simulate_steps(one.scenario, 3).pace_s == pytest.approx(pace_s(one), rel=1e-3)


def test_every_schedule_ranks_as_measured(steps):
    """ZB-2p is first, 1F1B last in every case, measured and predicted."""
    for model, counts in CASES:
        for m in counts:
            measured = {name: steps[model, m, name][0] for name in SCHEDULES}
            predicted = {name: steps[model, m, name][1].step_time_s for name in SCHEDULES}
            predicted["zb-2p"] = pace_s(steps[model, m, "zb-2p"][1])
            for found in (measured, predicted):
                assert max(found, key=found.__getitem__) == "1f1b"
                assert min(found, key=found.__getitem__) == "zb-2p"


@pytest.mark.parametrize(
    ("model", "m", "measured"),
    [("1.5b", 24, 13.11 / 11.8), ("6.2b", 24, 4.00 / 3.50), ("14.6b", 48, 1.68 / 1.40), ("28.3b", 96, 0.91 / 0.76)],
)
def test_gain_with_the_barrier(steps, model, m, measured):
    """Table 10 measured ZB-2p over 1F1B with the barrier, too: 1.0 to 5.3 points less than predicted."""
    predicted = steps[model, m, "1f1b"][1].step_time_s / steps[model, m, "zb-2p"][1].step_time_s
    assert 0 < 100 * (predicted - measured) < 6
