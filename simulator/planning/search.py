"""Go through every legal plan: bound all, drop what does not fit, estimate what may win, simulate the best few."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from simulator.errors import PlanError, Problem, ProfileError
from simulator.planning.priced import Passes, Priced
from simulator.planning.space import Space, Table, grouped, kinds_of, legal_table
from simulator.result import StepResult
from simulator.scenario.plan import Plan
from simulator.scenario.scenario import Scenario
from simulator.simulate import simulate_step

Progress = Callable[[str, int, int], None]
#: plans whose memory differs by less count as equal on the Pareto front, bytes
MEMORY_STEP_BYTES = 1e9


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
    front : DataFrame
        Plans than which none is both faster and smaller, by estimate, smallest last; see `pareto`.
    scenario : Scenario
        The question.
    space : Space
        What was free.
    legal, fitting, estimated : int
        How many plans were legal, fitted in memory, were estimated.
    faster_without_memory_s : float or None
        Lower bound of the fastest legal plan that does not fit, if that is below the best step: what memory may cost.
    """

    table: pd.DataFrame
    results: list[StepResult]
    front: pd.DataFrame
    scenario: Scenario
    space: Space
    legal: int
    fitting: int
    estimated: int
    faster_without_memory_s: float | None = None

    @property
    def best(self) -> StepResult:
        """The fastest simulated step."""
        return self.results[0]

    @property
    def scenarios(self) -> list[Scenario]:
        """The rows of the table as scenarios that can be run."""
        return [result.scenario for result in self.results]


@dataclass
class Pool:
    """Every legal plan with its bound and memory, and the estimates made so far.

    Plans are numbered through the kinds: plan i is row ``i % n`` of kind ``i // n``.

    Parameters
    ----------
    priced : list of Priced
        One table for each sharding, precision, dispatcher and overlap, all with the same n rows.
    bound_s, memory_bytes, estimate_s : ndarray (kinds * n,)
        Estimates are infinite until they are made.
    """

    priced: list[Priced]
    bound_s: np.ndarray
    memory_bytes: np.ndarray
    estimate_s: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.estimate_s = np.full(len(self.bound_s), np.inf)

    @classmethod
    def of(cls, scenario: Scenario, space: Space, tell: Progress) -> Pool:
        """Price and bound every legal plan of `space`."""
        table, kinds = legal_table(scenario, space), kinds_of(scenario, space)
        passes: dict[tuple, Passes] = {}
        priced: list[Priced] = []
        bounds, memory = np.empty((2, len(kinds), len(table)))
        for number, kind in enumerate(kinds):
            tell("bound", number * len(table), len(kinds) * len(table))
            own = table.of_kind(**kind)
            same = tuple(v for k, v in kind.items() if k != "zero")  # sharding does not change the passes
            if same not in passes:
                passes[same] = Passes.of(scenario, own)
            priced.append(Priced.of(scenario, own, passes[same]))
            bounds[number], memory[number] = priced[-1].bounds(), priced[-1].peak_memory()
        tell("bound", bounds.size, bounds.size)
        return cls(priced, bounds.ravel(), memory.ravel())

    def __len__(self) -> int:
        return len(self.bound_s)

    @property
    def rows(self) -> int:
        """Plans of each kind."""
        return len(self.priced[0].table)

    def plan(self, index: int) -> Plan:
        """Return one of the plans."""
        kind, row = divmod(int(index), self.rows)
        return self.priced[kind].table.row(row)

    @cached_property
    def groups(self) -> list[tuple[int, np.ndarray]]:
        """Plans that are estimated together, as kind and rows."""
        table: Table = self.priced[0].table
        rows = grouped(table.shape, table.plans.pp, table.plans.vpp, self.priced[0].micro_batches)
        return [(kind, part) for kind in range(len(self.priced)) for part in rows]

    def estimate(self, index: np.ndarray) -> None:
        """Estimate the plans at `index`, which are of one kind."""
        kind = int(index[0]) // self.rows
        self.estimate_s[index] = self.priced[kind].estimates(index - kind * self.rows)

    def threshold(self, top: int) -> float:
        """Return the estimate that `top` plans reach."""
        return float(np.partition(self.estimate_s, top - 1)[top - 1]) if top <= len(self) else np.inf

    def estimate_open(self, fitting: np.ndarray, is_open: Callable[[np.ndarray], np.ndarray], tell: Progress) -> None:
        """Estimate plans group by group, most promising bound first, as long as `is_open` keeps any plan of the group."""
        mine = np.zeros(len(self), dtype=bool)
        mine[fitting] = True
        offers = [kind * self.rows + part for kind, part in self.groups]
        offers = [o[mine[o] & np.isinf(self.estimate_s[o])] for o in offers]
        offers = sorted((o for o in offers if len(o)), key=lambda o: self.bound_s[o].min())
        for done, offer in enumerate(offers):
            tell("estimate", done, len(offers))
            wanted = offer[is_open(offer)]
            if len(wanted):
                self.estimate(wanted)
        tell("estimate", len(offers), len(offers))
