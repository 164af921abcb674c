"""Paths on any graph of switches, from a table of distances that is made once: no search per flow."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from simulator.errors import ProfileError
from simulator.network.paths import Paths, Routing, mixed, modulo, rows

#: flows handled together: bounds the memory of a step by flows times ports
_CHUNK = 100_000
#: sprayed flows are cut into this many parts, each on a path of its own, as long as there are few of them
_PARTS, _ROWS = 8, 2**19


@dataclass(frozen=True)
class TableRouter:
    """Shortest paths between accelerators that hang on switches, or that are switches themselves (a torus).

    Parameters
    ----------
    accelerators, vertices : int
        As in `Topology`.
    lower, upper, rate : ndarray of shape (cables,)
        As in `Topology`; the first `scale_up` cables lead to scale-up switches.
    scale_up : int
        Cables of the scale-up domains.
    domain : int
        Accelerators of a scale-up domain.
    cut_bytes_per_s, longest : float, int, or None
        What the family's closed forms say of bisection and diameter; None where it has none, and they are found on the graph.

    Notes
    -----
    At every switch a flow goes on to a neighbour that is one step nearer to its target; among several a hash of its ends
    decides. Ideal spraying is approached by cutting a flow into up to 8 parts that are hashed apart. Detours (Valiant, UGAL) are
    not modelled: a dragonfly then has one link for all that two routers or groups send each other.
    """

    accelerators: int
    vertices: int
    lower: np.ndarray
    upper: np.ndarray
    rate: np.ndarray
    scale_up: int
    domain: int
    cut_bytes_per_s: float | None
    longest: int | None
    separate: bool = field(default=False, init=False)

    def with_rate(self, rate: np.ndarray) -> TableRouter:
        """Return the router of the same graph at other rates, which no closed form knows."""
        return replace(self, rate=rate, cut_bytes_per_s=None, longest=None)

    def part(self, kind: str) -> np.ndarray | None:
        """Return None: these graphs have no rails or planes."""
        return None

    def bisection_bytes_per_s(self) -> float:
        """Return the family's closed form, or the smallest cut between the halves of the accelerators; one direction."""
        return self._smallest_cut() if self.cut_bytes_per_s is None else self.cut_bytes_per_s

    def diameter(self) -> int:
        """Return the family's closed form, or the most cables between two accelerators by the distances of their switches."""
        if self.longest is not None:
            return self.longest
        home = np.unique(self._home)
        distance, number = self._distance, self.__dict__["_number"]
        ends = 2 if (home >= self.accelerators).any() else 0
        return int(distance[np.ix_(number[home], number[home])].max()) + ends

    def _smallest_cut(self) -> float:
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import maximum_flow

        n, lower, upper, rate = (self.accelerators, *(x[self.scale_up :] for x in (self.lower, self.upper, self.rate)))
        unit = rate.max() / 2**20  # the flow counts whole numbers
        source, sink, a = self.vertices, self.vertices + 1, np.arange(self.accelerators)
        tails = np.concatenate([lower, upper, np.where(a < n // 2, source, a)])
        heads = np.concatenate([upper, lower, np.where(a < n // 2, a, sink)])
        whole = np.rint(rate / unit).astype(np.int32)
        wide = np.full(n, 2**30, dtype=np.int32)
        graph = coo_array((np.concatenate([whole, whole, wide]), (tails, heads)), shape=(sink + 1,) * 2).tocsr()
        return float(maximum_flow(graph, source, sink).flow_value * unit)

    @cached_property
    def _neighbours(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the neighbours of every vertex and the links to them, shape (vertices, most ports), -1 for none."""
        live = np.flatnonzero(self.rate[self.scale_up :] > 0) + self.scale_up
        ends = np.concatenate([self.lower[live], self.upper[live]]).astype(np.int64)
        others = np.concatenate([self.upper[live], self.lower[live]])
        links = np.concatenate([live, len(self.rate) + live])
        order = np.argsort(ends, kind="stable")
        ends, others, links = ends[order], others[order], links[order]
        place = np.arange(len(ends)) - np.searchsorted(ends, ends)
        table = np.full((2, self.vertices, int(place.max(initial=0)) + 1), -1)
        table[0, ends, place], table[1, ends, place] = others, links
        return table[0], table[1]

    @cached_property
    def _home(self) -> np.ndarray:
        """Return the switch of every accelerator: where its first live cable leads, or itself where it forwards traffic."""
        neighbour, _ = self._neighbours
        first = neighbour[: self.accelerators, 0]
        return np.where(first >= self.accelerators, first, np.arange(self.accelerators))

    @cached_property
    def _distance(self) -> np.ndarray:
        """Return the steps between all vertices that forward traffic, shape (vertices, vertices), -1 for none."""
        from scipy.sparse import coo_array

        inner = np.zeros(self.vertices, dtype=bool)
        inner[self.accelerators :] = True
        inner[self._home] = True
        live = np.flatnonzero(self.rate > 0)
        live = live[(live >= self.scale_up) & inner[self.lower[live]] & inner[self.upper[live]]]
        names = np.flatnonzero(inner)
        number = np.full(self.vertices, -1)
        number[names] = np.arange(len(names))
        ends = number[self.lower[live]], number[self.upper[live]]
        joined = coo_array((np.ones(len(live), dtype=np.float32), ends), shape=(len(names),) * 2).tocsr()
        joined = joined + joined.T
        table = np.where(np.eye(len(names), dtype=bool), 0, -1).astype(np.int16)
        edge, step = np.eye(len(names), dtype=np.float32), 0
        while edge.any():  # all sources go one step at once
            step += 1
            fresh = (joined @ edge > 0) & (table < 0)
            table[fresh] = step
            edge = fresh.astype(np.float32)
        self.__dict__["_number"] = number
        return table

    def paths(self, source: np.ndarray, target: np.ndarray, routing: Routing = "sprayed", pxn: bool = True, seed: int = 0) -> Paths:
        """Return the links from each source to its target; `pxn` means nothing without rails.

        Under spraying, `Paths.parts` consecutive rows are one flow. ``d-mod-k`` hashes the target alone.
        """
        source, target = (np.asarray(x, dtype=np.int64) for x in (source, target))
        parts = int(np.clip(_ROWS // max(len(source), 1), 1, _PARTS)) if routing == "sprayed" else 1
        source, target = np.repeat(source, parts), np.repeat(target, parts)
        turn = np.tile(np.arange(parts), len(source) // parts)
        key = mixed(np.zeros_like(source) if routing == "d-mod-k" else source, target, turn, seed)
        chunks = [slice(at, at + _CHUNK) for at in range(0, len(source), _CHUNK)]
        found = [self._walk(source[c], target[c], key[c]) for c in chunks]
        width = max((table.shape[1] for table in found), default=0)
        table = np.full((len(source), width), -1)
        for c, part in zip(chunks, found, strict=True):
            table[c, : part.shape[1]] = part
        indptr, links = rows(table)
        hops = np.diff(indptr)
        inside = source // self.domain == target // self.domain
        level = np.where(inside, -1, np.maximum((hops + 1) // 2 - 1, 0))
        return Paths(indptr, links, np.concatenate([self.rate, self.rate]), level, parts=parts)

    def _walk(self, source: np.ndarray, target: np.ndarray, key: np.ndarray) -> np.ndarray:
        many, columns = len(self.rate), []
        inside = (source // self.domain == target // self.domain) & (self.domain > 1)
        neighbour, link = self._neighbours
        here, goal = self._home[source], self._home[target]
        first, last = (np.where(self._home[x] != x, link[x, 0], -1) for x in (source, target))
        columns.append(np.where(inside, np.where(source != target, source, -1), first))
        distance, number = self._distance, self.__dict__["_number"]
        for step in range(int(distance.max(initial=0)) + 1):
            moving = np.flatnonzero(~inside & (here != goal))
            if not len(moving):
                break
            at, to = here[moving], number[goal[moving]]
            near = neighbour[at]
            there = number[near]
            left = distance[number[at], to]
            if (left < 0).any():
                lost = moving[np.flatnonzero(left < 0)[0]]
                raise ProfileError(f"no live path from accelerator {source[lost]} to {target[lost]}; restore a link, or leave the host out")
            good = (near >= 0) & (there >= 0) & (distance[there, to[:, None]] == (left - 1)[:, None])
            pick = modulo(mixed(key[moving], step), 1 << 30) % good.sum(axis=1)
            chosen = (good.cumsum(axis=1) > pick[:, None]).argmax(axis=1)
            column = np.full(len(source), -1)
            column[moving] = link[at, chosen]
            here = here.copy()
            here[moving] = near[np.arange(len(moving)), chosen]
            columns.append(column)
        back = np.where(last >= many, last - many, last + many)
        columns.append(np.where(inside, np.where(source != target, many + target, -1), np.where(last >= 0, back, -1)))
        return np.column_stack(columns)
