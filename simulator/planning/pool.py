"""Every legal plan of a question with its bound and memory, and the estimates of those that may still win."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from simulator.planning.priced import PAIRED, Estimates, Passes, Priced
from simulator.planning.space import Space, kinds_of, legal_table, placeable
from simulator.scenario.plan import Plan
from simulator.scenario.scenario import Scenario

Progress = Callable[[str, int, int], None]
#: plans that are estimated before the first threshold is known, per plan wanted
FIRST = 64


@dataclass
class Pool:
    """Legal plans, numbered through the kinds: plan i is row ``i % n`` of kind ``i // n``.

    Parameters
    ----------
    priced : list of Priced
        One table for each sharding, precision, dispatcher, overlap and placement, all with the same n rows.
    bound_s, memory_bytes, estimate_s : ndarray (kinds * n,)
        Estimates are infinite until they are made; all three are for plans that a kind's placement is illegal for.
    loose : ndarray (kinds * n,)
        Plans whose bound a closer look at their pairs would raise.
    """

    priced: list[Priced]
    bound_s: np.ndarray
    memory_bytes: np.ndarray
    estimate_s: np.ndarray = field(init=False)
    loose: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.estimate_s = np.full(len(self.bound_s), np.inf)
        self.loose = np.tile(self.priced[0].table.runs(*PAIRED), len(self.priced))

    @classmethod
    def of(cls, scenario: Scenario, space: Space, tell: Progress) -> Pool:
        """Price and bound every legal plan of `space`."""
        table, kinds = legal_table(scenario, space), kinds_of(scenario, space)
        passes: dict[tuple, Passes] = {}
        priced: list[Priced] = []
        bounds, memory = np.empty((2, len(kinds), len(table)))
        for number, kind in enumerate(kinds):
            tell("bound", number * len(table), bounds.size)
            own = table.of_kind(**kind)
            same = tuple(value for name, value in kind.items() if name != "zero")  # sharding does not change the passes
            if same not in passes:
                passes[same] = Passes.of(scenario, own)
            priced.append(Priced.of(scenario, own, passes[same]))
            legal = placeable(own.plans)
            bounds[number] = np.where(legal, priced[-1].bounds(), np.inf)
            memory[number] = np.where(legal, priced[-1].peak_memory(), np.inf)
        tell("bound", bounds.size, bounds.size)
        return cls(priced, bounds.ravel(), memory.ravel())

    def __len__(self) -> int:
        return len(self.bound_s)

    def plan(self, index: int) -> Plan:
        """Return one of the plans."""
        kind, row = divmod(int(index), len(self.priced[0].table))
        return self.priced[kind].table.row(row)

    @property
    def legal(self) -> np.ndarray:
        """Which plans are legal."""
        return np.isfinite(self.bound_s)

    @property
    def estimated(self) -> np.ndarray:
        """The plans that have an estimate."""
        return np.flatnonzero(np.isfinite(self.estimate_s))

    def threshold(self, among: np.ndarray, top: int) -> float:
        """Return the estimate that the `top` best of some plans reach, infinite while fewer are estimated."""
        return float(np.partition(self.estimate_s[among], top - 1)[top - 1]) if top <= len(among) else np.inf

    def settle(self, among: np.ndarray, top: int, tell: Progress = lambda stage, done, total: None, at_least: float = 0.0) -> np.ndarray:
        """Estimate plans until no other can be among the `top` best of `among`; return those, best first.

        Parameters
        ----------
        at_least : float
            Also estimate every plan whose bound is not above this, seconds.

        Notes
        -----
        Plans go in groups that share a schedule, most promising bound first. A plan is passed over only when its bound exceeds
        the estimates of `top` others. Those whose bounds are tight go first; the others have theirs tightened where it is below
        what these reach.
        """
        tight = among[~self.loose[among]]
        if 0 < len(tight) < len(among):
            self.settle(tight, top, tell, at_least)
        while True:
            reached = max(at_least, self.threshold(among, top))
            left = among[(self.bound_s[among] <= reached) & np.isinf(self.estimate_s[among])]
            if not len(left):
                break
            if np.isinf(reached):  # a few, to know what is to be beaten
                few = min(FIRST * top, len(left)) - 1
                left = left[self.bound_s[left] <= np.partition(self.bound_s[left], few)[few]]
            if self.loose[left].any():
                self._tighten(left[self.loose[left]])
                continue
            self._estimate(left, among, top, tell, at_least)
        best = among[np.argsort(self.estimate_s[among], kind="stable")]
        return best[: min(top, int(np.isfinite(self.estimate_s[among]).sum()))]

    def _tighten(self, plans: np.ndarray) -> None:
        """Raise loose bounds; pairs are priced once for all kinds that differ in their sharding, with the collectives of the least."""
        kind, row = np.divmod(plans, len(self.priced[0].table))
        together: dict[int, list[int]] = {}
        for one in np.unique(kind).tolist():
            together.setdefault(id(self.priced[one].passes), []).append(one)
        for kinds in together.values():
            rows = np.unique(row[np.isin(kind, kinds)])
            least = min((self.priced[one] for one in kinds), key=lambda priced: priced.table.plans.like.zero)
            pair_s = Estimates(least, rows).pair_seconds()
            for one in kinds:
                mine, at = plans[kind == one], np.searchsorted(rows, row[kind == one])
                found = self.priced[one].tight_bounds(rows[at], lambda part, *stages, at=at, pair_s=pair_s: pair_s(at[part], *stages))
                self.bound_s[mine] = np.maximum(self.bound_s[mine], found)
                self.loose[mine] = False

    def _estimate(self, wanted: np.ndarray, among: np.ndarray, top: int, tell: Progress, at_least: float) -> None:
        """Estimate some plans group by group; skips those that the threshold overtakes."""
        rows, offers = len(self.priced[0].table), []
        for kind in np.unique(wanted // rows).tolist():
            mine = wanted[wanted // rows == kind]
            prices = Estimates(self.priced[kind], mine - kind * rows)
            offers += [(float(self.bound_s[mine[part]].min()), mine, prices, part) for part in prices.groups]
        limit = max(at_least, self.threshold(among, top))
        for done, (bound, mine, prices, part) in enumerate(sorted(offers, key=lambda offer: offer[0])):
            tell("estimate", done, len(offers))
            if bound > limit:
                break
            part = part[self.bound_s[mine[part]] <= limit]
            self.estimate_s[mine[part]] = prices.of(part)
            limit = max(at_least, self.threshold(among, top))
        tell("estimate", len(offers), len(offers))
