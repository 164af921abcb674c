"""Activations of ranks whose experts receive uneven tokens: what each micro-batch in flight really left there.

Shapes: L MoE layers, M micro-batches, W ranks of one pipeline stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from simulator.pricing.durations import Uneven, uneven
from simulator.scenario.scenario import Scenario
from simulator.scenario.variation import Variation
from simulator.schedules import Action, Schedule, actions, schedule
from simulator.workload.memory import goes_layerwise, kept_bytes, memory_per_stage
from simulator.workload.stages import blocks, stage_blocks


class RankActivations:
    """Bytes that each action takes on every rank of its stage, or gives back (negative).

    Parameters
    ----------
    scenario : Scenario
    load : ndarray of shape (L, M, W), or None
        Tokens that the experts of a rank receive, over the mean; None for even ones.

    Notes
    -----
    What experts keep is proportional to the tokens that they receive: with s bytes at even load, of which e are one MoE
    layer's experts', an action of loads l takes ``s + sum over its layers of e (l - 1)``.
    """

    def __init__(self, scenario: Scenario, load: np.ndarray | None):
        model, plan, job = scenario.model, scenario.plan, scenario.job
        self.scenario, self.load = scenario, load
        self.ranks = plan.world // plan.pp
        self.order: Schedule = schedule(plan.schedule, plan.pp, plan.vpp, scenario.micro_batches, plan.table)
        stages, sizes = stage_blocks(model, plan, job), [blocks(model, plan, job, load) for load in (1.0, 2.0)]
        self.even = kept_bytes(model, plan, job, stages, sizes[0])
        alone = {name: [kept_bytes(model, plan, job, ((name,),), size) for size in sizes] for name in sizes[0]}
        #: of each block, what its experts keep at even load: in all, and of what the weight gradient needs
        experts = {name: [float(twice[n][0] - once[n][0]) for n in (0, 1)] for name, (once, twice) in alone.items()}
        sparse = [[experts[n] for n in names if any(op.routed for s in sizes[0][n].forward for op in s)] for names in stages]
        self.experts = [np.array(row).reshape(-1, 2) for row in sparse]
        self.first = np.concatenate([[0], np.cumsum([len(row) for row in sparse])])

    def _kept(self, stage: int, micro_batch: int) -> tuple[Any, Any]:
        saved, rest = (float(of_stages[stage]) for of_stages in self.even)
        if self.load is None or not len(self.experts[stage]):
            return saved, rest
        more = self.experts[stage].T @ (self.load[self.first[stage] : self.first[stage + 1], micro_batch] - 1.0)
        return saved + more[0], rest + more[1]

    def changes(self, rank: int) -> Iterator[tuple[Action, Any]]:
        """Yield the actions of a pipeline rank in order, with what each takes: one number, or one per rank, (W,)."""
        for entry in self.order.table[rank]:
            parts = list(actions((entry,)))
            if goes_layerwise(self.order):  # the backward of a pair gives back what its forward takes
                parts.sort(key=lambda a: a.kind == "F")
            for action in parts:
                saved, rest = self._kept(self.order.held[rank][action.chunk], action.micro_batch)
                yield action, {"F": saved, "B": -saved, "I": rest - saved, "W": -rest}[action.kind]

    def peaks(self) -> np.ndarray:
        """Return the most bytes that each rank holds at once, (stages, W)."""
        most = np.zeros((self.order.pp, self.ranks))
        for rank, peak in enumerate(most):
            held = np.zeros(self.ranks)
            for _, taken in self.changes(rank):
                held += taken
                np.maximum(peak, held, out=peak)
        return most


def memory_per_rank(scenario: Scenario, what: Uneven | None = None) -> dict[str, Any]:
    """Return the peak bytes of each pipeline rank, part by part, on the member whose experts receive the most.

    Parameters
    ----------
    what : Uneven, optional
        Loads that were drawn before; else the scenario's `routing` is drawn with the default seed.

    Notes
    -----
    Without a routing of its own a scenario counts as even: a job's `expert_load` tells how heavy the heaviest rank of a layer is,
    and it is another rank on each layer, so that what its layers keep in sum is near the mean; a routing draws them all.
    Temporaries of a backward are those of the heaviest layer and micro-batch.
    """
    model, plan, job = scenario.model, scenario.plan, scenario.job
    load, peaks = 1.0, None
    if model.experts is not None and (what is not None or scenario.routing is not None):
        drawn = (what or uneven(scenario, Variation(jitter=0), scenario.routing)[0]).load
        if drawn is not None:
            load, peaks = float(drawn.max()), RankActivations(scenario, drawn).peaks().max(axis=1)
    sizes = blocks(model, plan, job, load)
    return memory_per_stage(model, plan, job, stage_blocks(model, plan, job), sizes, scenario.micro_batches, activations=peaks)
