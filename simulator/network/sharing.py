"""What a collective keeps of its NICs when all of its groups communicate at once, by max-min sharing on the cluster's graph.

A pattern is solved once and remembered with its topology. On regular fabrics the answer is the closed form of
`simulator.network.collectives`, which knows tiers only; the graph also knows rails, hashing, faults and placement by hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from simulator.network.build import topology
from simulator.network.flows import fair_rates, flow_times
from simulator.network.paths import Paths
from simulator.network.topology import Topology
from simulator.scenario.cluster import Cluster
from simulator.scenario.mesh import accelerator_of, members
from simulator.scenario.plan import INTERLEAVED, Plan

#: who sends to whom in a group: the next domain; everyone in other domains; the same place in every other domain; the next stage
Traffic = Literal["ring", "all_to_all", "rail_all_to_all", "neighbours"]

#: links that a report names
_HOTTEST = 8
#: the last topologies in use, with what was solved on them
_KNOWN: list[tuple[Cluster, Topology, dict]] = []
_KEEP = 16


@dataclass(frozen=True, slots=True)
class Share:
    """What the slowest member of a pattern keeps.

    Parameters
    ----------
    rate : float
        Share of its NIC's rate, 0 to 1, when every group communicates at once.
    alone : float
        The same for the slowest group with the network for itself.
    flows : int
        Between scale-up domains.
    level : int
        Highest tier of switches on a path.
    hottest : tuple of (str, float)
        Links and the share of their capacity in use, hottest first, NICs aside.
    """

    rate: float
    alone: float
    flows: int
    level: int
    hottest: tuple[tuple[str, float], ...]

    @property
    def slowdown(self) -> float:
        """How many times as long the collective takes as alone."""
        return self.alone / self.rate


@dataclass(frozen=True)
class Flows:
    """Who sends to whom; arrays with one entry per flow, all of the same size.

    Parameters
    ----------
    source, target : ndarray of int
        Accelerators in different scale-up domains.
    group : ndarray of int
        Which group of ranks a flow belongs to.
    """

    source: np.ndarray
    target: np.ndarray
    group: np.ndarray


def known(cluster: Cluster) -> tuple[Topology, dict]:
    """Return the topology of `cluster` and what was solved on it, built at the first call."""
    parts = ("fabric", "host", "accelerators", "degraded")
    for i, (other, built, solved) in enumerate(_KNOWN):
        if other is cluster or all(getattr(other, p) == getattr(cluster, p) for p in parts):
            _KNOWN.append(_KNOWN.pop(i))
            return built, solved
    built = topology(cluster)
    _KNOWN.append((cluster, built, {}))
    del _KNOWN[:-_KEEP]
    return built, _KNOWN[-1][2]


def traffic_of(kind: str, axis: str, plan: Plan) -> Traffic:
    """Return who sends to whom in a collective of `kind` over the groups of `axis`."""
    if kind == "all_to_all":
        return "rail_all_to_all" if axis == "ep" and plan.fans_out else "all_to_all"
    return "neighbours" if kind == "send" else "ring"


def flows(plan: Plan, cluster: Cluster, axis: str, traffic: Traffic) -> Flows:
    """Return every flow between scale-up domains when all groups of `axis` communicate at once."""
    where, domain = accelerator_of(plan, cluster.host.accelerators), cluster.host.scale_up_domain
    number = members(plan, axis)
    places = where[np.argsort(number, kind="stable")].reshape(int(number.max()) + 1, -1)
    if traffic == "neighbours":
        turns = plan.schedule in INTERLEAVED
        source = places if turns else places[:, :-1]
        target = np.roll(places, -1, axis=1) if turns else places[:, 1:]
    else:
        places = np.sort(places, axis=1)
        together = _together(places // domain)
        if traffic == "ring":
            source, target = places, np.roll(places, -together, axis=1)
        else:
            step = together if traffic == "rail_all_to_all" else 1
            shifts = np.arange(step, places.shape[1], step)
            at = (np.arange(places.shape[1])[:, None] + shifts) % places.shape[1]
            source = np.broadcast_to(places[:, :, None], (*places.shape, len(shifts)))
            target = places[:, at]
    group = np.broadcast_to(np.arange(len(source)).reshape(-1, *[1] * (source.ndim - 1)), source.shape)
    source, target, group = source.ravel(), target.ravel(), group.ravel()
    out = source // domain != target // domain
    return Flows(source[out], target[out], group[out])


def _together(domain: np.ndarray) -> int:
    """Return the fewest members of a group in one domain; rows of `domain` are sorted."""
    starts = np.ones(domain.shape, dtype=bool)
    starts[:, 1:] = domain[:, 1:] != domain[:, :-1]
    return int(np.diff(np.append(np.flatnonzero(starts.ravel()), domain.size)).min())


def share(plan: Plan, cluster: Cluster, axis: str, kind: str) -> Share | None:
    """Return what all groups of `axis` keep of their NICs while each runs a collective of `kind`; None without a network.

    Parameters
    ----------
    plan, cluster
        Degrees and placement; wiring, routing and faults.
    axis : str
        As in `simulator.scenario.mesh.group`.
    kind : str
        As in `simulator.workload.ops.Op`.
    """
    built, solved = known(cluster)
    traffic = traffic_of(kind, axis, plan)
    key = (_degrees(plan), axis, traffic, plan.pxn)
    if key not in solved:
        solved[key] = _solve(built, cluster, flows(plan, cluster, axis, traffic), traffic, plan.pxn)
    return solved[key]


def _degrees(plan: Plan) -> tuple:
    schedule = plan.schedule in INTERLEAVED
    return plan.tp, plan.cp, plan.pp, plan.dp_replicate, plan.dp_shard, plan.ep, plan.etp, schedule, plan.placement


def _solve(built: Topology, cluster: Cluster, sent: Flows, traffic: Traffic, pxn: bool) -> Share | None:
    if not len(sent.source):
        return None
    paths = route(built, cluster, sent, pxn and "all_to_all" in traffic)
    nic = cluster.host.nic_bytes_per_s
    rate, load = _kept(paths, sent, traffic, nic)
    one = _slowest_group(paths, sent, traffic, nic)
    hot = np.argsort(-load, kind="stable")[:_HOTTEST]
    names = tuple((paths.name(int(link), built.link_names), float(load[link])) for link in hot if load[link] > 0)
    return Share(rate, max(one, rate), len(sent.source), int(paths.level.max()), names)


def route(built: Topology, cluster: Cluster, sent: Flows, pxn: bool) -> Paths:
    """Return the paths of flows by the fabric's routing."""
    return built.router.paths(sent.source, sent.target, cluster.fabric.routing, pxn=pxn, seed=0)


