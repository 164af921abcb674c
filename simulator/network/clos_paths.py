"""Build a folded Clos as a `Topology`, and route through it by arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from simulator.errors import ProfileError
from simulator.network.clos import Sizes, sizes
from simulator.network.paths import Paths, Routing, mixed, modulo, rows
from simulator.network.topology import Topology
from simulator.scenario.cluster import Cluster

#: how often a hashed flow draws another path when a cable of the first is dead
_REDRAWS = 64


def build(cluster: Cluster) -> Topology:
    """Return the topology of a cluster whose fabric is a folded Clos."""
    s, n, shape, host = sizes(cluster), cluster.accelerators, cluster.fabric.shape, cluster.host
    planes, ports, names = shape.planes, shape.planes * shape.cables, [tier.name for tier in cluster.fabric.tiers]
    domains = -(-n // host.scale_up_domain) if host.scale_up_domain > 1 else 0
    layers = {"scale-up": domains}
    counts = [planes * s.leaves, planes * s.groups * s.spines, planes * (int(s.component.max()) + 1) * s.sets * s.cores]
    layers |= {names[level]: counts[level] for level in range(s.levels)}
    first = n + domains + np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    a, plane = np.arange(n), np.arange(planes)[:, None]
    parts = []
    if domains:
        parts.append(("scale-up", a, n + a // host.scale_up_domain, host.scale_up_bytes_per_s))
    if s.levels > 0:
        leaf = np.repeat(first[0] + plane * s.leaves + s.leaf, shape.cables, axis=0)
        parts.append(("host", np.broadcast_to(a, (ports, n)), leaf, host.nic_bytes_per_s / ports))
    if s.levels > 1:
        leaf, c = np.arange(planes * s.leaves)[:, None], np.arange(s.up)
        group = leaf // s.leaves * s.groups + s.group[leaf % s.leaves]
        parts.append((names[0], np.broadcast_to(first[0] + leaf, (len(leaf), s.up)), first[1] + group * s.spines + c % s.spines, s.rate))
    if s.levels > 2:
        spine, c = np.arange(counts[1])[:, None], np.arange(s.up2)
        component = spine // (s.groups * s.spines) * (int(s.component.max()) + 1) + s.component[spine // s.spines % s.groups]
        core = (component * s.sets + spine % s.spines % s.sets) * s.cores + c % s.cores
        parts.append((names[1], np.broadcast_to(first[1] + spine, core.shape), first[2] + core, s.rate2))
    tier = np.repeat(np.arange(len(parts)), [p[1].size for p in parts]).astype(np.int8)
    rate = np.repeat([p[3] for p in parts], [p[1].size for p in parts])
    lower, upper = (np.concatenate([p[i].ravel() for p in parts]).astype(np.int32) for i in (1, 2))
    router = ClosRouter(s, n, host.accelerators, host.scale_up_domain, planes, shape.cables, shape.separate, rate)
    return Topology(cluster.name, cluster.fabric.family, n, layers, tuple(p[0] for p in parts), lower, upper, tier, rate, router)


@dataclass(frozen=True)
class ClosRouter:
    """Paths of a folded Clos.

    Notes
    -----
    Ideal spraying spreads a flow evenly over all shortest paths, so that what the cables of a leaf carry up depends on their
    sum alone: the router then counts the cables of a leaf (of all planes) as one bundle, those of a group of spines as
    another. Exact while every leaf of a group reaches every spine of it; with dead cables it assumes that the network steers
    around them (adaptive routing).
    """

    sizes: Sizes
    accelerators: int
    per_host: int
    domain: int
    planes: int
    cables: int
    separate: bool
    rate: np.ndarray

    def with_rate(self, rate: np.ndarray) -> ClosRouter:
        """Return the router of the same graph at other rates."""
        return replace(self, rate=rate)

    # --- where cables are numbered ---

    @property
    def _starts(self) -> tuple[int, int, int, int]:
        """Return the first cable of each tier: scale-up, host, leaf, spine."""
        s, n = self.sizes, self.accelerators
        host = n if self.domain > 1 else 0
        leaf = host + (self.planes * self.cables * n if s.levels else 0)
        return 0, host, leaf, leaf + self.planes * s.leaves * s.up

    def part(self, kind: str) -> np.ndarray | None:
        """Return the rail or plane of every cable; spines and cores that several rails share have none."""
        s, n = self.sizes, self.accelerators
        _, host, leaf, spine = self._starts
        if (kind == "rail" and not s.rail.any()) or (kind == "plane" and self.planes == 1) or not s.levels:
            return None
        found = np.full(len(self.rate), -1)
        if kind == "plane":
            found[host:leaf] = np.repeat(np.arange(self.planes), self.cables * n)
            found[leaf:spine] = np.arange(self.planes * s.leaves).repeat(s.up) // s.leaves
            found[spine:] = np.arange(len(self.rate) - spine) // max(s.groups * s.spines * s.up2, 1)
            return found
        of_leaf = np.zeros(s.leaves, int)
        of_leaf[s.leaf] = s.rail
        found[host:leaf] = np.tile(s.rail, self.planes * self.cables)
        found[leaf:spine] = np.tile(of_leaf.repeat(s.up), self.planes)
        return found

    # --- paths ---

    def paths(self, source: np.ndarray, target: np.ndarray, routing: Routing = "sprayed", pxn: bool = True, seed: int = 0) -> Paths:
        """Return the links from each source to its target.

        Parameters
        ----------
        source, target : ndarray of int
            Accelerators.
        routing : str
            ``sprayed``, ``hashed`` (equal-cost multipath: one path per flow by a hash of its ends and `seed`) or
            ``d-mod-k`` (one path per target, as InfiniBand's fat-tree routing).
        pxn : bool
            Cross to the target's rail over the scale-up links of the source's host, as NCCL's PXN does; where rails never
            meet, always.
        """
        source, target = (np.asarray(x, dtype=np.int64) for x in (source, target))
        s, (_, host, _, _) = self.sizes, self._starts
        same = source // self.domain == target // self.domain if self.domain > 1 else source == target
        if not s.levels and not same.all():
            raise ProfileError("accelerators of different scale-up domains, and no network between them")
        relay = source
        if self.domain > 1 and (pxn or self.separate):
            cross = ~same & (s.rail[source] != s.rail[target])
            relay = np.where(cross, source // self.per_host * self.per_host + target % self.per_host, source)
        inside = same & (source != target) | (relay != source)
        out = ~same
        columns = np.full((len(source), 8), -1)
        many = len(self.rate)
        if routing == "sprayed":
            first, capacity = self._bundles()
            columns[:, 0] = np.where(inside, first["scale-up out"] + source, -1)
            columns[:, 1] = np.where(inside, first["scale-up in"] + np.where(same, target, relay), -1)
            level = self._sprayed(columns, relay, target, out, first)
            indptr, links = rows(columns)
            return Paths(indptr, links, capacity, level, tuple(first.items()))
        columns[:, 0] = np.where(inside, source, -1)
        columns[:, 1] = np.where(inside, many + np.where(same, target, relay), -1)
        level = self._single(columns, relay, target, out, host, routing, seed)
        indptr, links = rows(columns)
        return Paths(indptr, links, np.concatenate([self.rate, self.rate]), level)

    def _levels(self, relay: np.ndarray, target: np.ndarray, out: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the tier where each path turns, and whether it leaves its leaf and its group."""
        s = self.sizes
        leaves = out & (s.leaf[relay] != s.leaf[target])
        groups = leaves & (s.group[s.leaf[relay]] != s.group[s.leaf[target]])
        return np.where(out, 0, -1) + leaves + groups, leaves, groups

    def _bundles(self) -> tuple[dict[str, int], np.ndarray]:
        """Return where each kind of bundle begins, and the capacity of all."""
        s, n, (_, host, leaf, spine) = self.sizes, self.accelerators, self._starts
        up = [("scale-up", self.rate[:host]), ("NIC", self.rate[host:leaf].reshape(-1, n).sum(axis=0) if s.levels else np.empty(0))]
        if s.levels > 1:
            up.append(("leaf", self.rate[leaf:spine].reshape(self.planes, s.leaves, s.up).sum(axis=(0, 2))))
        if s.levels > 2:
            up.append(("group", self.rate[spine:].reshape(self.planes, s.groups, -1).sum(axis=(0, 2))))
        ways = {"scale-up": ("out", "in"), "NIC": ("out", "in"), "leaf": ("up", "down"), "group": ("up", "down")}
        first, parts, at = {}, [], 0
        for kind, capacity in up:
            for way in ways[kind]:
                first[f"{kind} {way}"] = at
                parts.append(capacity)
                at += len(capacity)
        return first, np.concatenate(parts)

    def _sprayed(self, columns: np.ndarray, relay: np.ndarray, target: np.ndarray, out: np.ndarray, first: dict[str, int]) -> np.ndarray:
        s = self.sizes
        level, leaves, groups = self._levels(relay, target, out)
        columns[:, 2] = np.where(out, first["NIC out"] + relay, -1)
        columns[:, 7] = np.where(out, first["NIC in"] + target, -1)
        if s.levels > 1:
            columns[:, 3] = np.where(leaves, first["leaf up"] + s.leaf[relay], -1)
            columns[:, 6] = np.where(leaves, first["leaf down"] + s.leaf[target], -1)
        if s.levels > 2:
            columns[:, 4] = np.where(groups, first["group up"] + s.group[s.leaf[relay]], -1)
            columns[:, 5] = np.where(groups, first["group down"] + s.group[s.leaf[target]], -1)
        return level

    def _single(
        self, columns: np.ndarray, relay: np.ndarray, target: np.ndarray, out: np.ndarray, host: int, routing: Routing, seed: int
    ) -> np.ndarray:
        """Fill in one path per flow; a flow whose path has a dead cable draws again."""
        level, leaves, groups = self._levels(relay, target, out)
        todo, many = np.flatnonzero(out), len(self.rate)
        for draw in range(_REDRAWS):
            if not len(todo):
                return level
            choice = self._hashes(relay[todo], target[todo], seed, draw) if routing == "hashed" else self._digits(target[todo], draw)
            columns[todo, 2:] = self._chosen(relay[todo], target[todo], leaves[todo], groups[todo], choice)
            cables = columns[todo, 2:] % many
            todo = todo[((columns[todo, 2:] >= 0) & (self.rate[cables] == 0)).any(axis=1)]
        if len(todo):
            raise ProfileError(
                f"no live path from accelerator {relay[todo[0]]} to {target[todo[0]]} in {_REDRAWS} draws; "
                f"{len(todo)} flows are cut off: restore a link, or leave the host out"
            )
        return level

    def _hashes(self, relay: np.ndarray, target: np.ndarray, seed: int, draw: int) -> list[np.ndarray]:
        bits = mixed(relay, target, seed, draw)
        return [mixed(bits, stage) for stage in range(7)]

    def _digits(self, target: np.ndarray, draw: int) -> list[np.ndarray]:
        """Return the choices of D-mod-k: digits of the target's place in the order of leaves; `draw` steps past dead cables."""
        s = self.sizes
        place = np.empty(self.accelerators, dtype=np.int64)
        order = np.argsort(s.leaf, kind="stable")
        start = np.searchsorted(s.leaf[order], np.arange(s.leaves))
        size = int(np.bincount(s.leaf).max())
        place[order] = s.leaf[order] * size + np.arange(self.accelerators) - start[s.leaf[order]]
        d = (place[target] + draw).astype(np.uint64)
        up, up2 = np.uint64(max(s.up, 1)), np.uint64(max(s.up2, 1))
        high, low = d // up, d // (up * up2)
        sets = np.uint64(max(s.sets, 1))
        # plane, leaf up, spine up, spine down to, core down, leaf down, cable of a port: the way down mirrors the way up
        return [
            d % np.uint64(self.planes),
            d,
            high,
            (d % np.uint64(max(s.spines, 1))) // sets,
            high % up2 // np.uint64(max(s.cores, 1)),
            d % up // np.uint64(max(s.spines, 1)),
            low,
        ]

    def _chosen(
        self, relay: np.ndarray, target: np.ndarray, leaves: np.ndarray, groups: np.ndarray, choice: list[np.ndarray]
    ) -> np.ndarray:
        """Return the links beyond the scale-up domain, shape (flows, 6), for one draw of choices."""
        s, n, many, (_, host, leaf, spine) = self.sizes, self.accelerators, len(self.rate), self._starts
        plane = modulo(choice[0], self.planes)
        port = plane * self.cables + modulo(choice[6], self.cables)
        links = np.full((len(relay), 6), -1)
        links[:, 0] = host + port * n + relay
        links[:, 5] = many + host + port * n + target
        if s.levels < 2:
            return links
        up = modulo(choice[1], s.up)
        through = up % s.spines
        links[:, 1] = np.where(leaves, leaf + (plane * s.leaves + s.leaf[relay]) * s.up + up, -1)
        if s.levels > 2:
            up2 = modulo(choice[2], s.up2)
            back = through % s.sets + s.sets * modulo(choice[3], s.spines // s.sets)
            down2 = up2 % s.cores + s.cores * modulo(choice[4], s.up2 // s.cores)
            here, there = (((plane * s.groups + s.group[s.leaf[x]]) * s.spines) for x in (relay, target))
            links[:, 2] = np.where(groups, spine + (here + through) * s.up2 + up2, -1)
            links[:, 3] = np.where(groups, many + spine + (there + back) * s.up2 + down2, -1)
            through = np.where(groups, back, through)
        down = through + s.spines * modulo(choice[5], s.up // s.spines)
        links[:, 4] = np.where(leaves, many + leaf + (plane * s.leaves + s.leaf[target]) * s.up + down, -1)
        return links

    # --- figures ---

    def bisection_bytes_per_s(self) -> float:
        """Return the smallest cut between the first and the second half of the hosts, bytes/s.

        Notes
        -----
        The bundles form a tree, whose smallest cut is found side by side from the leaves up: a switch costs what hangs on
        the other side, or its cables up. Without oversubscription ``accelerators / 2 * NIC``.
        """
        s, n = self.sizes, self.accelerators
        if not s.levels:
            return 0.0
        first, capacity = self._bundles()
        hosts = -(-n // self.per_host)
        second = np.arange(n) // self.per_host >= hosts // 2
        nic = capacity[first["NIC out"] : first["NIC out"] + n]
        cost = np.array([np.bincount(s.leaf, weights=nic * side, minlength=s.leaves) for side in (second, ~second)])
        stages = [("leaf", s.group, s.groups)]
        if s.levels > 2:
            stages.append(("group", s.component, int(s.component.max()) + 1))
        for kind, parent, count in stages if s.levels > 1 else []:
            at = first[f"{kind} up"]
            up = capacity[at : at + cost.shape[1]]
            cost = np.minimum(cost, cost[::-1] + up)
            cost = np.array([np.bincount(parent, weights=row, minlength=count) for row in cost])
        return float(cost.min(axis=0).sum())

    def diameter(self) -> int:
        """Return the most cables on a shortest path: ``2 levels``, and two more inside the host where rails never meet."""
        s = self.sizes
        if self.accelerators <= self.domain:
            return 2
        return 2 * s.levels + (2 if self.separate and s.rail.any() else 0)
