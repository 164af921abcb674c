"""Any handful of scenarios beside each other: one table, and their differences term by term."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pandas as pd

from simulator.errors import PlanError, ProfileError
from simulator.feasibility import check
from simulator.results.step import StepResult
from simulator.scenario.scenario import Scenario
from simulator.simulate import simulate_step


@dataclass(frozen=True)
class Comparison:
    """Simulated scenarios beside each other.

    Parameters
    ----------
    results : dict of str to StepResult
        In the order of the question; `simulator.plots.plot_comparison` draws them.
    """

    results: dict[str, StepResult]

    @property
    def table(self) -> pd.DataFrame:
        """One row per scenario: model, cluster, accelerators, plan, step, utilisation, memory, days, cost and energy."""
        return pd.DataFrame([{"name": name} | _figures(result) for name, result in self.results.items()])

    def terms(self) -> pd.DataFrame:
        """Return where the step of each goes: a row per part, a column per scenario, seconds; the columns add up to the steps."""
        parts = {name: result.breakdown().set_index("part")["seconds"] for name, result in self.results.items()}
        return pd.DataFrame(parts).fillna(0.0).rename_axis("part").reset_index()

    def differences(self, of: str | None = None, to: str | None = None) -> pd.DataFrame:
        """Return why the step of one is longer than that of another, largest term first.

        Parameters
        ----------
        of, to : str, optional
            Names; the second scenario and the first one when left out.

        Returns
        -------
        DataFrame
            ``part`` and ``seconds`` that it takes more; they add up to the difference of the steps.
        """
        names = list(self.results)
        to, of = to or names[0], of or names[min(1, len(names) - 1)]
        for name in (of, to):
            if name not in self.results:
                raise ProfileError(f"no scenario {name!r} in the comparison; it has {', '.join(names)}")
        terms = self.terms()
        found = terms.assign(seconds=terms[of] - terms[to])[["part", "seconds"]]
        return found.loc[found["seconds"].abs().sort_values(ascending=False, kind="stable").index].reset_index(drop=True)


def _figures(result: StepResult) -> dict[str, object]:
    s = result.scenario
    return {
        "model": s.model.name,
        "cluster": s.cluster.name,
        "accelerators": s.cluster.accelerators,
        "plan": str(s.plan),
        "step_time_s": result.step_time_s,
        "mfu_causal": result.mfu_causal,
        "peak_memory_bytes": result.peak_memory_bytes,
        "training_days": result.training_days,
        "cost_usd": result.cost_usd,
        "energy_kwh": result.energy_kwh,
    }


def compare(scenarios: Mapping[str, Scenario | StepResult]) -> Comparison:
    """Return several scenarios simulated and beside each other.

    Parameters
    ----------
    scenarios : mapping of str to Scenario or StepResult
        By the name that the table and the picture give them.

    Raises
    ------
    ProfileError
        When there is none.
    PlanError
        When one cannot run; says which.
    """
    if not scenarios:
        raise ProfileError("nothing to compare; give at least one named scenario")
    problems = [
        replace(problem, rule=f"{name}: {problem.rule}") for name, s in scenarios.items() if isinstance(s, Scenario) for problem in check(s)
    ]
    if problems:
        raise PlanError(problems)
    return Comparison({name: simulate_step(s) if isinstance(s, Scenario) else s for name, s in scenarios.items()})
