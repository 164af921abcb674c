"""Networks without a root: dragonfly, dragonfly+, Slim Fly, and the three-dimensional torus of TPU pods.

Routes are minimal: detours by load or by chance (UGAL, Valiant), which such networks rely on, are not modelled, so that many
flows between two groups look slower than they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simulator.errors import ProfileError
from simulator.network.table_router import TableRouter
from simulator.network.topology import Topology
from simulator.scenario.cluster import Cluster
from simulator.scenario.wiring import Dragonfly, SlimFly, Torus

#: tier of cables: name, lower ends, upper ends, bytes/s of each
Cables = tuple[str, np.ndarray, np.ndarray, float | np.ndarray]


def assembled(
    cluster: Cluster,
    layers: dict[str, int],
    cables: Sequence[Cables],
    cut: float | None,
    longest: int | None,
    passive: dict[str, int] | None = None,
) -> Topology:
    """Return a topology with scale-up domains, whose switches follow the accelerators, and the given tiers of cables."""
    n, domain = cluster.accelerators, cluster.host.scale_up_domain
    a = np.arange(n)
    inside = [("scale-up", a, n + a // domain, cluster.host.scale_up_bytes_per_s)] if "scale-up" in layers else []
    parts = [*inside, *cables]
    sizes = [p[1].size for p in parts]
    lower, upper = (np.concatenate([p[i].ravel() for p in parts]).astype(np.int32) for i in (1, 2))
    rate = np.concatenate([np.broadcast_to(np.asarray(p[3], dtype=float), size) for p, size in zip(parts, sizes, strict=True)])
    tier = np.repeat(np.arange(len(parts)), sizes).astype(np.int8)
    router = TableRouter(n, n + sum(layers.values()), lower, upper, rate, n if inside else 0, domain, cut, longest)
    tiers = tuple(p[0] for p in parts)
    return Topology(cluster.name, cluster.fabric.family, n, layers, tiers, lower, upper, tier, rate, router, passive or {})


def scale_up(cluster: Cluster) -> dict[str, int]:
    """Return the layer of scale-up switches, where accelerators share a domain."""
    domain = cluster.host.scale_up_domain
    return {"scale-up": -(-cluster.accelerators // domain)} if domain > 1 else {}


def dragonfly(cluster: Cluster) -> Topology:
    """Return a dragonfly, or a dragonfly+ when its groups have spines.

    Notes
    -----
    Every group has a link to every other one as often as its global ports allow, the rest of the ports go to the next groups.
    Bisection: the links between two halves of the groups, or half of the NICs.

    References
    ----------
    Kim, Dally, Scott, Abts, "Technology-Driven, Highly-Scalable Dragonfly Topology", ISCA 2008.
    Shpiner et al., "Dragonfly+: Low Cost Topology for Scaling Datacenters", HiPINEB 2017.
    """
    s: Dragonfly = cluster.fabric.shape
    n, nic = cluster.accelerators, cluster.host.nic_bytes_per_s
    groups = -(-n // (s.endpoints * s.routers))
    each = s.spines or s.routers  # switches of a group that have global links
    ports = each * s.global_links
    if groups - 1 > ports:
        raise ProfileError(f"{cluster.fabric.name}: {groups} groups need {groups - 1} global links each, a group has {ports}")
    layers = scale_up(cluster) | {"router": groups * s.routers} | ({"spine": groups * s.spines} if s.spines else {})
    first = n + layers.get("scale-up", 0)
    second = first + groups * s.routers
    a = np.arange(n)
    cables: list[Cables] = [("host", a, first + a // s.endpoints, nic)]
    group = np.arange(groups)[:, None]
    if s.spines:
        leaf, spine = (x.ravel() for x in np.meshgrid(np.arange(s.routers), np.arange(s.spines), indexing="ij"))
        cables.append(("router", first + group * s.routers + leaf, second + group * s.spines + spine, nic))
    else:
        one, other = np.triu_indices(s.routers, 1)
        cables.append(("router", first + group * s.routers + one, first + group * s.routers + other, nic))
    start = second if s.spines else first
    lower, upper = _global_links(groups, ports)
    if groups > 1:
        ends = [start + g * each + port // s.global_links for g, port in (lower, upper)]
        cables.append(("global", *ends, nic))
    half = groups // 2
    across = int(((lower[0] < half) != (upper[0] < half)).sum())
    cut = min(n / 2, across) * nic if groups > 1 and groups % 2 == 0 else n / 2 * nic if groups == 1 else across * nic
    inside = 2 if s.spines else 1
    longest = 2 + (inside if groups == 1 and s.routers > 1 else 0) + (1 + 2 * (1 if s.spines else 1) if groups > 1 else 0)
    return assembled(cluster, layers, cables, float(cut), longest)


def _global_links(groups: int, ports: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Return both ends, as (group, port of the group), of every link between groups."""
    if groups == 1:
        none = np.empty(0, dtype=np.int64)
        return (none, none), (none, none)
    times, rest = divmod(ports, groups - 1)
    group, port = (x.ravel() for x in np.meshgrid(np.arange(groups), np.arange(times * (groups - 1)), indexing="ij"))
    distance, copy = port % (groups - 1) + 1, port // (groups - 1)
    other, back = (group + distance) % groups, copy * (groups - 1) + groups - distance - 1
    once = group < other
    ends = [(group[once], port[once])], [(other[once], back[once])]
    g = np.arange(groups)
    for extra in range(rest // 2):
        port = times * (groups - 1) + 2 * extra
        ends[0].append((g, np.full(groups, port)))
        ends[1].append(((g + extra % (groups - 1) + 1) % groups, np.full(groups, port + 1)))
    return tuple((np.concatenate([e[0] for e in side]), np.concatenate([e[1] for e in side])) for side in ends)


def slim_fly(cluster: Cluster) -> Topology:
    """Return a Slim Fly on the McKay-Miller-Siran graph of a prime q.

    Notes
    -----
    Routers (0, x, y) and (1, m, c): (0, x, y) joins (0, x, y') where y - y' is in X, (1, m, c) joins (1, m, c') where c - c' is in
    X', and (0, x, y) joins (1, m, c) where y = m x + c, all modulo q. Degree (3 q - d) / 2, diameter 2 between routers.

    References
    ----------
    Besta, Hoefler, "Slim Fly: A Cost Effective Low-Diameter Network Topology", SC 2014, section II.
    """
    s: SlimFly = cluster.fabric.shape
    q, n, nic = s.q, cluster.accelerators, cluster.host.nic_bytes_per_s
    own, others = _generators(q, cluster.fabric.name)
    routers = 2 * q * q
    if n > routers * s.endpoints:
        raise ProfileError(f"{cluster.fabric.name}: {routers} routers of {s.endpoints} reach {routers * s.endpoints} of {n} accelerators")
    layers = scale_up(cluster) | {"router": routers}
    first = n + layers.get("scale-up", 0)
    x, y = (v.ravel() for v in np.meshgrid(np.arange(q), np.arange(q), indexing="ij"))
    pairs = []
    for half, steps in ((0, own), (1, others)):
        for step in steps:
            here, there = half * q * q + x * q + y, half * q * q + x * q + (y + step) % q
            pairs.append(np.stack([here, there])[:, here < there])
    pairs += [np.stack([x * q + y, q * q + m * q + (y - m * x) % q]) for m in range(q)]
    links = np.unique(np.concatenate(pairs, axis=1), axis=1)
    each = -(-n // routers)  # spread over all routers
    a = np.arange(n)
    where = a // each
    cables = [("host", a, first + where, nic), ("router", first + links[0], first + links[1], nic)]
    return assembled(cluster, layers, cables, None, 4)


def _generators(q: int, name: str) -> tuple[list[int], list[int]]:
    """Return the sets X and X' of the field of `q` elements."""
    prime = q > 2 and all(q % d for d in range(2, int(q**0.5) + 1))
    if not prime:
        near = [p for p in range(3, 2 * q + 3) if all(p % d for d in range(2, int(p**0.5) + 1))]
        raise ProfileError(
            f"{name}: q = {q} is not an odd prime; use {max([p for p in near if p < q], default=3)} or {min(p for p in near if p > q)}"
        )
    root = next(g for g in range(2, q) if len({pow(g, k, q) for k in range(q - 1)}) == q - 1) if q > 3 else 2
    power = [pow(root, k, q) for k in range(q - 1)]
    if q % 4 == 1:
        return power[0::2], power[1::2]
    w = (q + 1) // 4
    own = [power[k] for k in range(0, 2 * w - 1, 2)] + [power[k] for k in range(2 * w - 1, 4 * w - 2, 2)]
    others = [power[k] for k in range(1, 2 * w, 2)] + [power[k % (q - 1)] for k in range(2 * w, 4 * w - 1, 2)]
    return own, others


def torus(cluster: Cluster) -> Topology:
    """Return a torus of accelerators; links that leave a cube, or close a ring, pass an optical switch.

    Notes
    -----
    Opposite faces of a cube at the same place share one optical switch: ``3 cube^2`` of them. Bisection: across the longest
    dimension, ``2 N / longest`` links; diameter: the halves of the dimensions.

    References
    ----------
    Jouppi et al., "TPU v4", ISCA 2023, sections 2 and 3.
    """
    s: Torus = cluster.fabric.shape
    sides = tuple(sorted((s.x, s.y, s.z), reverse=True))  # the longest counts slowest, so that halves lie across it
    n = int(np.prod(sides))
    if n != cluster.accelerators:
        raise ProfileError(f"{cluster.fabric.name}: {s.x} x {s.y} x {s.z} = {n} accelerators, the cluster has {cluster.accelerators}")
    if any(side % s.cube for side in sides):
        raise ProfileError(f"{cluster.fabric.name}: {s.x} x {s.y} x {s.z} is not made of cubes of {s.cube}; use multiples")
    a, strides = np.arange(n), (sides[1] * sides[2], sides[2], 1)
    electrical, optical = [], []
    for side, stride in zip(sides, strides, strict=True):
        at = a // stride % side
        far = a + np.where(at == side - 1, -(side - 1) * stride, stride)
        leaves = (at % s.cube == s.cube - 1) & (far != a)
        electrical.append(np.stack([a, far])[:, ~leaves & (far != a)])
        optical.append(np.stack([a, far])[:, leaves])
    wired, switched = (np.concatenate(x, axis=1) for x in (electrical, optical))
    cables = [("electrical", wired[0], wired[1], s.link_bytes_per_s), ("optical", switched[0], switched[1], s.link_bytes_per_s)]
    cut = (2 if sides[0] > 2 else 1) * n / sides[0] * s.link_bytes_per_s
    return assembled(cluster, {}, cables, float(cut), sum(side // 2 for side in sides), {"optical circuit switches": 3 * s.cube**2})
