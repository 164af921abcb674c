"""Several steps in a row: with a barrier each is as long as one, with post-validation zero-bubble schedules have no bubble."""

from __future__ import annotations

import numpy as np
import pytest
from small import dense, job, moe, scenario

from simulator.engine.events import run
from simulator.errors import PlanError
from simulator.scenario.overlap import Overlap
from simulator.scenario.plan import Plan
from simulator.simulate import simulate_step, simulate_steps
from simulator.workload.build import build_step
from simulator.workload.classes import rank_classes

EXACT = 1e-9
STEPS = 4


def pace(name: str, pp: int, vpp: int, m: int, post_validation: bool, times: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> float:
    """Return seconds from step to step of a real program whose passes take `times` for F, I and W, and all else none."""
    plan = Plan(pp=pp, vpp=vpp, schedule=name, dp_shard=1)
    same = np.ones(plan.world)
    program = build_step(dense(pp * vpp), plan, job(m), rank_classes(plan, same, same), STEPS, post_validation)
    seconds, of = np.zeros(len(program)), dict(zip("FIW", times, strict=True)) | {"B": times[1] + times[2]}
    nodes: dict[tuple, list[int]] = {}
    for node, (rank, action) in enumerate(zip(program.rank_class, program.label, strict=True)):
        if action is not None and program.tasks[program.task[node]].stream == "compute":
            nodes.setdefault((rank, action), []).append(node)
    for (_, action), mine in nodes.items():
        seconds[mine] = of[action.kind] / vpp / len(mine)
    _, end = run(program.streams(), program.needs, program.meet, seconds)
    of_step = np.array([-1 if a is None else a.micro_batch // m for a in program.label])
    ends = [end[of_step == step].max() for step in range(STEPS)]
    return ends[-1] - ends[-2]


@pytest.mark.parametrize(("name", "vpp", "m"), [("zb-h2", 1, 8), ("zb-h2", 1, 20), ("zb-2p", 1, 12), ("zb-v", 2, 8), ("zb-v", 2, 20)])
def test_zero_bubble_is_zero_across_steps(name, vpp, m):
    """At F = I = W and zero latency (Qi et al., ICLR 2024, section 4): a step for every 3 m, no more."""
    assert pace(name, 4, vpp, m, post_validation=True) == pytest.approx(3 * m, rel=EXACT)
    assert pace(name, 4, vpp, m, post_validation=False) == pytest.approx(3 * m + 3 / vpp, rel=EXACT)  # the slope of the forwards


def test_other_schedules_keep_their_bubble():
    """The first rank of 1F1B waits inside its row for (p - 1)(F + I + W), that of ZB-H1 for (p - 1) F: no step begins there."""
    p, m = 4, 12
    assert pace("1f1b", p, 1, m, post_validation=False) == pytest.approx(3 * m + 3 * (p - 1), rel=EXACT)
    assert pace("1f1b", p, 1, m, post_validation=True) == pytest.approx(3 * m + 3 * (p - 1), rel=EXACT)
    assert pace("zb-h1", p, 1, m, post_validation=False) == pytest.approx(3 * m + (p - 1), rel=EXACT)
    assert pace("zb-h1", p, 1, m, post_validation=True) == pytest.approx(3 * m + (p - 1), rel=EXACT)


@pytest.mark.parametrize("plan", [Plan(pp=4, zero=0), Plan(tp=2, pp=2, ep=4, overlap=Overlap(param_gather=False)), Plan(pp=2, zero=2)])
def test_steps_behind_a_barrier_are_alike(plan):
    """As long as one step, less what a stage with little to update begins earlier than the others."""
    s = scenario(moe(8, 1024), 16, plan, 8)
    steps = simulate_steps(s, 3, post_validation=False)
    assert steps.ends_s[1] - steps.ends_s[0] == pytest.approx(steps.pace_s, rel=EXACT)
    one = simulate_step(s)
    optimizer = one.compute_parts_s["optimizer"]
    assert one.step_time_s - 2 * optimizer <= steps.pace_s <= one.step_time_s * (1 + EXACT)


def test_nobody_waits_for_the_stages_after():
    s = scenario(dense(8, 2048), 16, Plan(pp=4, schedule="zb-h2"), 12, sequence_length=2048)
    waiting, free = (simulate_steps(s, 3, post_validation=way) for way in (False, True))
    assert free.pace_s < waiting.pace_s
    assert (free.bubble_s()["bubble_s"] < waiting.bubble_s()["bubble_s"]).all()
    assert (free.bubble_s()["bubble_s"] > 0).all()


def test_one_step_is_not_several():
    with pytest.raises(PlanError, match="use 2 or more, or simulate_step"):
        simulate_steps(scenario(dense(2), 8, Plan(), 1), 1)
