"""Collectives of different kinds on the same links: how much the ones that overlap in time slow each other.

Notes
-----
Found in two passes. The first runs the step with every kind of collective by itself; of each node it tells the share of its
time during which another stream of the same class of ranks communicated. The graph tells by which factor two kinds slow each
other while both run (`simulator.network.sharing.together`). The second pass runs with the stretched durations. What stretching
itself overlaps anew is not followed further.

It is asked for (``simulate_step(..., contention=True)``; `simulator.fabrics` always does) and not the default: `bound` and `estimate`
price each kind by itself, and the levels are held to agree; links were fitted to published steps without it, so that what
their traffic shares is in the constants already; and a pass for every rank (``ranks="all"``) knows no second one. That all groups of
one kind share the links is in at every level.
"""

from __future__ import annotations

import numpy as np

from simulator.network.sharing import Share, share, together
from simulator.scenario.scenario import Scenario
from simulator.workload.step import StepProgram

Shares = dict[tuple[str, str], Share]


def shares(program: StepProgram, scenario: Scenario) -> Shares:
    """Return, for every (axis, kind) of collective that leaves a scale-up domain, what sharing leaves it."""
    found: Shares = {}
    for task in program.tasks:
        for op in task.ops:
            if op.axis and (op.axis, op.kind) not in found:
                kept = share(scenario.plan, scenario.cluster, op.axis, op.kind)
                if kept is not None:
                    found[op.axis, op.kind] = kept
    return found


def stretched(
    program: StepProgram, scenario: Scenario, seconds: np.ndarray, start: np.ndarray, end: np.ndarray, found: Shares
) -> np.ndarray:
    """Return the seconds of every node, longer where it shared links with another stream.

    Parameters
    ----------
    seconds, start, end : ndarray of shape (nodes,)
        Durations and the times of the first pass.
    found : dict
        From `shares`.
    """
    kinds = [next(((op.axis, op.kind) for op in task.ops if (op.axis, op.kind) in found), None) for task in program.tasks]
    streams = [task.stream if kind else "" for task, kind in zip(program.tasks, kinds, strict=True)]
    stream = np.array(streams, dtype=object)[np.asarray(program.task)]
    rank, task = np.asarray(program.rank_class), np.asarray(program.task)
    names = sorted(set(streams) - {""})
    longer = np.zeros(len(seconds))
    for c in np.unique(rank):
        nodes = {s: np.flatnonzero((rank == c) & (stream == s) & (end > start)) for s in names}
        for mine in names:
            for other in names:
                if mine == other or not len(nodes[mine]) or not len(nodes[other]):
                    continue
                beside = _covered(start[nodes[other]], end[nodes[other]], start[nodes[mine]], end[nodes[mine]])
                if beside.any():
                    factor = _factors(scenario, kinds, task[nodes[mine]], task[nodes[other]], seconds[nodes[other]])
                    longer[nodes[mine]] += beside * (factor - 1)
    length = end - start
    return seconds * (1 + np.divide(longer, length, out=np.zeros_like(longer), where=length > 0))


def _covered(begin: np.ndarray, finish: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return how long each of [start, end] lies in the union of the intervals [begin, finish], which follow one another."""
    order = np.argsort(begin, kind="stable")
    edges = np.column_stack([begin[order], finish[order]]).ravel()
    total = np.concatenate([[0.0], np.cumsum(finish[order] - begin[order])])
    at = np.column_stack([total[:-1], total[1:]]).ravel()
    return np.interp(end, edges, at) - np.interp(start, edges, at)


def _factors(scenario: Scenario, kinds: list, mine: np.ndarray, other: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Return the factor of each of `mine` beside the kind that keeps the other stream busy longest."""
    busy: dict[tuple[str, str], float] = {}
    for t, length in zip(other.tolist(), seconds.tolist(), strict=True):
        busy[kinds[t]] = busy.get(kinds[t], 0.0) + length
    main = max(busy, key=busy.__getitem__)
    known = {t: together(scenario.cluster, ((scenario.plan, *kinds[t]), (scenario.plan, *main)))[0] for t in set(mine.tolist())}
    return np.array([known[t] for t in mine.tolist()])
