"""Water-filling in whole-array steps, and the event loop over it: the numpy path of `simulator.network.flows`.

Shapes: F flows, E entries (one per flow and link on its path), L links.
"""

from __future__ import annotations

import numpy as np

#: completions that differ by less than this share of their duration happen at once
TIE = 1e-12


def fill(flow: np.ndarray, link: np.ndarray, weight: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """Return max-min fair rates by water-filling, bytes/s.

    Parameters
    ----------
    flow, link : ndarray of shape (E,)
        Entries sorted by flow; every flow has one or more.
    weight : ndarray of shape (F,)
        How many identical flows a row stands for; the rate is that of one of them.
    capacity : ndarray of shape (L,)
        Bytes/s that each link has for these flows.

    Notes
    -----
    A link whose fair share ``capacity / flows`` is the lowest of every link that its flows pass is their bottleneck, whatever
    happens elsewhere: all such links are frozen together, so that the rounds follow the depth of dependence, not the number of
    links.

    References
    ----------
    Bertsekas, Gallager, "Data Networks", 2nd ed., 1992, section 6.5.2 (max-min flow control by progressive filling).
    """
    flows, links = len(weight), len(capacity)
    rate = np.zeros(flows)
    free = np.ones(flows, dtype=bool)
    left = capacity.astype(float).copy()
    while len(flow):
        begins = np.flatnonzero(np.concatenate([[True], flow[1:] != flow[:-1]]))
        count = np.bincount(link, weight[flow], links)
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(count > 0, np.maximum(left, 0.0) / count, np.inf)
        lowest = np.minimum.reduceat(share[link], begins)
        low = np.repeat(lowest, np.diff(np.append(begins, len(flow))))
        outbid = np.bincount(link, low < share[link], links) > 0
        freezes = ~outbid[link]
        rate[flow[freezes]] = low[freezes]
        free[flow[freezes]] = False
        gone = ~free[flow]
        left = left - np.bincount(link[gone], (weight * rate)[flow[gone]], links)
        flow, link = flow[~gone], link[~gone]
    return rate


def run(
    indptr: np.ndarray, links: np.ndarray, capacity: np.ndarray, size: np.ndarray, ready: np.ndarray, weight: np.ndarray, grain: float
) -> tuple[np.ndarray, int]:
    """Return when each flow has sent its last byte, seconds, and how often rates were solved.

    Notes
    -----
    When flows end or begin, only rates at or above a threshold change: filling by rising rate goes the same way with and
    without them until the first of them is frozen. For one that ends the threshold is its rate; for one that begins it is the
    fair share ``capacity / flows`` of the scarcest link on its path, which it cannot fall below.
    """
    flows, total = len(size), len(capacity)
    finish, rate, left, since = np.full(flows, np.inf), np.zeros(flows), size.astype(float).copy(), ready.copy()
    predicted = np.full(flows, np.inf)
    entry = np.repeat(np.arange(flows), np.diff(indptr))
    order = np.argsort(ready, kind="stable")
    active = np.zeros(flows, dtype=bool)
    solves, begun, now = 0, 0, 0.0
    flow, link = entry[:0], links[:0]
    while begun < flows or active.any():
        ends = predicted.min()
        starts = ready[order[begun]] if begun < flows else np.inf
        now = min(ends, starts)
        threshold = np.inf
        if ends <= starts:
            done = np.flatnonzero(predicted <= ends + np.maximum(grain, TIE) * np.maximum(ends - ready, 0.0))
            finish[done], active[done] = predicted[done], False
            threshold, predicted[done] = rate[done].min(), np.inf
        elif begun < flows:
            upto = begun + np.searchsorted(ready[order[begun:]], now, side="right")
            new, begun = order[begun:upto], upto
            active[new], rate[new] = True, np.inf
        on = active[entry]
        flow, link = entry[on], links[on]
        if not len(flow):
            continue
        if np.isinf(threshold):
            crowd = np.bincount(link, weight[flow], total)
            mine = np.isinf(rate[flow])
            threshold = (capacity[link[mine]] / crowd[link[mine]]).min()
        again = rate[flow] >= threshold * (1 - 1e-12)
        spent = np.bincount(link[~again], (weight * rate)[flow[~again]], total)
        chosen, index = np.unique(flow[again], return_inverse=True)
        if not len(chosen):
            continue
        found = fill(index, link[again], weight[chosen], capacity - spent)
        solves += 1
        moved = found != rate[chosen]
        chosen, found = chosen[moved], found[moved]
        old = np.where(np.isinf(rate[chosen]), 0.0, rate[chosen])
        left[chosen] = np.maximum(left[chosen] - old * (now - since[chosen]), 0.0)
        since[chosen], rate[chosen] = now, found
        predicted[chosen] = now + left[chosen] / found
    return finish, solves
