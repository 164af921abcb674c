"""Ranks that behave alike: simulate one of each class instead of all.

Notes
-----
Classes are the coarsest equitable partition of the ranks: two ranks share a class when they have the same stage, speed
and load, their groups along every axis hold the same classes, and so do their pipeline neighbours. By induction over the
program every rank of a class then does everything at the same time, so one representative is exact, not an
approximation. Found by colour refinement (Berkholz, Bonsma, Grohe, "Tight Lower and Upper Bounds for the Complexity of
Canonical Colour Refinement", 2017).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simulator.scenario.mesh import group, members
from simulator.scenario.plan import Plan

AXES = ("tp", "cp", "ep", "etp", "dp", "edp", "dp_replicate", "copies", "world")


@dataclass(frozen=True, slots=True)
class RankClasses:
    """Classes of ranks, in order of their first rank.

    Parameters
    ----------
    labels : ndarray of shape (world,)
        Class of every rank.
    representative, count, stage : ndarray of shape (classes,)
        First rank, number of ranks, pipeline rank.
    slowdown, load : ndarray of shape (classes,)
        Factor on kernels, and tokens routed to the rank over the mean.
    before, after : ndarray of shape (classes,)
        Class of the previous and next pipeline rank, around the end.
    meets : dict of str to ndarray
        For each axis, the number of the set of classes that a class communicates with; -1 when it is alone in it.
    """

    labels: np.ndarray
    representative: np.ndarray
    count: np.ndarray
    stage: np.ndarray
    slowdown: np.ndarray
    load: np.ndarray
    before: np.ndarray
    after: np.ndarray
    meets: dict[str, np.ndarray]


def _dense(rows: np.ndarray) -> np.ndarray:
    """Number equal rows alike, in order of first appearance."""
    _, first, inverse = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    order = np.empty(len(first), dtype=np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return order[inverse.reshape(-1)]


def _group_sums(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Sum of 64-bit fingerprints over each group, handed back to its members: equal for equal multisets."""
    sums = np.zeros(groups.max() + 1, dtype=np.uint64)
    np.add.at(sums, groups, values)
    return sums[groups]


def rank_classes(plan: Plan, slowdown: np.ndarray, load: np.ndarray, every_rank: bool = False) -> RankClasses:
    """Return the classes of the ranks of `plan`.

    Parameters
    ----------
    slowdown, load : ndarray of shape (world,)
        What sets ranks apart beside their place in the mesh.
    every_rank : bool
        Make every rank a class of its own.
    """
    world, pp = plan.world, plan.pp
    ranks = np.arange(world)
    stage = ranks // (world // pp)
    after, before = (ranks + world // pp) % world, (ranks - world // pp) % world
    groups = {axis: members(plan, axis) for axis in AXES}
    labels = ranks if every_rank else _dense(np.column_stack([stage, slowdown, load]))
    fingerprint = np.random.default_rng(0).integers(0, 2**63, size=world, dtype=np.uint64)
    while not every_rank:
        marks = fingerprint[labels]
        columns = [labels, labels[before], labels[after]] + [_group_sums(marks, g) for g in groups.values()]
        finer = _dense(np.column_stack([np.asarray(c, dtype=np.uint64) for c in columns]))
        if finer.max() == labels.max():
            break
        labels = finer
    _, representative, count = np.unique(labels, return_index=True, return_counts=True)
    meets = {}
    for axis, g in groups.items():
        sets = _dense(_group_sums(fingerprint[labels], g)[:, None])[representative]
        alone = np.bincount(sets)[sets] == 1
        meets[axis] = np.where(alone, -1, sets)
    return RankClasses(
        labels, representative, count, stage[representative], slowdown[representative], load[representative],
        labels[before[representative]], labels[after[representative]], meets,
    )  # fmt: skip


def rank_loads(plan: Plan, heaviest: float) -> np.ndarray:
    """Return the routed tokens of every rank over the mean, when the first rank of each expert group has `heaviest`.

    Raises
    ------
    ValueError
        When one rank cannot have that much.
    """
    if plan.ep == 1:
        return np.ones(plan.world)
    if not 1 <= heaviest <= plan.ep:
        raise ValueError(f"expert_load = {heaviest} must be 1 to ep = {plan.ep}")
    index = np.arange(plan.world) // group(plan, "ep").stride % plan.ep
    return np.where(index == 0, heaviest, (plan.ep - heaviest) / (plan.ep - 1))
