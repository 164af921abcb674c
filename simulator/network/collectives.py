"""Time of collectives by alpha and beta over the hierarchy: scale-up domain, leaf, spine, core.

Notes
-----
Bandwidth: a group with g members in each scale-up domain enters and leaves a domain through g NICs, so the ring's bus
bandwidth between domains is ``g * NIC``, and never above the scale-up links'. A tier that is oversubscribed r to 1
carries, of every group at once, the traffic that leaves its blocks: of a ring its bus bandwidth, the NICs of one domain
in each block; of an all-to-all the share of the NICs' traffic that is for members outside the block; of a pipeline the
last `stride` ranks of the block, who send to the next one.

Latency: NCCL's tuning model, the cheapest of its protocols: LL (half the bandwidth), LL128 (120/128) and Simple.

References
----------
NVIDIA, NCCL 2.30, ``src/graph/tuning.cc``: base and hop latencies, protocol efficiencies, ring and tree steps.
Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH", 2005: step counts.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from simulator.scenario.cluster import Cluster
from simulator.scenario.measured import CollectiveCost
from simulator.scenario.mesh import Group
from simulator.units import Number


def crossings(group: Group, cluster: Cluster) -> tuple[Number, Number]:
    """Return the members of `group` in one scale-up domain, and the number of domains it spans."""
    inside = group.within(cluster.host.scale_up_domain)
    return inside, np.ceil(group.size / inside)


def _tier_rate(group: Group, cluster: Cluster, traffic: Literal["ring", "all_to_all", "neighbours"]) -> Number:
    """Return the NIC rate that one member keeps when every group of this kind communicates at once, bytes/s."""
    rate = cluster.host.nic_bytes_per_s * cluster.fabric.efficiency * np.ones_like(np.asarray(group.size, dtype=float))
    if group.share is not None:
        return rate * group.share
    line, down, inside = rate, 1.0, group.within(cluster.host.scale_up_domain)
    for tier in cluster.fabric.tiers[:-1]:
        down = down * tier.oversubscription
        if down == 1.0:
            continue
        block = group.within(tier.accelerators)
        leaving = {
            "ring": inside / block,
            "all_to_all": (group.size - block) / np.maximum(group.size - inside, 1),
            "neighbours": np.minimum(group.stride / tier.accelerators, 1.0),
        }[traffic]
        crosses = group.size > block
        rate = np.where(crosses, np.minimum(rate, line / np.maximum(down * leaving, 1e-12)), rate)
    return rate


def latency_s(group: Group, cluster: Cluster) -> Number:
    """Return the one-way latency between two members of `group` that are farthest apart, seconds."""
    inside, domains = crossings(group, cluster)
    host = np.where(np.asarray(group.size) > 1, cluster.host.hop_latency_s.ll, 0.0)
    far = np.zeros_like(host)
    for tier in reversed(cluster.fabric.tiers):
        far = np.where(group.within(tier.accelerators) >= group.size, tier.latency_s, far)
    far = np.where(far == 0.0, cluster.fabric.tiers[-1].latency_s, far)
    return np.where(domains > 1, far, host)


def _ring(steps_factor: int, collective: str, size: Number, group: Group, cluster: Cluster) -> Number:
    n = np.asarray(group.size, dtype=float)
    inside, domains = crossings(group, cluster)
    bus = np.asarray(cluster.host.bus_bytes_per_s[collective])
    bus = np.where(domains > 1, np.minimum(bus, inside * _tier_rate(group, cluster, "ring")), bus)
    moved = steps_factor * (n - 1) / n * size
    inter = steps_factor * (domains - 1)
    intra = steps_factor * (n - 1) - inter
    best = np.full(np.broadcast(moved, n).shape, np.inf)
    for protocol, share in cluster.host.protocol_share.items():
        hop, net = (getattr(x, protocol) for x in (cluster.host.hop_latency_s, cluster.fabric.hop_latency_s))
        best = np.minimum(best, getattr(cluster.host.base_latency_s, protocol) + intra * hop + inter * net + moved / (bus * share))
    return best


def _tree(size: Number, group: Group, cluster: Cluster) -> Number:
    """Double binary tree all-reduce: chain inside a domain, tree between domains."""
    n = np.asarray(group.size, dtype=float)
    inside, domains = crossings(group, cluster)
    bus = np.asarray(cluster.host.bus_bytes_per_s["all_reduce"])
    bus = np.where(domains > 1, np.minimum(bus, inside * _tier_rate(group, cluster, "ring")), bus) * cluster.host.tree_share
    moved = 2 * (n - 1) / n * size
    best = np.full(np.broadcast(moved, n).shape, np.inf)
    for protocol, share in cluster.host.protocol_share.items():
        hop, net = (getattr(x, protocol) for x in (cluster.host.hop_latency_s, cluster.fabric.hop_latency_s))
        latency = getattr(cluster.host.base_latency_s, protocol) + 2 * ((inside - 1) * hop + np.log2(domains) * net)
        best = np.minimum(best, latency + moved / (bus * share))
    return best


def all_gather_s(size: Number, group: Group, cluster: Cluster) -> Number:
    """Return seconds of a ring all-gather whose gathered buffer has `size` bytes; 0 for one rank.

    Notes
    -----
    ``base + (n - 1) hops + (n - 1)/n size / bus``.
    """
    return _for_many(group, _ring(1, "all_gather", size, group, cluster))


def reduce_scatter_s(size: Number, group: Group, cluster: Cluster) -> Number:
    """Return seconds of a ring reduce-scatter of a buffer of `size` bytes; 0 for one rank."""
    return _for_many(group, _ring(1, "reduce_scatter", size, group, cluster))


def all_reduce_s(size: Number, group: Group, cluster: Cluster) -> Number:
    """Return seconds of an all-reduce of `size` bytes, the faster of ring and double binary tree; 0 for one rank.

    Notes
    -----
    Ring ``2 (n - 1)`` hops, tree ``2 (g - 1 + log2 N)``; both move ``2 (n - 1)/n size``. In-network reduction
    (NVLS) is in the measured bus bandwidth of the scale-up domain; SHARP between domains is not modelled.
    """
    return _for_many(group, np.minimum(_ring(2, "all_reduce", size, group, cluster), _tree(size, group, cluster)))


def expert_all_to_all_s(size: Number, group: Group, cluster: Cluster, out: Number, fan: Number) -> Number:
    """Return seconds of a dispatch or combine; 0 for one rank.

    Parameters
    ----------
    size : Number
        Bytes of one copy of all local tokens.
    group : Group
        The expert-parallel group.
    out, fan : Number
        Copies of each token that leave over the NIC, and that travel over the scale-up links.

    Notes
    -----
    Scale-up and scale-out carry their shares at the same time, the slower one decides. Balanced: every rank receives
    what it sends.
    """
    _, domains = crossings(group, cluster)
    nic = _tier_rate(group, cluster, "all_to_all")
    hop = np.where(domains > 1, cluster.fabric.hop_latency_s.ll + latency_s(group, cluster), cluster.host.hop_latency_s.ll)
    seconds = cluster.host.base_latency_s.ll + hop + np.maximum(size * out / nic, size * fan / cluster.host.bus_bytes_per_s["all_to_all"])
    return _for_many(group, seconds)


def send_s(size: Number, pipeline: Group, cluster: Cluster) -> Number:
    """Return seconds of a message between neighbours of a pipeline, over the slowest of its hops."""
    _, domains = crossings(pipeline, cluster)
    rate = np.where(domains > 1, _tier_rate(pipeline, cluster, "neighbours"), cluster.host.bus_bytes_per_s["send"])
    return latency_s(pipeline, cluster) + size / rate


def measured_s(size: Number, cost: CollectiveCost) -> Number:
    """Return seconds of a collective of `size` bytes whose cost was measured on this machine."""
    if cost.knee_bytes is None or cost.beyond_bytes_per_s is None:
        return cost.latency_s + size / cost.bytes_per_s
    within = np.minimum(size, cost.knee_bytes)
    return cost.latency_s + within / cost.bytes_per_s + (size - within) / cost.beyond_bytes_per_s


def _for_many(group: Group, seconds: Number) -> Number:
    return np.where(np.asarray(group.size) > 1, seconds, 0.0)
