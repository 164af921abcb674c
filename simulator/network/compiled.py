"""The event loop of `simulator.network.flows` flow by flow, compiled by numba (the extra ``fast``).

The tests hold it against the numpy path. Shapes: F flows, E entries (one per flow and link on its path), L links; J flows and K
entries of the part that is filled again.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
from numba import njit

from simulator.network.filling import TIE

BLOCK = 256  # flows whose next completion is known as one number
_FULL = 1 - 1e-9  # a link used beyond this share of its capacity may be a bottleneck
_ROOMY = 0.95  # one used less is left out of the filling until it is full
_LOOK = 1024  # solves from one look for roomy links to the next
_WIDE = 8  # when more than this fraction of the flows is touched, whoever is at or above the threshold is filled
_AGAIN = 8  # and so for as many solves, before a look whether fewer would do


class State(NamedTuple):
    """What the event loop knows: paths both ways, rates, and scratch space.

    ``held[lptr[m] : lptr[m] + count[m]]`` are the entries of the active flows on link m, ``place`` their positions. Flows that have
    not begun, and those that have ended, have rate 0. Of a flow's entries those on links that are left out come last.
    """

    indptr: np.ndarray
    split: np.ndarray  # (F,) first entry of each flow on a link that is left out of the filling
    out: np.ndarray  # (L,) links that are left out
    links: np.ndarray
    capacity: np.ndarray
    weight: np.ndarray
    owner: np.ndarray
    lptr: np.ndarray
    held: np.ndarray
    place: np.ndarray
    count: np.ndarray
    rate: np.ndarray
    part: np.ndarray  # flows that are filled again
    used: np.ndarray  # bytes/s that a link carries
    opened: np.ndarray
    level: np.ndarray  # rate at which a link was exhausted in this filling
    spare: np.ndarray  # bytes/s left on a link
    crowd: np.ndarray  # weight of the flows on a link that wait for their rate
    begins: np.ndarray  # (L,) where a link's part begins in `local`
    chosen: np.ndarray  # (J,) flows of the part
    fresh: np.ndarray  # (J,) their new rates
    near: np.ndarray  # (J + 1,) where the links of each begin in `hops`
    hops: np.ndarray  # (K,) copied together, as is their weight: most of the time goes into reading these
    heavy: np.ndarray  # (J,)
    touched: np.ndarray  # links of the part
    local: np.ndarray  # (K,) the part's flows by link, as positions in `chosen`


def lay_out(indptr: np.ndarray, links: np.ndarray, capacity: np.ndarray, weight: np.ndarray) -> State:
    """Return the state before the first flow begins."""
    flows, entries, total = len(indptr) - 1, len(links), len(capacity)
    lptr = np.concatenate([[0], np.cumsum(np.bincount(links, minlength=total))]).astype(np.int32)
    owner = np.repeat(np.arange(flows, dtype=np.int32), np.diff(indptr))
    whole, real, flag = (lambda n, kind=kind: np.zeros(n, dtype=kind) for kind in (np.int32, np.float64, np.bool_))
    return State(
        indptr.astype(np.int32), indptr[1:].astype(np.int32), flag(total), links.astype(np.int32), capacity,
        weight, owner, lptr, whole(entries), whole(entries), whole(total),
        real(flows), flag(flows), real(total), flag(total), np.full(total, np.inf), real(total), real(total), whole(total),
        whole(flows), real(flows), whole(flows + 1), whole(entries), real(flows), whole(total), whole(entries),
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
    s.rate[flow] = 0.0


@njit(cache=True)
def fill_part(size: int, s: State) -> int:
    """Fill the `size` flows chosen with what the others leave, by rising rate; return how many links they touch."""
    links, at = 0, 0
    for j in range(size):
        f = s.chosen[j]
        weight, rate = s.weight[f], s.rate[f] if s.rate[f] < np.inf else 0.0
        s.fresh[j], s.heavy[j], s.near[j] = -1.0, weight, at
        for e in range(s.indptr[f], s.split[f]):
            m = s.links[e]
            s.hops[at] = m
            at += 1
            if s.crowd[m] == 0.0:
                s.touched[links] = m
                links += 1
                s.spare[m], s.level[m], s.begins[m] = s.capacity[m] - s.used[m], np.inf, 0
            s.crowd[m] += weight
            s.spare[m] += weight * rate
            s.begins[m] += 1
    s.near[size] = at
    total = 0
    for k in range(links):
        m = s.touched[k]
        total += s.begins[m]
        s.begins[m] = total
    for j in range(size - 1, -1, -1):
        for at in range(s.near[j], s.near[j + 1]):
            m = s.hops[at]
            s.begins[m] -= 1
            s.local[s.begins[m]] = j
    heap = [(0.0, 0)]
    heap.pop()
    for k in range(links):
        m = s.touched[k]
        heap.append((max(s.spare[m], 0.0) / s.crowd[m], k))
    heapq.heapify(heap)
    while len(heap) > 0:
        key, k = heap[0]
        m = s.touched[k]
        if s.crowd[m] <= 0.5 * TIE:
            heapq.heappop(heap)
            continue
        share = max(s.spare[m], 0.0) / s.crowd[m]
        if share > key:  # flows frozen elsewhere left more for the rest
            heapq.heapreplace(heap, (share, k))
            continue
        heapq.heappop(heap)
        s.level[m] = key
        last = s.begins[s.touched[k + 1]] if k + 1 < links else total
        for at in range(s.begins[m], last):
            j = s.local[at]
            if s.fresh[j] < 0:
                s.fresh[j] = key
                weight = s.heavy[j]
                for hop in range(s.near[j], s.near[j + 1]):
                    s.spare[s.hops[hop]] -= weight * key
                    s.crowd[s.hops[hop]] -= weight
    for k in range(links):
        s.crowd[s.touched[k]] = 0.0
    return links


@njit(cache=True)
def exchange(one: int, other: int, s: State) -> None:
    """Let two entries of an active flow change places."""
    s.links[one], s.links[other] = s.links[other], s.links[one]
    s.place[one], s.place[other] = s.place[other], s.place[one]
    s.held[s.place[one]], s.held[s.place[other]] = one, other


@njit(cache=True)
def leave_out(s: State) -> None:
    """Leave out of the filling, once no flow is still to begin, the links that are used well below their capacity."""
    for m in range(len(s.out)):
        s.out[m] = s.used[m] < _ROOMY * s.capacity[m]
    for f in range(len(s.rate)):
        if s.rate[f] > 0:
            s.split[f] = s.indptr[f]
            for e in range(s.indptr[f], s.indptr[f + 1]):
                if not s.out[s.links[e]]:
                    exchange(e, s.split[f], s)
                    s.split[f] += 1


@njit(cache=True)
def take_in(link: int, s: State) -> None:
    """Fill a link again that was left out."""
    s.out[link] = False
    for at in range(s.lptr[link], s.lptr[link] + s.count[link]):
        e = s.held[at]
        f = s.owner[e]
        exchange(e, s.split[f], s)
        s.split[f] += 1


@njit(cache=True)
def carry(size: int, sign: float, open_links: list, s: State) -> None:
    """Add the changes of the part's rates to the links left out, and open those that are full."""
    for j in range(size):
        f = s.chosen[j]
        more = sign * s.weight[f] * (s.fresh[j] - (s.rate[f] if s.rate[f] < np.inf else 0.0))
        for e in range(s.split[f], s.indptr[f + 1]):
            m = s.links[e]
            s.used[m] += more
            if s.used[m] >= s.capacity[m] * _FULL and not s.opened[m]:
                s.opened[m] = True
                open_links.append(m)


