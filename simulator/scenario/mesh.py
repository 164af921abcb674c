"""Which ranks talk to which: the groups along each axis, and how they fall on blocks of accelerators.

Ranks are numbered stage by stage; inside a stage in the order of `Placement` without pp, so by default tp fastest, then cp,
then dp, and etp, ep, edp for the experts over the same ranks. `accelerator_of` says where each sits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulator.scenario.plan import Plan
from simulator.units import Number


@dataclass(frozen=True, slots=True)
class Group:
    """Equally spaced ranks: `size` of them, `stride` apart. Scalars, or arrays with one entry per plan.

    Parameters
    ----------
    size, stride : Number
        Members, and their distance.
    blocks, block_stride : Number
        A group in `blocks` equal parts that are farther apart; `size` counts all members.
    places : ndarray of shape (groups, size), optional
        The accelerators of every group, where a placement by hand leaves no regular distance.
    share : float, optional
        What a member keeps of its NIC's rate while all groups communicate, where the graph was asked; None asks the tiers.
    """

    size: Number
    stride: Number
    blocks: Number = 1
    block_stride: Number = 1
    places: np.ndarray | None = None
    share: float | None = None

    def within(self, block: int) -> Number:
        """Return how many members share one aligned block of `block` accelerators.

        Groups that do not fall on block borders are counted by their worst case: the greatest common divisor, or of places
        by hand the member with the fewest others in its block.
        """
        if self.places is not None:
            return _fewest_together(self.places // block)
        together = _aligned(self.size // self.blocks, self.stride, block)
        return together if np.ndim(self.blocks) == 0 and self.blocks == 1 else together * _aligned(self.blocks, self.block_stride, block)


def _aligned(size: Number, stride: Number, block: int) -> Number:
    span = np.asarray(size) * stride
    whole = np.gcd(np.asarray(span, dtype=np.int64), block)
    members = np.where(span <= block, np.where(block % np.maximum(span, 1) == 0, span, whole), whole) // stride
    return np.minimum(np.maximum(members, 1), size)


def _fewest_together(block: np.ndarray) -> int:
    """Return the smallest number of equal entries in a row of `block`, over all entries; shape (groups, size)."""
    ordered = np.sort(block, axis=1)
    starts = np.ones(ordered.shape, dtype=bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return int(np.diff(np.append(np.flatnonzero(starts.ravel()), ordered.size)).min())


def _degrees(plan: Plan, experts: bool) -> dict[str, Number]:
    """Return the degree of each token of the order on the attention or the expert mesh."""
    if experts:
        return {"tp": plan.etp, "cp": 1, "ep": plan.ep, "dp": plan.edp, "pp": plan.pp}
    return {"tp": plan.tp, "cp": plan.cp, "ep": 1, "dp": plan.dp, "pp": plan.pp}


def _stride(plan: Plan, token: str, experts: bool = False, pipeline: bool = False) -> Number:
    """Return the distance of neighbours along `token`: what the order puts before it; with `pipeline`, pp in its place."""
    degrees, distance = _degrees(plan, experts), 1
    for before in plan.placement.order.split("-"):
        if before == token:
            break
        if before != "pp" or pipeline:
            distance = distance * degrees[before]
    return distance


#: axis -> (token of the order, whether on the expert mesh)
_MESH = {
    "tp": ("tp", False), "cp": ("cp", False), "dp": ("dp", False), "dp_replicate": ("dp", False),
    "etp": ("tp", True), "ep": ("ep", True), "edp": ("dp", True),
}  # fmt: skip


def group(plan: Plan, axis: str) -> Group:
    """Return the group of `axis`, in ranks.

    ``dp`` and ``edp`` are the groups over which dense and expert state is sharded (context-parallel ranks hold the same
    parameters, so ``dp`` spans ``dp_shard * cp``); ``dp_replicate`` joins their replicas; ``copies`` joins the two ranks of a
    pipeline, r and pp - 1 - r, that hold the same stages for opposite directions; ``world`` is everyone.
    """
    return _group(plan, axis, pipeline=False)


def _group(plan: Plan, axis: str, pipeline: bool) -> Group:
    if axis == "world":
        return Group(plan.world, 1)
    if axis in ("pp", "copies"):
        stride = _stride(plan, "pp", pipeline=True) if pipeline else plan.world // plan.pp
        return Group(plan.pp if axis == "pp" else plan.copies, stride)
    token, experts = _MESH[axis]
    stride = _stride(plan, token, experts, pipeline)
    if axis == "dp":
        context, order = _stride(plan, "cp", pipeline=pipeline), plan.placement.order.split("-")
        between = order[order.index("cp") + 1 : order.index("dp")]
        if order.index("cp") > order.index("dp") or "tp" in between:
            return Group(plan.shard, np.where(np.asarray(plan.cp) > 1, context, stride))  # legal where one of them is 1
        return Group(plan.shard, context, plan.dp_shard, stride) if pipeline and "pp" in between else Group(plan.shard, context)
    size = {"tp": plan.tp, "cp": plan.cp, "etp": plan.etp, "ep": plan.ep, "edp": plan.expert_shard, "dp_replicate": plan.dp_replicate}
    return Group(size[axis], stride * (plan.dp_shard if axis == "dp_replicate" else 1))


def placed(plan: Plan, axis: str, per_host: int) -> Group:
    """Return the group of `axis` in accelerators, `per_host` of them in a host.

    Columns of plans have no placement by hand: it belongs to one plan.
    """
    if plan.placement.regular or np.ndim(plan.tp):
        return _group(plan, axis, pipeline=True)
    numbers = members(plan, axis)
    order = np.argsort(numbers, kind="stable")
    size = int(np.bincount(numbers).max())
    return Group(size, 1, places=accelerator_of(plan, per_host)[order].reshape(-1, size))


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


def accelerator_of(plan: Plan, per_host: int) -> np.ndarray:
    """Return, for one plan, the accelerator of every rank; `per_host` of them are in a host."""
    ranks, place = np.arange(plan.world), plan.placement
    stage, inside = np.divmod(ranks, plan.world // plan.pp)
    at = stage * _stride(plan, "pp", pipeline=True)
    for token in ("tp", "cp", "dp"):
        digit = inside // _stride(plan, token) % _degrees(plan, experts=False)[token]
        at = at + digit * _stride(plan, token, pipeline=True)
    if place.accelerators is not None:
        return np.asarray(place.accelerators)[at]
    if place.hosts is not None:
        return np.asarray(place.hosts)[at // per_host] * per_host + at % per_host
    return at
