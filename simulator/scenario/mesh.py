"""Which ranks talk to which: the groups along each axis, and how they fall on blocks of accelerators.

Ranks are numbered tp fastest, then cp, dp, pp (Megatron's ``tp-cp-ep-dp-pp``); the expert mesh etp, ep, edp, pp covers
the same ranks. Rank r sits on accelerator r.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulator.scenario.plan import Plan
from simulator.units import Number


@dataclass(frozen=True, slots=True)
class Group:
    """Equally spaced ranks: `size` of them, `stride` apart. Scalars, or arrays with one entry per plan."""

    size: Number
    stride: Number

    def within(self, block: int) -> Number:
        """Return how many members share one aligned block of `block` accelerators.

        Groups that do not fall on block borders are counted by their worst case, the greatest common divisor.
        """
        span = np.asarray(self.size) * self.stride
        whole = np.gcd(np.asarray(span, dtype=np.int64), block)
        members = np.where(span <= block, np.where(block % np.maximum(span, 1) == 0, span, whole), whole) // self.stride
        return np.clip(np.maximum(members, 1), 1, self.size)


def group(plan: Plan, axis: str) -> Group:
    """Return the group of `axis`.

    ``dp`` and ``edp`` are the groups over which dense and expert state is sharded (context-parallel ranks hold the same
    parameters, so ``dp`` spans ``dp_shard * cp``); ``dp_replicate`` joins their replicas; ``copies`` joins the two ranks of a
    pipeline, r and pp - 1 - r, that hold the same stages for opposite directions; ``world`` is everyone.
    """
    dense = plan.tp * plan.cp * plan.dp_shard
    return {
        "tp": lambda: Group(plan.tp, 1),
        "cp": lambda: Group(plan.cp, plan.tp),
        "ep": lambda: Group(plan.ep, plan.etp),
        "etp": lambda: Group(plan.etp, 1),
        "dp": lambda: Group(plan.shard, plan.tp),
        "edp": lambda: Group(plan.expert_shard, plan.etp * plan.ep),
        "dp_replicate": lambda: Group(plan.dp_replicate, dense),
        "copies": lambda: Group(plan.copies, dense * plan.dp_replicate),
        "pp": lambda: Group(plan.pp, dense * plan.dp_replicate),
        "world": lambda: Group(plan.world, 1),
    }[axis]()


def members(plan: Plan, axis: str) -> np.ndarray:
    """Return, for one plan, the group number of every rank along `axis`."""
    ranks = np.arange(plan.world)
    if axis == "world":
        return np.zeros_like(ranks)
    g = group(plan, axis)
    if axis == "copies":  # rank r of a pipeline meets rank pp - 1 - r, not its neighbour
        stage, index = np.divmod(ranks, int(g.stride))
        return np.minimum(stage, plan.pp - 1 - stage) * int(g.stride) + index if g.size > 1 else ranks
    return ranks // (g.size * g.stride) * g.stride + ranks % g.stride
