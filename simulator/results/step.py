"""One step simulated event by event: where its time goes, and who holds what when."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from simulator.engine.timeline import ASIDE, COMMUNICATION, Timeline
from simulator.network.sharing import Share
from simulator.results.outcome import Outcome, divided
from simulator.scenario.scenario import Scenario
from simulator.workload.ops import HOST

#: mechanisms that a real step has and this one does not
NOT_MODELLED = (
    "failures, restarts and checkpoints (training days are of uninterrupted steps)",
    "overlap of expert all-to-all with compute outside pairs of forward and backward",
    "contention between different kinds of collectives on one link (simulate_step adds it with contention=True)",
    "jitter, and a clock that follows what a step does (the fitted efficiencies of products hold the power limit of an average one)",
    "input pipeline and logging",
)


@dataclass(frozen=True)
class StepResult(Outcome):
    """One optimizer step of `scenario`, simulated event by event.

    Parameters
    ----------
    scenario : Scenario
    timeline : Timeline
        Every span of every class of ranks.
    compute_parts_s : dict
        Mean seconds per rank on the compute stream, by kind of kernel.
    shares : dict
        What sharing leaves each (axis, kind) of collective that crosses the network.
    """

    scenario: Scenario
    timeline: Timeline
    compute_parts_s: dict[str, float] = field(repr=False)
    shares: dict[tuple[str, str], Share] = field(default_factory=dict, repr=False)

    @property
    def not_modelled(self) -> tuple[str, ...]:
        """What a real step has and this one has not; the routing of a scenario is for a simulation of every rank."""
        return (*NOT_MODELLED, *(("the scenario's routing (simulate every rank for it)",) if self.scenario.routing else ()))

    @cached_property
    def step_time_s(self) -> float:
        """Seconds from the first to the last operation of the step."""
        return self.timeline.makespan_s

    def breakdown(self) -> pd.DataFrame:
        """Return where the step goes, as means over ranks.

        Returns
        -------
        DataFrame
            Columns ``part``, ``seconds``, ``share``, ``hidden_s``: kernels by kind and the wait for the host that launches them
            (``compute: host``), communication that nothing hides by stream, idle time (pipeline bubble and waiting). Seconds add
            up to the step; ``hidden_s`` runs beside compute.
        """
        spent = self.timeline.exposed()
        weight = spent["ranks"] / spent["ranks"].sum()
        compute, alone = dict(self.compute_parts_s), float((spent["host_s"] * weight).sum())
        if alone:
            compute[HOST] = compute.get(HOST, 0.0) + alone
        rows = [(f"compute: {part}", seconds, 0.0) for part, seconds in compute.items()]
        for stream in COMMUNICATION:
            exposed, hidden = (float((spent[f"{stream}_{how}_s"] * weight).sum()) for how in ("exposed", "hidden"))
            if exposed or hidden:
                rows.append((f"exposed: {stream}", exposed, hidden))
        idle = self.step_time_s - sum(seconds for _, seconds, _ in rows)
        rows.append(("idle", max(idle, 0.0), 0.0))  # rounding can leave -1e-16
        table = pd.DataFrame(rows, columns=["part", "seconds", "hidden_s"])
        table.insert(2, "share", table["seconds"] / self.step_time_s)
        return table

    def network(self) -> pd.DataFrame:
        """Return what each kind of collective keeps of its NICs while all of its groups communicate.

        Returns
        -------
        DataFrame
            One row per axis and kind that leaves a scale-up domain: ``flows`` between domains, the highest ``tier`` that they
            reach, ``nic_share`` of the rate that the slowest member keeps, ``slowdown`` by sharing with other groups, and the
            ``hottest`` link with the share of it in use (``load``).
        """
        tiers = self.scenario.cluster.fabric.tiers
        rows = [
            (axis, kind, s.flows, tiers[min(s.level, len(tiers) - 1)].name, s.rate, s.slowdown, *(s.hottest[0] if s.hottest else ("", 0.0)))
            for (axis, kind), s in self.shares.items()
        ]
        return pd.DataFrame(rows, columns=["axis", "kind", "flows", "tier", "nic_share", "slowdown", "hottest", "load"])

    def activations_over_time(self) -> pd.DataFrame:
        """Return the activations that each class of ranks holds, from one change to the next (`Timeline.memory`)."""
        return self.timeline.memory()

    def phases(self) -> pd.DataFrame:
        """Return how each class of ranks spends the step, as profilers of pipelines divide it.

        Returns
        -------
        DataFrame
            One row per class: ``stage``, ``ranks``, seconds of forwards, whole backwards, input gradients and weight gradients
            on their own (``forward_s``, ``backward_s``, ``input_s``, ``weight_s``), of pairs (``pair_s``), of what follows the
            last of them until all ranks are done (``optimizer_s``: reduction, norm, optimizer, gather and their waiting) and
            of waiting before and between them (``bubble_s``). They add up to the step; communication of a forward or
            backward is part of it.
        """
        stage = dict(zip(self.timeline.rank_class.tolist(), self.timeline.stage.tolist(), strict=True))
        begin, end = ({c: {} for c in stage} for _ in range(2))
        for times, found in zip(self.timeline.action_times(), (begin, end), strict=True):
            for (c, action), seconds in times.items():
                found[c][action] = seconds
        rows = []
        for c, ranks in enumerate(self.timeline.ranks.tolist()):
            row = divided(self.scenario, stage[c], begin[c], end[c], self.step_time_s)
            rows.append({"rank_class": c, "stage": stage[c], "ranks": ranks} | {name: float(value) for name, value in row.items()})
        return pd.DataFrame(rows)


@dataclass(frozen=True)
class StepsResult:
    """Several optimizer steps of `scenario` in a row.

    Parameters
    ----------
    scenario : Scenario
    post_validation : bool
        Whether each stage began the next step after its own optimizer, instead of waiting for all ranks.
    steps : int
    timeline : Timeline
        Every span of every class of ranks; micro-batches are counted on from step to step.
    """

    scenario: Scenario
    post_validation: bool
    steps: int
    timeline: Timeline

    @cached_property
    def ends_s(self) -> np.ndarray:
        """Seconds from the beginning until each step's last optimizer is done, shape (steps,)."""
        t = self.timeline
        updates = np.flatnonzero((t.action == "") & (t.stream == "compute"))
        ends = np.zeros(self.steps)
        for c in range(len(t.ranks)):  # each class updates equally often in every step, in order
            mine = t.end_s[updates[t.rank_class[updates] == c]].reshape(self.steps, -1)
            ends = np.maximum(ends, mine.max(axis=1))
        return ends

    @property
    def pace_s(self) -> float:
        """Seconds from the end of the last step but one to the end of the last."""
        return float(self.ends_s[-1] - self.ends_s[-2])

    def bubble_s(self) -> pd.DataFrame:
        """Return what each class of ranks does not compute or communicate of the pace: ``stage``, ``ranks``, ``bubble_s``."""
        t, rows = self.timeline, []
        for c, ranks in enumerate(t.ranks.tolist()):
            mine = (t.rank_class == c) & ~np.isin(t.stream, ASIDE)
            borders = np.unique(np.concatenate([t.start_s[mine], t.end_s[mine]]))
            change = np.zeros(len(borders))
            np.add.at(change, np.searchsorted(borders, t.start_s[mine]), 1)
            np.add.at(change, np.searchsorted(borders, t.end_s[mine]), -1)
            busy = np.diff(borders)[np.cumsum(change)[:-1] > 0].sum() / self.steps
            rows.append({"stage": int(t.stage[t.rank_class == c][0]), "ranks": ranks, "bubble_s": self.pace_s - busy})
        return pd.DataFrame(rows)
