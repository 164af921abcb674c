"""Collectives as flows: who sends how many bytes to whom, phase after phase.

Ranks 0 ... n - 1 lie in domains of g: rank r is member ``r % g`` of domain ``r // g``. A phase begins when the one before it has
ended; a pattern whose algorithm is a pipeline of chunks is one phase, the traffic of the full pipeline.

References
----------
As of `simulator.network.algorithms`; DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, section 3.2.2 (dispatch and combine over
two networks); NVIDIA, "Doubling all2all Performance with NCCL 2.12", 2022 (PXN).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from simulator.errors import NetworkError

#: in place of a rank: the reducing switch of its domain
SWITCH = -1


class Phase(NamedTuple):
    """Concurrent flows: from rank, to rank, bytes; shapes (F,)."""

    source: np.ndarray
    target: np.ndarray
    size_bytes: np.ndarray


def _phase(source: np.ndarray, target: np.ndarray, size_bytes: np.ndarray | float) -> Phase:
    source, target, size = np.broadcast_arrays(source, target, np.asarray(size_bytes, dtype=float))
    keep = (source != target) & (size > 0)
    return Phase(source[keep], target[keep], size[keep])


def ring_steps(ranks: int, size: float, passes: int) -> Iterator[Phase]:
    """Yield the steps of a ring: ``passes (n - 1)`` times ``size / n`` to the next rank; two passes reduce to all."""
    rank = np.arange(ranks)
    for _ in range(passes * (ranks - 1)):
        yield _phase(rank, (rank + 1) % ranks, size / ranks)


def ring(ranks: int, size: float, passes: int) -> Iterator[Phase]:
    """Yield the whole ring as one phase: ``passes (n - 1)/n size`` to the next rank."""
    rank = np.arange(ranks)
    yield _phase(rank, (rank + 1) % ranks, passes * (ranks - 1) / ranks * size)


def binary_tree(ranks: int) -> np.ndarray:
    """Return the parent of each rank in NCCL's in-order binary tree, -1 for the root: odd ranks are leaves.

    Notes
    -----
    A rank whose lowest set bit is 2^k has its parent at ``(rank ^ 2^k) | 2^(k + 1)``, or below it where that is beyond the last.
    """
    parent = np.full(ranks, -1)
    for rank in range(1, ranks):
        bit = rank & -rank
        above = (rank ^ bit) | (bit << 1)
        parent[rank] = above if above < ranks else rank ^ bit
    return parent


def double_tree(ranks: int, size: float) -> Iterator[Phase]:
    """Yield an all-reduce over two binary trees, half of the bytes up and down each, leaves of one inside the other.

    Notes
    -----
    The second tree is the first one shifted by a rank, or mirrored for an even number of them.
    """
    rank = np.arange(ranks)
    first = binary_tree(ranks)
    place = (ranks - 1 - rank) if ranks % 2 == 0 else (rank - 1) % ranks
    original = np.argsort(place)
    second = np.where(first[place] >= 0, original[first[place]], -1)
    child = np.concatenate([rank[first >= 0], rank[second >= 0]])
    parent = np.concatenate([first[first >= 0], second[second >= 0]])
    yield _phase(np.concatenate([child, parent]), np.concatenate([parent, child]), size / 2)


def halving_doubling(ranks: int, size: float) -> Iterator[Phase]:
    """Yield a recursive halving-doubling all-reduce: exchanges of ``size/2, size/4 ...`` with ever nearer ranks, and back.

    Raises
    ------
    NetworkError
        When `ranks` is not a power of two.
    """
    if ranks & (ranks - 1):
        raise NetworkError(f"halving-doubling needs 2^k ranks; found {ranks}: use a ring, or {1 << ranks.bit_length() - 1}")
    rank, distances = np.arange(ranks), [ranks >> k for k in range(1, ranks.bit_length())]
    for distance in distances + distances[::-1]:
        yield _phase(rank, rank ^ distance, size * distance / ranks)


def in_network(ranks: int, size: float) -> Iterator[Phase]:
    """Yield an all-reduce by the switches of one domain: ``size (1 + 1/n)`` from each rank to them, and from them to each."""
    rank = np.arange(ranks)
    moved = size * (1 + 1 / ranks)
    yield _phase(np.append(rank, np.full(ranks, SWITCH)), np.append(np.full(ranks, SWITCH), rank), moved)


def hierarchical(ranks: int, size: float, inside: int) -> Iterator[Phase]:
    """Yield an all-reduce in three phases: scatter inside the domains, all-reduce between peers, gather inside."""
    domains, rank = ranks // inside, np.arange(ranks)
    beside = rank // inside * inside + (rank + 1) % inside
    within = _phase(rank, beside, (inside - 1) / inside * size)
    yield within
    yield _phase(rank, (rank + inside) % ranks, 2 * (domains - 1) / domains * size / inside)
    yield within


def pat(ranks: int, size: float) -> Iterator[Phase]:
    """Yield an all-gather in ``ceil(log2 n)`` phases: 1, 2, 4 ... blocks of ``size / n`` to the rank as far away."""
    rank, distance = np.arange(ranks), 1
    while distance < ranks:
        yield _phase(rank, (rank + distance) % ranks, min(distance, ranks - distance) * size / ranks)
        distance *= 2


def pairwise(ranks: int, size: float) -> Iterator[Phase]:
    """Yield an all-to-all in ``n - 1`` phases: ``size / n`` to the rank k further on, for each k."""
    rank = np.arange(ranks)
    for step in range(1, ranks):
        yield _phase(rank, (rank + step) % ranks, size / ranks)


def all_to_all(ranks: int, size: float) -> Iterator[Phase]:
    """Yield an all-to-all as one phase: ``size / n`` from every rank to every other."""
    source, target = np.divmod(np.arange(ranks * ranks), ranks)
    yield _phase(source, target, size / ranks)


def hierarchical_all_to_all(ranks: int, size: float, inside: int) -> Iterator[Phase]:
    """Yield an all-to-all in two phases: inside each domain to the member that sits on the target's rail, then along the rails."""
    domains, rank = ranks // inside, np.arange(ranks)
    for step in range(1, inside):
        beside = rank // inside * inside + (rank + step) % inside
        yield _phase(rank, beside, domains * size / ranks)
    for step in range(1, domains):
        yield _phase(rank, (rank + step * inside) % ranks, inside * size / ranks)