def _kept(paths: Paths, sent: Flows, traffic: Traffic, nic: float) -> tuple[float, np.ndarray]:
    """Return the share of its NIC that the slowest sender keeps, and the load of every link.

    Notes
    -----
    A ring or a pipeline goes at the rate of its slowest flow. An all-to-all ends when its last flow does, so that the others
    may speed up on the way: what a sender has to send over the time of the last flow.
    """
    if "all_to_all" not in traffic:
        rates = fair_rates(paths.indptr, paths.links, paths.capacity)
        load = np.bincount(paths.links, np.repeat(rates, paths.hops()), len(paths.capacity))
        return float(rates.reshape(-1, paths.parts).sum(axis=1).min() / nic), _over(load, paths.capacity)
    each = np.bincount(sent.source).max()
    times = flow_times(paths.indptr, paths.links, paths.capacity, np.full(len(paths), nic / paths.parts))
    return float(each / times.makespan_s), times.utilisation


def _over(load: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    return np.divide(load, capacity, out=np.zeros_like(capacity), where=capacity > 0)


def _slowest_group(paths: Paths, sent: Flows, traffic: Traffic, nic: float) -> float:
    """Return what the first group keeps with the network for itself."""
    mine = np.flatnonzero(sent.group == sent.group[0])
    rows = (mine[:, None] * paths.parts + np.arange(paths.parts)).ravel()
    indptr = np.concatenate([[0], np.cumsum(paths.hops()[rows])])
    links = np.concatenate([paths.links[paths.indptr[f] : paths.indptr[f + 1]] for f in rows])
    one = Paths(indptr, links, paths.capacity, paths.level[rows], paths.bundles, paths.parts)
    return _kept(one, Flows(sent.source[mine], sent.target[mine], sent.group[mine]), traffic, nic)[0]


def together(cluster: Cluster, patterns: Iterable[tuple[Plan, str, str]]) -> tuple[float, ...]:
    """Return the factor by which each pattern slows while all of them run at once; 1 is no contention.

    Kinds share a NIC evenly, however many peers each talks to: a sender sends to one peer of a kind at a time, in turn.

    Parameters
    ----------
    patterns : iterable of (plan, axis, kind)
        Such as all expert groups beside data parallelism, ``(plan, "ep", "all_to_all"), (plan, "edp", "reduce_scatter")``, or
        the plans of several jobs, each on hosts of its own.
    """
    patterns = tuple(patterns)
    built, solved = known(cluster)
    key = tuple((_degrees(plan), axis, traffic_of(kind, axis, plan), plan.pxn) for plan, axis, kind in patterns)
    if key not in solved:
        solved[key] = _together_factors(built, cluster, patterns)
    return solved[key]


def _together_factors(built: Topology, cluster: Cluster, patterns: tuple[tuple[Plan, str, str], ...]) -> tuple[float, ...]:
    kinds = [traffic_of(kind, axis, plan) for plan, axis, kind in patterns]
    sent = [flows(plan, cluster, axis, traffic) for (plan, axis, _), traffic in zip(patterns, kinds, strict=True)]
    pxn = [plan.pxn and "all_to_all" in t for (plan, *_), t in zip(patterns, kinds, strict=True)]
    paths = [route(built, cluster, s, p) for s, p in zip(sent, pxn, strict=True)]
    shift = np.concatenate([[0], np.cumsum([len(p.links) for p in paths])])
    indptr = np.concatenate([p.indptr[:-1] + at for p, at in zip(paths, shift, strict=False)] + [shift[-1:]])
    turns = [np.repeat(1 / np.bincount(s.source)[s.source], p.parts) / p.parts for s, p in zip(sent, paths, strict=True)]
    rates = fair_rates(indptr, np.concatenate([p.links for p in paths]), paths[0].capacity, np.concatenate(turns))
    ends = np.cumsum([len(p) for p in paths])
    factors = []
    for p, turn, end in zip(paths, turns, ends, strict=True):
        alone = fair_rates(p.indptr, p.links, p.capacity, turn)
        factors.append(float(alone.min() / rates[end - len(p) : end].min()) if len(p) else 1.0)
    return tuple(factors)
