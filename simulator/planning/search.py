"""Go through every legal plan: bound all, drop what does not fit, estimate what may win, simulate the best few."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from simulator.errors import PlanError, Problem, ProfileError
from simulator.planning.pool import Pool, Progress
from simulator.planning.space import Space
from simulator.results.step import StepResult
from simulator.scenario.plan import COLUMNS, Plan
from simulator.scenario.scenario import Scenario
from simulator.simulate import simulate_step

#: what a row of a table of plans says of its plan
DEGREES = ("tp", "cp", "pp", "vpp", "ep", "etp", "dp", "dp_replicate", "zero", "micro_batch")
CHOICES = ("schedule", "layout", "recompute", "dispatcher")


@dataclass(frozen=True)
class Search:
    """What a search found.

    Parameters
    ----------
    table : DataFrame
        The best plans, fastest first: plan, ``step_time_s``, ``estimate_s``, ``bound_s``, ``mfu_causal``,
        ``peak_memory_bytes``, ``training_days``, ``cost_usd``.
    results : list of StepResult
        The simulated steps, in the same order.
    scenario : Scenario
        The question.
    space : Space
        What was free.
    legal, fitting, estimated : int
        How many plans were legal, fitted in memory, were estimated.
    pool : Pool
        All of them, with bounds and memory.
    """

    table: pd.DataFrame
    results: list[StepResult]
    scenario: Scenario
    space: Space
    legal: int
    fitting: int
    estimated: int
    pool: Pool = field(repr=False)

    @property
    def best(self) -> StepResult:
        """The fastest simulated step."""
        return self.results[0]

    @property
    def scenarios(self) -> list[Scenario]:
        """The rows of the table as scenarios that can be run."""
        return [result.scenario for result in self.results]

    def front(self, levels: int = 8) -> pd.DataFrame:
        """Return the Pareto front of step time and memory: the fastest plan, by estimate, for each of several memory limits.

        Parameters
        ----------
        levels : int
            Limits, evenly spaced between the smallest plan and the accelerator's memory.

        Returns
        -------
        DataFrame
            Fastest first: plan, ``estimate_s``, ``bound_s``, ``peak_memory_bytes``, ``cost_usd``.

        Notes
        -----
        On one cluster cost, energy and carbon are the step time times a constant, so the front of all five is that of two.
        """
        pool, capacity = self.pool, self.scenario.cluster.accelerator.hbm_bytes
        rows: dict[int, dict[str, Any]] = {}
        for limit in np.linspace(capacity, pool.memory_bytes.min(), levels):
            fits = np.flatnonzero(pool.memory_bytes <= limit)
            best = int(pool.settle(fits, 1)[0])
            rows[best] = candidate_row(self.scenario, pool, best)
        found = pd.DataFrame(list(rows.values())).sort_values(["estimate_s", "peak_memory_bytes"], ignore_index=True)
        return found[found["peak_memory_bytes"] <= found["peak_memory_bytes"].cummin()].reset_index(drop=True)

    def cells(self, *names: str) -> pd.DataFrame:
        """Return the fastest plan, by estimate, of every combination of the values of some degrees.

        Parameters
        ----------
        *names : str
            Degrees, ``"pp", "ep"``.

        Returns
        -------
        DataFrame
            One row per combination: the degrees, ``legal`` and ``fits`` (how many plans),
            ``estimate_s`` and ``peak_memory_bytes`` of the fastest that fits, NaN when none does.
        """
        unknown = [name for name in names if name not in COLUMNS]
        if unknown or not names:
            raise ProfileError(f"no cells over {', '.join(unknown) or 'nothing'}; choose among {', '.join(COLUMNS)}")
        pool, plans = self.pool, self.pool.priced[0].table.plans
        value = {name: np.tile(np.asarray(getattr(plans, name)), len(pool.priced)) for name in names}
        fits, rows = pool.memory_bytes <= self.scenario.cluster.accelerator.hbm_bytes, []
        for combination in product(*(np.unique(v).tolist() for v in value.values())):
            legal = np.logical_and.reduce([pool.legal, *(value[name] == one for name, one in zip(names, combination, strict=True))])
            some = np.flatnonzero(legal & fits)
            best = int(pool.settle(some, 1)[0]) if len(some) else None
            figures = [np.nan, np.nan] if best is None else [float(pool.estimate_s[best]), float(pool.memory_bytes[best])]
            counts = {"legal": int(legal.sum()), "fits": len(some)}
            rows.append(dict(zip(names, combination, strict=True)) | counts | dict(zip(("estimate_s", "peak_memory_bytes"), figures)))
        return pd.DataFrame(rows)


def candidate_row(scenario: Scenario, pool: Pool, index: int) -> dict[str, Any]:
    """Return one plan of a pool as a row, its figures from the estimate."""
    step, hours = float(pool.estimate_s[index]), scenario.cluster.accelerators / 3600
    cost = step * scenario.job.steps * hours * scenario.cluster.price_usd_per_accelerator_hour
    figures = {"estimate_s": step, "bound_s": float(pool.bound_s[index]), "peak_memory_bytes": float(pool.memory_bytes[index])}
    return degrees(pool.plan(index)) | figures | {"cost_usd": cost}


def degrees(plan: Plan) -> dict[str, Any]:
    """Return what a row of a table says of a plan."""
    found = {name: getattr(plan, name) for name in DEGREES + CHOICES} | {"layout": plan.layout or "even", "order": plan.placement.order}
    return found | ({"recompute": "+".join(plan.recompute_modules)} if plan.recompute == "selective" else {})


def search(scenario: Scenario, top: int = 10, progress: Progress | None = None, space: Space | None = None) -> Search:
    """Return the fastest plans for the model, cluster and job of `scenario`.

    Parameters
    ----------
    scenario : Scenario
        Its plan gives what `space` does not free: precision, dispatcher, overlap, replicas and reserve unless said otherwise.
    top : int
        Plans to simulate.
    progress : callable, optional
        Called as ``progress(stage, done, total)``.
    space : Space, optional
        What may be chosen, and from which values; everything that changes neither numerics nor software when left out.

    Raises
    ------
    PlanError
        When no plan is legal, and which constraint leaves none; or none fits in memory, and which comes nearest.

    Notes
    -----
    A plan is passed over without an estimate only when its lower bound exceeds the estimate of `top` others, and no plan
    whose bound is below the best simulated step is left without: what `bound` discards cannot win.
    """
    if top < 1:
        raise ProfileError(f"top = {top}; simulate at least 1 plan")
    space, tell = space or Space(), progress or (lambda stage, done, total: None)
    pool = Pool.of(scenario, space, tell)
    fits = np.flatnonzero(pool.memory_bytes <= scenario.cluster.accelerator.hbm_bytes)
    if not pool.legal.any():
        orders = " or ".join(place.order for place in space.placements(scenario))
        raise PlanError([Problem("some plan is legal", f"order = {orders} leaves none: its meshes disagree", "free or widen order")])
    if not len(fits):
        raise PlanError([_nothing_fits(scenario, space, pool)])
    results: dict[int, StepResult] = {}
    at_least = 0.0
    while True:
        chosen = [int(i) for i in pool.settle(fits, top, tell, at_least)]
        for done, index in enumerate(chosen):
            tell("simulate", done, len(chosen))
            if index not in results:
                results[index] = simulate_step(scenario.model_copy(update={"plan": pool.plan(index)}))
        tell("simulate", len(chosen), len(chosen))
        best = min(results[index].step_time_s for index in chosen)
        if best <= at_least or not np.any((pool.bound_s[fits] <= best) & np.isinf(pool.estimate_s[fits])):
            break
        at_least = best
    order = sorted(results, key=lambda i: results[i].step_time_s)[:top]
    table = pd.DataFrame([_row(results[i], pool, i) for i in order])
    return Search(table, [results[i] for i in order], scenario, space, int(pool.legal.sum()), len(fits), len(pool.estimated), pool)


def _row(result: StepResult, pool: Pool, index: int) -> dict[str, Any]:
    return degrees(result.scenario.plan) | {
        "step_time_s": result.step_time_s,
        "estimate_s": float(pool.estimate_s[index]),
        "bound_s": float(pool.bound_s[index]),
        "mfu_causal": result.mfu_causal,
        "peak_memory_bytes": result.peak_memory_bytes,
        "training_days": result.training_days,
        "cost_usd": result.cost_usd,
    }


def _nothing_fits(s: Scenario, space: Space, pool: Pool) -> Problem:
    least = int(pool.memory_bytes.argmin())
    widen = f"free {', '.join(space.constraints)}, or " if space.constraints else ""
    need, capacity = pool.memory_bytes[least] / 1e9, s.cluster.accelerator.hbm_bytes / 1e9
    return Problem(
        "some plan fits in memory",
        f"the smallest plan needs {need:.1f} GB of {capacity:.1f} GB ({pool.plan(least)})",
        f"{widen}use more accelerators, larger ones, or smaller datatypes",
    )