def expert_dispatch(ranks: int, size: float, inside: int, out: float, fan: float) -> Iterator[Phase]:
    """Yield a node-limited dispatch, both networks at once: `out` copies along the rails, `fan` copies inside the domains.

    Parameters
    ----------
    ranks, inside : int
        The expert group, and how many of it share a domain.
    size : float
        Bytes of one copy of a rank's tokens.
    out, fan : float
        Copies of a token over the NIC and inside the domain (`simulator.workload.experts.copies`). Balanced: every other domain,
        and every other member of the domain, receives as much.
    """
    domains, rank = ranks // inside, np.arange(ranks)
    parts = [_phase(rank, (rank + step * inside) % ranks, out * size / max(domains - 1, 1)) for step in range(1, domains)]
    parts += [_phase(rank, rank // inside * inside + (rank + step) % inside, fan * size / max(inside - 1, 1)) for step in range(1, inside)]
    if parts:
        yield Phase(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def expert_combine(ranks: int, size: float, inside: int, out: float, fan: float) -> Iterator[Phase]:
    """Yield a combine: the dispatch with every flow the other way."""
    for phase in expert_dispatch(ranks, size, inside, out, fan):
        yield Phase(phase.target, phase.source, phase.size_bytes)


def across_rails(phase: Phase, inside: int, pxn: bool) -> Phase:
    """Return what the networks carry of flows that leave their domain.

    Parameters
    ----------
    phase : Phase
    inside : int
        Ranks per domain.
    pxn : bool
        NCCL's proxy over NVLink: a flow to another rail goes inside the domain to the member on the target's rail first, and along
        that rail; flows that then join ends are added up. Without, it leaves by its own NIC and changes rails in the fabric.
    """
    source, target, size = phase
    leaves = source // inside != target // inside
    if not pxn:
        return phase
    proxy = np.where(leaves, source // inside * inside + target % inside, source)
    first = _phase(source, proxy, size)
    pairs = np.concatenate([np.stack([first.source, first.target], axis=1), np.stack([proxy, target], axis=1)])
    ends, at = np.unique(pairs, axis=0, return_inverse=True)
    return Phase(ends[:, 0], ends[:, 1], np.bincount(at.ravel(), np.concatenate([first.size_bytes, size])))


#: all-reduce patterns of `simulator.network.algorithms` by name: (ranks, size, ranks inside a domain) -> phases
ALL_REDUCE: dict[str, Callable[[int, float, int], Iterator[Phase]]] = {
    "ring": lambda ranks, size, inside: ring(ranks, size, 2),
    "tree": lambda ranks, size, inside: double_tree(ranks, size),
    "halving_doubling": lambda ranks, size, inside: halving_doubling(ranks, size),
    "in_network": lambda ranks, size, inside: in_network(ranks, size),
    "hierarchical": hierarchical,
}
