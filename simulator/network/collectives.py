"""Time of collectives by alpha and beta over the hierarchy: scale-up domain, leaf, spine, core.

Notes
-----
Bandwidth: a group with g members in each scale-up domain enters and leaves a domain through g NICs, so the ring's bus
bandwidth between domains is ``g * NIC``, and never above the scale-up links'. A tier that is oversubscribed r to 1
carries, of every group at once, the traffic that leaves its blocks: of a ring its bus bandwidth, the NICs of one domain
in each block; of an all-to-all the share of the NICs' traffic that is for members outside the block; of a pipeline the
last `stride` ranks of the block, who send to the next one.

Algorithms and protocols: `simulator.network.algorithms`; the cheapest, or a forced one.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from simulator.network.algorithms import Algorithm, Protocol, Reach, cheapest, filled_s
from simulator.scenario.cluster import Cluster, Host
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


def _linked(inside: Number, host: Host) -> Number:
    """Return the share of an accelerator's links that lead to the `inside` members of its domain."""
    return np.maximum(np.asarray(inside) - 1, 1) / (host.scale_up_domain - 1) if host.mesh and host.scale_up_domain > 1 else 1.0


def reach(group: Group, cluster: Cluster, collective: Literal["all_reduce", "all_gather", "reduce_scatter"]) -> Reach:
    """Return what `group` has for a collective when every group like it communicates at once."""
    host, fabric = cluster.host, cluster.fabric
    inside, domains = crossings(group, cluster)
    return Reach(
        ranks=group.size,
        inside=inside,
        domains=domains,
        bus_bytes_per_s=host.bus_bytes_per_s[collective] * _linked(inside, host),
        reduce_bytes_per_s=(host.reduction_share or 0.0) * host.scale_up_bytes_per_s,
        nic_bytes_per_s=_tier_rate(group, cluster, "ring"),
        tree_share=host.tree_share,
        start=host.base_latency_s,
        hop=host.hop_latency_s,
        net_hop=fabric.hop_latency_s,
        share=host.protocol_share,
        fill_s=host.fill_s or 0.0,
        net_fill_s=fabric.fill_s or 0.0,
        reduce_channels=host.reduction_channels or 0,
    )


def all_gather_s(
    size: Number, group: Group, cluster: Cluster, algorithm: Algorithm | None = None, protocol: Protocol | None = None
) -> Number:
    """Return seconds of an all-gather whose gathered buffer has `size` bytes; 0 for one rank.

    Parameters
    ----------
    algorithm, protocol : str, optional
        Forced ones, as `simulator.network.algorithms` names them; the default is the cheapest that NCCL would weigh.
    """
    return _for_many(group, cheapest("gather", size, reach(group, cluster, "all_gather"), algorithm, protocol))


def reduce_scatter_s(
    size: Number, group: Group, cluster: Cluster, algorithm: Algorithm | None = None, protocol: Protocol | None = None
) -> Number:
    """Return seconds of a reduce-scatter of a buffer of `size` bytes; 0 for one rank. Parameters as of `all_gather_s`."""
    return _for_many(group, cheapest("gather", size, reach(group, cluster, "reduce_scatter"), algorithm, protocol))


def all_reduce_s(
    size: Number, group: Group, cluster: Cluster, algorithm: Algorithm | None = None, protocol: Protocol | None = None
) -> Number:
    """Return seconds of an all-reduce of `size` bytes; 0 for one rank. Parameters as of `all_gather_s`."""
    return _for_many(group, cheapest("all_reduce", size, reach(group, cluster, "all_reduce"), algorithm, protocol))


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
    inside, domains = crossings(group, cluster)
    nic = _tier_rate(group, cluster, "all_to_all")
    hop = np.where(domains > 1, cluster.fabric.hop_latency_s.ll + latency_s(group, cluster), cluster.host.hop_latency_s.ll)
    inside_s = filled_s(
        size * fan / (cluster.host.bus_bytes_per_s["all_to_all"] * _linked(inside, cluster.host)), cluster.host.fill_s or 0.0
    )
    return _for_many(group, cluster.host.base_latency_s.ll + hop + np.maximum(size * out / nic, inside_s))


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
