"""Which inputs, within their intervals, would change the decision: one at a time, the best plans estimated again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from simulator.closed_forms import estimate
from simulator.errors import ProfileError
from simulator.planning.search import Search
from simulator.scenario.cluster import Cluster
from simulator.scenario.plan import Plan
from simulator.scenario.scenario import Scenario


@dataclass(frozen=True, slots=True)
class Input:
    """An input and the interval that it may lie in.

    Parameters
    ----------
    name : str
    low, high : float
        Factors on the value.
    scale : callable
        Returns a cluster whose input is so many times as large.
    why : str
        Where the interval comes from.
    """

    name: str
    low: float
    high: float
    scale: Callable[[Cluster, float], Cluster]
    why: str


def _part(part: str, *names: str) -> Callable[[Cluster, float], Cluster]:
    """Return a function that scales numbers, or tables of numbers, of one part of a cluster; shares stay below 1."""

    def times(name: str, value: float, factor: float) -> float:
        return min(value * factor, 1.0) if "efficiency" in name else value * factor

    def scale(cluster: Cluster, factor: float) -> Cluster:
        of = getattr(cluster, part)
        changed = {}
        for name in names:
            value = getattr(of, name)
            many = isinstance(value, dict)
            changed[name] = {k: times(name, v, factor) for k, v in value.items()} if many else times(name, value, factor)
        return cluster.model_copy(update={part: of.model_copy(update=changed)})

    return scale


#: what a step rests on; intervals are the spread between sources of the shipped profiles' figures, where no other is named
INPUTS = (
    Input("large GEMMs", 0.9, 1.1, _part("accelerator", "gemm_efficiency"), "p50 of GEMM tables span 717 to 786 of 989 TFLOP/s on H100"),
    Input("grouped GEMMs", 0.85, 1.15, _part("accelerator", "grouped_gemm_efficiency"), "assumed; few measured pairs"),
    Input("attention", 0.9, 1.1, _part("accelerator", "attention_efficiency"), "FlashAttention-3: backward 444 to 539 TFLOP/s"),
    Input("memory bandwidth", 0.9, 1.13, _part("accelerator", "hbm_efficiency"), "0.8 by default, copies reach 0.91"),
    Input("kernel launch", 0.5, 2.0, _part("accelerator", "launch_s"), "assumed; CUDA graphs against eager kernels"),
    Input("scale-up bandwidth", 0.85, 1.1, _part("host", "bus_bytes_per_s"), "assumed spread of bus bandwidth at large messages"),
    Input("scale-out bandwidth", 0.8, 1.2, _part("fabric", "efficiency"), "40 GB/s sustained, 48 in benchmarks, of 50 per NIC"),
)


def tornado(found: Search, inputs: Sequence[Input] = INPUTS) -> pd.DataFrame:
    """Return how the best plans fare when one input at a time lies at either end of its interval.

    Parameters
    ----------
    found : Search
        Its simulated plans are the candidates.
    inputs : sequence of Input

    Returns
    -------
    DataFrame
        Widest first: ``input``, ``low``, ``high`` (factors), ``base_s`` (estimated step of the chosen plan with every input as it
        is), ``low_s`` and ``high_s`` (at the ends),
        ``best_low_s``, ``best_high_s``, ``winner_low``, ``winner_high`` (the candidate that is best there), ``changes`` (whether
        that is another one than chosen) and ``regret`` (what keeping the chosen plan costs, the larger share), ``why``.

    Raises
    ------
    ProfileError
        When there is no input.
    """
    if not inputs:
        raise ProfileError("no input to vary; give at least one")
    plans = [scenario.plan for scenario in found.scenarios]
    base, rows = _estimate(found.scenario, found.scenario.cluster, plans[0]), []
    for one in inputs:
        ends = {}
        for side, factor in (("low", one.low), ("high", one.high)):
            cluster = one.scale(found.scenario.cluster, factor)
            steps = [_estimate(found.scenario, cluster, plan) for plan in plans]
            ends[side] = steps[0], min(steps), steps.index(min(steps))
        regret = max(chosen / best - 1 for chosen, best, _ in ends.values())
        rows.append(
            {"input": one.name, "low": one.low, "high": one.high, "base_s": base}
            | {f"{side}_s": chosen for side, (chosen, _, _) in ends.items()}
            | {f"best_{side}_s": best for side, (_, best, _) in ends.items()}
            | {f"winner_{side}": str(plans[winner]) for side, (_, _, winner) in ends.items()}
            | {"changes": any(winner != 0 for _, _, winner in ends.values()), "regret": regret, "why": one.why}
        )
    table = pd.DataFrame(rows)
    width = (table["high_s"] - table["low_s"]).abs()
    return table.loc[width.sort_values(ascending=False, kind="stable").index].reset_index(drop=True)


def _estimate(scenario: Scenario, cluster: Cluster, plan: Plan) -> float:
    return estimate(scenario.model_copy(update={"cluster": cluster, "plan": plan}))
