"""The event loop of `simulator.network.flows` flow by flow, compiled by numba (the extra ``fast``).

The tests hold it against the numpy path. Shapes: F flows, E entries (one per flow and
link on its path), L links.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
from numba import njit

from simulator.network.filling import TIE

BLOCK = 256  # flows whose next completion is known as one number
_FULL = 1 - 1e-9  # a link used beyond this share of its capacity may be a bottleneck


class State(NamedTuple):
    """What the event loop knows: paths both ways, rates, and scratch space.

    ``held[lptr[m] : lptr[m] + count[m]]`` are the entries of the active flows on link m, ``place`` their positions.
    """

    indptr: np.ndarray
    links: np.ndarray
    capacity: np.ndarray
    weight: np.ndarray
    owner: np.ndarray
    lptr: np.ndarray
    held: np.ndarray
    place: np.ndarray
    count: np.ndarray
    rate: np.ndarray
    fresh: np.ndarray  # rates of the filling in progress
    part: np.ndarray  # flows that it fills
    spare: np.ndarray  # bytes/s left on a link
    crowd: np.ndarray  # flows on a link that wait for their rate
    level: np.ndarray  # rate at which a link was exhausted
    opened: np.ndarray
    seen: np.ndarray
    used: np.ndarray


def lay_out(indptr: np.ndarray, links: np.ndarray, capacity: np.ndarray, weight: np.ndarray) -> State:
    """Return the state before the first flow begins."""
    flows, entries, total = len(indptr) - 1, len(links), len(capacity)
    lptr = np.concatenate([[0], np.cumsum(np.bincount(links, minlength=total))]).astype(np.int64)
    owner = np.repeat(np.arange(flows), np.diff(indptr))
    whole, real, flag = (lambda n, kind=kind: np.zeros(n, dtype=kind) for kind in (np.int64, np.float64, np.bool_))
    return State(
        indptr, links, capacity, weight, owner, lptr, whole(entries), whole(entries), whole(total), real(flows), real(flows),
        flag(flows), real(total), real(total), real(total), flag(total), flag(total), real(total),
    )  # fmt: skip


@njit(cache=True)
def admit(flow: int, s: State) -> None:
    """Put a flow on the lists of its links."""
    s.rate[flow] = np.inf
    for e in range(s.indptr[flow], s.indptr[flow + 1]):
        m = s.links[e]
        s.held[s.lptr[m] + s.count[m]] = e
        s.place[e] = s.lptr[m] + s.count[m]
        s.count[m] += 1


@njit(cache=True)
def release(flow: int, s: State) -> None:
    """Take a flow off the lists of its links, in constant time per link."""
    for e in range(s.indptr[flow], s.indptr[flow + 1]):
        m = s.links[e]
        last = s.held[s.lptr[m] + s.count[m] - 1]
        s.held[s.place[e]] = last
        s.place[last] = s.place[e]
        s.count[m] -= 1
        s.used[m] = max(s.used[m] - s.weight[flow] * s.rate[flow], 0.0)


@njit(cache=True)
def fill_part(touched: list, chosen: list, s: State) -> None:
    """Fill the flows `chosen` with what the others leave on the links `touched`, by rising rate."""
    heap = [(0.0, np.int64(0))]
    heap.pop()
    for m in touched:
        s.spare[m], s.crowd[m], s.level[m] = s.capacity[m], 0.0, np.inf
        for k in range(s.lptr[m], s.lptr[m] + s.count[m]):
            f = s.owner[s.held[k]]
            if s.part[f]:
                s.crowd[m] += s.weight[f]
            else:
                s.spare[m] -= s.weight[f] * s.rate[f]
        heapq.heappush(heap, (max(s.spare[m], 0.0) / s.crowd[m], m))
    for f in chosen:
        s.fresh[f] = -1.0
    while len(heap) > 0:
        key, m = heapq.heappop(heap)
        if s.crowd[m] <= 0:
            continue
        share = max(s.spare[m], 0.0) / s.crowd[m]
        if share > key:  # flows frozen elsewhere left more for the rest
            heapq.heappush(heap, (share, m))
            continue
        s.level[m] = key
        for k in range(s.lptr[m], s.lptr[m] + s.count[m]):
            f = s.owner[s.held[k]]
            if s.part[f] and s.fresh[f] < 0:
                s.fresh[f] = key
                for e in range(s.indptr[f], s.indptr[f + 1]):
                    s.spare[s.links[e]] -= s.weight[f] * key
                    s.crowd[s.links[e]] -= s.weight[f]


@njit(cache=True)
def spread(open_links: list, at: int, threshold: float, chosen: list, touched: list, s: State) -> None:
    """Choose the flows at or above `threshold` on open links, and open every bottleneck that they pass."""
    while at < len(open_links):
        m = open_links[at]
        at += 1
        for k in range(s.lptr[m], s.lptr[m] + s.count[m]):
            f = s.owner[s.held[k]]
            if s.part[f] or s.rate[f] < threshold:
                continue
            s.part[f] = True
            chosen.append(f)
            for e in range(s.indptr[f], s.indptr[f + 1]):
                j = s.links[e]
                if not s.seen[j]:
                    s.seen[j] = True
                    touched.append(j)
                if not s.opened[j] and s.used[j] >= s.capacity[j] * _FULL:
                    s.opened[j] = True
                    open_links.append(j)


@njit(cache=True)
def resolve(open_links: list, threshold: float, s: State) -> list:
    """Return the flows whose rates may change, with the new rates in `State.fresh`.

    Beginning at `open_links`, every bottleneck that flows at or above `threshold` pass is opened; these flows are filled beside
    the others; a link that has become a bottleneck below the rate of a flow left out is opened, too, until there is none.
    """
    chosen = [np.int64(0)]
    chosen.pop()
    touched = [np.int64(0)]
    touched.pop()
    at = 0
    while at < len(open_links):
        spread(open_links, at, threshold, chosen, touched, s)
        at = len(open_links)
        fill_part(touched, chosen, s)
        for m in touched:
            if s.opened[m] or s.level[m] == np.inf:
                continue
            for k in range(s.lptr[m], s.lptr[m] + s.count[m]):
                f = s.owner[s.held[k]]
                if not s.part[f] and s.rate[f] > s.level[m]:
                    s.opened[m] = True
            if s.opened[m]:
                open_links.append(m)
    for m in touched:
        s.seen[m] = False
        s.used[m] = s.capacity[m] - s.spare[m]
    for m in open_links:
        s.opened[m] = False
    for f in chosen:
        s.part[f] = False
    return chosen


@njit(cache=True)
def run(s: State, size: np.ndarray, ready: np.ndarray, order: np.ndarray, grain: float) -> tuple[np.ndarray, int]:
    """Return when each flow has sent its last byte, seconds, and how often rates were solved.

    Notes
    -----
    The threshold of `resolve` is explained in `simulator.network.filling.run`.
    """
    flows, begun, alive, solves = len(size), 0, 0, 0
    left, since, finish, predicted = size.copy(), ready.copy(), np.full(flows, np.inf), np.full(flows, np.inf)
    blocks = (flows + BLOCK - 1) // BLOCK
    soonest, stale = np.full(blocks, np.inf), np.zeros(blocks, np.bool_)
    slack = max(grain, TIE)
    while begun < flows or alive > 0:
        for b in range(blocks):
            if stale[b]:
                soonest[b], stale[b] = predicted[b * BLOCK : (b + 1) * BLOCK].min(), False
        ends = soonest.min()
        starts = ready[order[begun]] if begun < flows else np.inf
        now, threshold = min(ends, starts), np.inf
        seeds = [np.int64(0)]
        seeds.pop()
        if ends <= starts:
            for b in range(blocks):
                if soonest[b] > ends * (1 + slack):
                    continue
                for f in range(b * BLOCK, min(flows, (b + 1) * BLOCK)):
                    if predicted[f] <= ends + slack * (ends - ready[f]):
                        finish[f], predicted[f], stale[b] = predicted[f], np.inf, True
                        threshold = min(threshold, s.rate[f])
                        alive -= 1
                        for e in range(s.indptr[f], s.indptr[f + 1]):
                            m = s.links[e]
                            if not s.opened[m] and s.used[m] >= s.capacity[m] * _FULL:
                                s.opened[m] = True
                                seeds.append(m)
                        release(f, s)
        else:
            while begun < flows and ready[order[begun]] <= now:
                f = order[begun]
                begun += 1
                alive += 1
                admit(f, s)
                for e in range(s.indptr[f], s.indptr[f + 1]):
                    m = s.links[e]
                    if not s.opened[m]:
                        s.opened[m] = True
                        seeds.append(m)
            for m in seeds:
                crowd = 0.0
                for k in range(s.lptr[m], s.lptr[m] + s.count[m]):
                    crowd += s.weight[s.owner[s.held[k]]]
                threshold = min(threshold, s.capacity[m] / crowd)
        solves += 1
        for f in resolve(seeds, threshold * (1 - TIE), s):
            if s.fresh[f] != s.rate[f]:
                before = 0.0 if s.rate[f] == np.inf else s.rate[f]
                left[f] = max(left[f] - before * (now - since[f]), 0.0)
                since[f], s.rate[f] = now, s.fresh[f]
                predicted[f] = now + left[f] / s.rate[f]
                stale[f // BLOCK] = True
    return finish, solves