@njit(cache=True)
def overfull(size: int, open_links: list, s: State) -> bool:
    """Return whether the new rates fill a link that is left out; these are then taken in and opened, to fill the part again."""
    first = len(open_links)
    carry(size, 1.0, open_links, s)
    if len(open_links) == first:
        return False
    carry(size, -1.0, open_links, s)
    for at in range(first, len(open_links)):
        take_in(open_links[at], s)
    return True


@njit(cache=True)
def spread(open_links: list, at: int, threshold: float, size: int, most: int, s: State) -> int:
    """Choose the flows at or above `threshold` on open links, and open every bottleneck that they pass; stop beyond `most`."""
    while at < len(open_links):
        m = open_links[at]
        at += 1
        for k in range(s.lptr[m], s.lptr[m] + s.count[m]):
            f = s.owner[s.held[k]]
            if s.part[f] or s.rate[f] < threshold:
                continue
            s.part[f] = True
            s.chosen[size] = f
            size += 1
            if size > most:
                return size
            for e in range(s.indptr[f], s.indptr[f + 1]):
                j = s.links[e]
                if not s.opened[j] and s.used[j] >= s.capacity[j] * _FULL:
                    s.opened[j] = True
                    open_links.append(j)
    return size


@njit(cache=True)
def exhausted(links: int, open_links: list, s: State) -> None:
    """Open the links that have become a bottleneck below the rate of a flow left out."""
    for k in range(links):
        m = s.touched[k]
        if s.opened[m] or s.level[m] == np.inf:
            continue
        for at in range(s.lptr[m], s.lptr[m] + s.count[m]):
            f = s.owner[s.held[at]]
            if not s.part[f] and s.rate[f] > s.level[m]:
                s.opened[m] = True
        if s.opened[m]:
            open_links.append(m)


