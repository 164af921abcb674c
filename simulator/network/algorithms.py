"""Time of collective algorithms as formulas over numbers: every argument may be a column, one entry per plan.

Notes
-----
A collective of `w` seconds on the wire takes ``start + hops + w + fill (1 - exp(-w / fill))``: a pipeline of chunks that is
full for long costs the time to fill it once, a short one is never full and runs at half its rate.

A protocol sets the latency of a hop and the payload's share of the wire: LL sends 4 bytes of flags with 4 of data, LL128 8 with
120, Simple none but waits for a whole chunk.

References
----------
NVIDIA, NCCL 2.30, ``src/graph/tuning.cc``: latencies, steps and protocol shares of the tuning model.
Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH", 2005.
Sanders, Speck, Traeff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan", 2009.
Jeaugey, "PAT: a new algorithm for all-gather and reduce-scatter operations at scale", 2025.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from simulator.scenario.cluster import Protocols
from simulator.units import Number

Protocol = Literal["ll", "ll128", "simple"]
Algorithm = Literal["ring", "tree", "halving_doubling", "in_network", "hierarchical", "pat"]

#: bytes per rank in flight before a network pipeline is full: NCCL's default buffer (``NCCL_BUFFSIZE``)
NET_BUFFER = 4 * 2**20
#: NCCL's NVLink latency of an in-network reduction (``NCCL_ALGO_NVLS``), seconds
IN_NETWORK_S = 25e-6
#: chunks of an in-network reduction, bytes per channel and member, and the buffers that get them: those that fill all channels'
#: chunks as many times or more (NCCL's ``calcCollChunking``); inside a domain, and in a tree over domains
REDUCED_CHUNKS = ((16 * 2**10, 0), (32 * 2**10, 2), (64 * 2**10, 8), (128 * 2**10, 64))
TREE_CHUNKS = ((32 * 2**10, 0), (64 * 2**10, 1), (128 * 2**10, 4))
#: the largest chunk of a tree over so many domains or more (``NCCL_NVLSTREE_MAX_CHUNKSIZE``)
FAR_DOMAINS, FAR_CHUNK = 4, 64 * 2**10
#: stages that a chunk passes before and after the links: copied to the buffer that the switches read, and out of it
COPIES = 2


@dataclass(frozen=True, slots=True)
class Reach:
    """What a group of ranks has for a collective.

    Parameters
    ----------
    ranks, inside, domains : Number
        Members, how many of them share a scale-up domain, and over how many domains they lie.
    bus_bytes_per_s : Number
        Bus bandwidth of long rings inside a domain.
    reduce_bytes_per_s : Number
        Rate at which a member's data passes through the reduction in the scale-up switches; 0 where there is none.
    nic_bytes_per_s : Number
        What one member keeps between domains.
    tree_share : Number
        Bandwidth of a tree inside a domain over that of a ring.
    start, hop, net_hop : Protocols
        Start of a collective, and a hop inside and between domains, seconds.
    share : dict
        Payload's share of the wire, per protocol.
    fill_s, net_fill_s : Number
        Time to fill the pipeline inside a domain and between domains.
    reduce_channels : Number
        Channels of the in-network reduction, each with a chunk per member under way; 0: its pipeline costs nothing to fill.
    """

    ranks: Number
    inside: Number
    domains: Number
    bus_bytes_per_s: Number
    reduce_bytes_per_s: Number
    nic_bytes_per_s: Number
    tree_share: Number
    start: Protocols
    hop: Protocols
    net_hop: Protocols
    share: dict[Protocol, float]
    fill_s: Number
    net_fill_s: Number
    reduce_channels: Number = 0

    @property
    def pipeline_s(self) -> Number:
        """Time to fill the pipeline that the group needs."""
        net = np.where(np.asarray(self.net_fill_s) > 0, self.net_fill_s + NET_BUFFER / np.asarray(self.nic_bytes_per_s, dtype=float), 0.0)
        return np.where(np.asarray(self.domains) > 1, net, self.fill_s)


def filled_s(wire_s: Number, fill_s: Number) -> Number:
    """Return what `wire_s` seconds on the wire take with a pipeline that fills in `fill_s` seconds."""
    fill = np.asarray(fill_s, dtype=float)
    return wire_s + fill * -np.expm1(-wire_s / np.where(fill > 0, fill, np.inf))


def ring_s(size: Number, reach: Reach, protocol: Protocol, passes: int) -> Number:
    """Return seconds of `passes` rounds of a ring: one gathers or scatters, two reduce to all.

    Notes
    -----
    ``passes (n - 1)`` steps of ``size / n``; each domain is entered once by each of its NICs' rings, so that the bus bandwidth is
    the lesser of the links' and ``inside x NIC``.
    """
    n, one = np.asarray(reach.ranks, dtype=float), reach.domains
    bus = np.where(one > 1, np.minimum(reach.bus_bytes_per_s, reach.inside * reach.nic_bytes_per_s), reach.bus_bytes_per_s)
    inter = np.where(one > 1, passes * one, passes) - passes
    hops = (passes * (n - 1) - inter) * getattr(reach.hop, protocol) + inter * getattr(reach.net_hop, protocol)
    wire = passes * (n - 1) / n * size / (bus * reach.share[protocol])
    return getattr(reach.start, protocol) + hops + filled_s(wire, reach.pipeline_s)


def tree_s(size: Number, reach: Reach, protocol: Protocol) -> Number:
    """Return seconds of a double binary tree all-reduce between domains, chains inside.

    Notes
    -----
    Up and down the tree of ``log2 N`` levels. Inside a domain a chain moves ``2 (n - 1)/n size``. Between domains both trees
    together pass every byte twice through a domain's NICs in each direction, through those of either of two domains once.
    """
    n, g, domains = (np.asarray(v, dtype=float) for v in (reach.ranks, reach.inside, reach.domains))
    share = reach.share[protocol]
    between = _between_s(size, reach) / share
    chain = np.maximum(2 * (n - 1) / n * size / (reach.bus_bytes_per_s * reach.tree_share * share), between)
    hops = 2 * (np.log2(domains) * getattr(reach.net_hop, protocol) + (g - 1) * getattr(reach.hop, protocol))
    return getattr(reach.start, protocol) + hops + filled_s(np.where(g > 1, chain, between), reach.pipeline_s)


def _tree_passes(domains: Number) -> Number:
    """Return how often a double tree sends the data over each NIC: up and down, between two domains at once."""
    return np.where(np.asarray(domains) > 2, 2.0, 1.0)


def _between_s(size: Number, reach: Reach) -> Number:
    """Return seconds for which a double binary tree keeps the NICs of a domain busy."""
    domains = np.asarray(reach.domains, dtype=float)
    passes = _tree_passes(domains)
    return np.where(domains > 1, passes * size / (reach.inside * np.asarray(reach.nic_bytes_per_s, dtype=float)), 0.0)


def in_network_s(size: Number, reach: Reach) -> Number:
    """Return seconds of an all-reduce by the switches of the domains, between them over a double binary tree; infinite without switches.

    Notes
    -----
    A member sends its share of every other's sum and receives its own sum from all: ``size (1 + 1/n)`` through its links, against
    ``2 (n - 1)/n`` of a ring; as the inside of a tree twice, of two domains once. Every channel has a chunk of each member under
    way in each stage: with ``loop = channels x members x chunk`` bytes a stage, a buffer takes ``1 + (2 + 2 log2 N) loop / size``
    times as long as its bytes need (NCCL's NVLS and NVLSTree).
    """
    g, domains = (np.asarray(v, dtype=float) for v in (reach.inside, reach.domains))
    rate = np.asarray(reach.reduce_bytes_per_s, dtype=float)
    possible = (rate > 0) & np.where(domains > 1, g > 1, g > 2)
    passes = _tree_passes(domains)
    wire = np.maximum(passes * size * (1 + 1 / g) / np.where(possible, rate, np.inf), _between_s(size, reach))
    stages = COPIES + 2 * np.log2(domains)
    full = np.minimum(loop_bytes(size, reach) / np.maximum(size, 1e-9), 1.0)
    start = IN_NETWORK_S + np.where(domains > 1, reach.start.simple + 2 * np.log2(domains) * reach.net_hop.simple, 0.0)
    return np.where(possible, start + wire * (1 + stages * full), np.inf)


def loop_bytes(size: Number, reach: Reach) -> Number:
    """Return the bytes of all channels' and members' chunks together, in one stage of an in-network reduction of `size` bytes."""
    domains, unit = np.asarray(reach.domains), reach.reduce_channels * np.asarray(reach.inside, dtype=float)
    far = np.minimum(_chunk(size, unit, TREE_CHUNKS), np.where(domains >= FAR_DOMAINS, FAR_CHUNK, np.inf))
    return unit * np.where(domains > 1, far, _chunk(size, unit, REDUCED_CHUNKS))


def _chunk(size: Number, unit: Number, chunks: tuple[tuple[int, int], ...]) -> Number:
    chunk: Number = float(chunks[0][0])
    for larger, loops in chunks[1:]:
        chunk = np.where(size >= loops * unit * larger, float(larger), chunk)
    return chunk


def halving_doubling_s(size: Number, reach: Reach, protocol: Protocol) -> Number:
    """Return seconds of a recursive halving-doubling all-reduce; infinite for other than 2^k ranks.

    Notes
    -----
    ``2 log2 n`` exchanges of ``size/2, size/4 ...`` and back. Partners lie in other domains first, with all of the NICs: exchanges
    between domains move ``2 (N - 1)/N size`` through one NIC per rank, those inside ``2 (g - 1)/g size / N``.
    """
    n, g, domains = (np.asarray(v, dtype=float) for v in (reach.ranks, reach.inside, reach.domains))
    power = np.log2(n) == np.round(np.log2(n))
    between = np.where(domains > 1, 2 * (domains - 1) / domains * size / reach.nic_bytes_per_s, 0.0)
    inside = 2 * (g - 1) / g * size / domains / reach.bus_bytes_per_s
    hops = 2 * (np.log2(g) * getattr(reach.hop, protocol) + np.log2(domains) * getattr(reach.net_hop, protocol))
    seconds = getattr(reach.start, protocol) + hops + filled_s((between + inside) / reach.share[protocol], reach.pipeline_s)
    return np.where(power, seconds, np.inf)


def hierarchical_s(size: Number, reach: Reach, protocol: Protocol) -> Number:
    """Return seconds of an all-reduce in three parts: scatter inside, rings between the domains' peers, gather inside.

    Notes
    -----
    ``2 (g - 1)/g size / bus + 2 (N - 1)/N size / g / NIC``, one part after the other.
    """
    g, domains = (np.asarray(v, dtype=float) for v in (reach.inside, reach.domains))
    inside = 2 * (g - 1) / g * size / reach.bus_bytes_per_s
    between = np.where(domains > 1, 2 * (domains - 1) / domains * size / g / reach.nic_bytes_per_s, 0.0)
    hops = 2 * ((g - 1) * getattr(reach.hop, protocol) + (domains - 1) * getattr(reach.net_hop, protocol))
    return getattr(reach.start, protocol) + hops + filled_s((inside + between) / reach.share[protocol], reach.pipeline_s)


def pat_s(size: Number, reach: Reach, protocol: Protocol) -> Number:
    """Return seconds of an all-gather or reduce-scatter by parallel aggregated trees, for one rank per domain; else infinite.

    Notes
    -----
    ``ceil(log2 N)`` network steps that move ``(n - 1)/n size`` in all.
    """
    n = np.asarray(reach.ranks, dtype=float)
    hops = np.ceil(np.log2(np.maximum(n, 1))) * getattr(reach.net_hop, protocol)
    wire = (n - 1) / n * size / (reach.nic_bytes_per_s * reach.share[protocol])
    seconds = getattr(reach.start, protocol) + hops + filled_s(wire, reach.pipeline_s)
    return np.where((np.asarray(reach.inside) == 1) & (n > 1), seconds, np.inf)


ALL_REDUCE: dict[Algorithm, Callable[[Number, Reach, Protocol], Number]] = {
    "ring": lambda size, reach, protocol: ring_s(size, reach, protocol, 2),
    "tree": tree_s,
    "in_network": lambda size, reach, protocol: in_network_s(size, reach) if protocol == "simple" else np.inf,
    "halving_doubling": halving_doubling_s,
    "hierarchical": hierarchical_s,
}

GATHER: dict[Algorithm, Callable[[Number, Reach, Protocol], Number]] = {
    "ring": lambda size, reach, protocol: ring_s(size, reach, protocol, 1),
    "pat": pat_s,
}

#: what NCCL's tuner weighs for an all-reduce; the others are forced
TUNED: dict[str, tuple[Algorithm, ...]] = {"all_reduce": ("ring", "tree", "in_network"), "gather": ("ring", "pat")}


def cheapest(
    kind: Literal["all_reduce", "gather"], size: Number, reach: Reach, algorithm: Algorithm | None = None, protocol: Protocol | None = None
) -> Number:
    """Return seconds of the algorithm and protocol that cost least, as NCCL's tuner picks them, or of the forced ones.

    Notes
    -----
    Between domains the tuner takes the switches' reduction for every buffer long enough for its largest chunks, even where a ring
    would be faster: its tables give it a ring's rate without a ring's latency, and two to three times a tree's rate per channel.
    """
    table = ALL_REDUCE if kind == "all_reduce" else GATHER
    best, reduced = np.inf, np.inf
    for name in (algorithm,) if algorithm else TUNED[kind]:
        for wire in (protocol,) if protocol else reach.share:
            seconds = table[name](size, reach, wire)
            best = np.minimum(best, seconds)
            reduced = seconds if name == "in_network" and wire == "simple" else reduced
    if kind == "all_reduce" and algorithm is None and protocol is None:
        loops = TREE_CHUNKS[-1][1]
        preferred = np.isfinite(reduced) & (np.asarray(reach.domains) > 1) & (size >= loops * loop_bytes(size, reach))
        best = np.where(preferred, reduced, best)
    return best
