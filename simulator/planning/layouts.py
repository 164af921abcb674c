"""Would the planner have chosen what practitioners published? A layout held against the best one with the same memory options."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from simulator.feasibility import check
from simulator.planning.compare import compare
from simulator.planning.pool import Progress
from simulator.planning.search import search
from simulator.planning.space import Space
from simulator.results.step import StepResult
from simulator.scenario.scenario import Scenario
from simulator.simulate import simulate_step

#: schedules that every Megatron-like trainer has: a layout published for one of them could have used the other
COMMON_SCHEDULES = ("1f1b", "interleaved")
#: what a trainer that pairs passes without a pipeline (`table`, in the record) can also run: its own pairs in a pipeline, or none
WITH_PAIRS = (*COMMON_SCHEDULES, "interleaved-overlapped")
#: a published layout that is predicted to take less than this more than the best is confirmed
CLOSE = 0.10


@dataclass(frozen=True)
class Verdict:
    """A published layout beside the best that the search finds.

    Parameters
    ----------
    published, best : StepResult
        Simulated steps.
    legal, fitting : int
        How many plans the best was chosen from.
    problems : str
        Why the published layout would not run here, by the numbers; empty when it would.
    """

    published: StepResult
    best: StepResult
    legal: int
    fitting: int
    problems: str

    @property
    def excess(self) -> float:
        """How much longer the published layout is predicted to take than the best, as a share of the best; never below 0."""
        return max(self.published.step_time_s / self.best.step_time_s - 1, 0.0)

    @property
    def terms(self) -> pd.DataFrame:
        """What the published layout spends more, term by term, largest first: ``part``, ``seconds``."""
        return compare({"best": self.best, "published": self.published}).differences()

    def row(self) -> dict[str, object]:
        """Return the verdict as a row: ``close`` if it fits and takes at most `CLOSE` more; ``term`` is what most of that rests on."""
        more = self.terms.sort_values("seconds", ascending=False).iloc[0]
        return {
            "accelerators": self.best.scenario.cluster.accelerators,
            "published": str(self.published.scenario.plan),
            "best": str(self.best.scenario.plan),
            "published_s": self.published.step_time_s,
            "best_s": self.best.step_time_s,
            "excess": self.excess,
            "close": not self.problems and self.excess <= CLOSE,
            "term": more["part"] if self.excess > 0 else "",
            "term_s": float(more["seconds"]) if self.excess > 0 else 0.0,
            "fitting": self.fitting,
            "problems": self.problems,
        }


def same_options(scenario: Scenario) -> Space:
    """Return the space of layouts with the memory options of a plan: sharding, recompute and all that `Space` keeps by itself.

    Degrees, chunks, micro-batch and the division of layers are free. A plan in one of `COMMON_SCHEDULES` may use the others;
    one given as a table, which fits its own number of micro-batches alone, those of `WITH_PAIRS`; any other schedule is kept,
    because it needs a trainer of its own.
    """
    plan = scenario.plan
    schedules = COMMON_SCHEDULES if plan.schedule in COMMON_SCHEDULES else WITH_PAIRS if plan.schedule == "table" else (plan.schedule,)
    return Space.like(plan, "zero", "recompute", schedule=schedules)


def judge(scenario: Scenario, space: Space | None = None, progress: Progress | None = None) -> Verdict:
    """Return the published plan of `scenario` beside the best of `space`.

    Parameters
    ----------
    scenario : Scenario
        With the published plan.
    space : Space, optional
        `same_options` when left out.

    Raises
    ------
    PlanError
        When the published plan is illegal, or no plan of the space fits in memory.

    Notes
    -----
    A published plan that is predicted not to fit in memory is simulated all the same; ``problems`` says so.
    """
    problems = check(scenario)
    published = simulate_step(scenario.model_copy(update={"cluster": _roomy(scenario)}) if problems else scenario)
    found = search(scenario, top=1, progress=progress, space=space or same_options(scenario))
    best = found.best if found.best.step_time_s <= published.step_time_s or problems else published
    return Verdict(published, best, found.legal, found.fitting, "; ".join(problem.numbers for problem in problems))


def _roomy(scenario: Scenario) -> object:
    """Return the cluster with memory for any plan, so that a step whose peak is predicted too high still has a time."""
    accelerator = scenario.cluster.accelerator
    return scenario.cluster.model_copy(update={"accelerator": accelerator.model_copy(update={"hbm_bytes": 100 * accelerator.hbm_bytes})})