@njit(cache=True)
def resolve(open_links: list, threshold: float, most: int, s: State) -> int:
    """Return how many flows were filled again, `State.chosen`, with new rates `State.fresh`.

    Beginning at `open_links`, every bottleneck that flows at or above `threshold` pass is opened; these flows are filled beside
    the others; a link that has become a bottleneck below the rate of a flow left out is opened, too, until there is none. Where
    that reaches more than `most` flows, every one at or above the threshold is filled, in order of memory. Links with room to
    spare are left out of the filling: rates that are fair on the others are fair on all while these stay below capacity.
    """
    size, at, links = 0 if most else 1, 0, 0
    while most and at < len(open_links):
        size = spread(open_links, at, threshold, size, most, s)
        at = len(open_links)
        if size > most:
            break
        links = fill_part(size, s)
        exhausted(links, open_links, s)
        if at == len(open_links):
            overfull(size, open_links, s)
    for j in range(size if most else 0):
        s.part[s.chosen[j]] = False
    if size > most:
        size = 0
        for f in range(len(s.rate)):
            s.chosen[size] = f  # written over by the next one unless it counts: no branch to guess
            size += s.rate[f] >= threshold
        links = fill_part(size, s)
        while overfull(size, open_links, s):
            links = fill_part(size, s)
    for m in open_links:
        s.opened[m] = False
    for k in range(links):
        m = s.touched[k]
        s.used[m] = s.capacity[m] - s.spare[m]
    return size


@njit(cache=True)
def run(s: State, size: np.ndarray, ready: np.ndarray, order: np.ndarray, grain: float) -> tuple[np.ndarray, int]:
    """Return when each flow has sent its last byte, seconds, and how often rates were solved.

    Notes
    -----
    The threshold of `resolve` is explained in `simulator.network.filling.run`.
    """
    flows, begun, alive, solves, look, wide = len(size), 0, 0, 0, 0, 0
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
        if now == np.inf:  # nobody moves: times stay infinite
            break
        seeds = [np.int32(0)]
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
        most = max(alive // _WIDE, 64)
        part = resolve(seeds, threshold * (1 - TIE), 0 if wide else most, s)
        wide = wide - 1 if wide else _AGAIN if part > most else 0
        for j in range(part):
            f = s.chosen[j]
            if s.fresh[j] != s.rate[f]:
                before = 0.0 if s.rate[f] == np.inf else s.rate[f]
                left[f] = max(left[f] - before * (now - since[f]), 0.0)
                since[f], s.rate[f] = now, s.fresh[j]
                predicted[f] = now + left[f] / s.rate[f]
                stale[f // BLOCK] = True
        if begun == flows and solves >= look:
            leave_out(s)
            look = solves + _LOOK
    return finish, solves
