"""Search the zero-bubble schedule that suits a plan's own times, as the paper's scheduler does with profiled ones."""

from __future__ import annotations

import numpy as np

from simulator.closed_forms import times_of
from simulator.errors import PlanError, Problem
from simulator.scenario.scenario import Scenario
from simulator.schedules.zero_bubble import automatic
from simulator.workload.stages import blocks, stage_blocks


def zero_bubble(scenario: Scenario, held: int) -> Scenario:
    """Return `scenario` with the best zero-bubble table found for its own F, I, W and message times.

    Parameters
    ----------
    scenario : Scenario
        Its plan has one chunk per rank; its schedule is replaced.
    held : int
        Micro-batches whose activations a rank may hold, at least pp: pp is the memory of 1F1B and ZB-1p, 2 pp that of ZB-2p.

    Raises
    ------
    PlanError
        When ranks hold several chunks.

    Notes
    -----
    The search takes all stages as alike, with the times of the median one; the result runs with the times of each.

    References
    ----------
    Qi, Wan, Huang, Lin, "Zero Bubble Pipeline Parallelism", ICLR 2024, section 3.
    """
    model, plan, job = scenario.model, scenario.plan, scenario.job
    if plan.vpp > 1:
        numbers = f"vpp = {plan.vpp}"
        raise PlanError([Problem("a zero-bubble table is searched for one chunk per rank", numbers, "use vpp: 1, or schedule: zb-v")])
    times, micro_batches = times_of(scenario.with_plan(schedule="1f1b", table=None))
    work = sum(times.pass_s(kind) for kind in "FIW")
    median = int(np.argsort(work)[len(work) // 2])
    names, all_blocks = stage_blocks(model, plan, job)[median], blocks(model, plan, job)
    saved, rest = (sum(float(getattr(all_blocks[name], field)) for name in names) for field in ("saved_bytes", "weight_bytes"))
    seconds = [float(times.pass_s(kind)[median]) for kind in "FIW"]
    found = automatic(plan.pp, micro_batches, held, seconds, float(times.hop_s), min(1.0, rest / saved))
    return scenario.with_plan(schedule="table", table=str(found))
