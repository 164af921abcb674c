"""Concurrent flows over shared links: max-min fair rates, and when each flow ends.

Paths come as a compressed table: flow f uses the links ``links[indptr[f] : indptr[f + 1]]``, indices into `capacity`.

Notes
-----
Rates are max-min fair: no flow can be faster without slowing one that is no faster than itself. A flow begins to share once
its path's latency has passed; rates change only when a flow begins or ends. What is not modelled: packets, queues, losses, and
the time that congestion control takes to find these rates.

References
----------
Bertsekas, Gallager, "Data Networks", 2nd ed., 1992, section 6.5.2.
Casanova et al., "Versatile, Scalable, and Accurate Simulation of Distributed Applications and Platforms", 2014 (SimGrid's model).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from simulator.errors import NetworkError
from simulator.network import filling


@dataclass(frozen=True, slots=True)
class FlowTimes:
    """What became of concurrent flows. Shapes: F flows, L links.

    Parameters
    ----------
    begin_s, finish_s : ndarray of shape (F,)
        When a flow was posted, and when its last byte arrived.
    alone_s : ndarray of shape (F,)
        What it would take with the links for itself.
    link_bytes : ndarray of shape (L,)
        Bytes that each link carried.
    capacity : ndarray of shape (L,)
        Bytes/s of each link.
    solves : int
        How often rates were solved.
    """

    begin_s: np.ndarray
    finish_s: np.ndarray
    alone_s: np.ndarray
    link_bytes: np.ndarray
    capacity: np.ndarray
    solves: int

    @property
    def makespan_s(self) -> float:
        """From the first flow's begin to the last one's end, seconds."""
        return float(self.finish_s.max() - self.begin_s.min()) if len(self.finish_s) else 0.0

    @property
    def slowdown(self) -> np.ndarray:
        """How many times as long each flow took as alone, shape (F,)."""
        took = self.finish_s - self.begin_s
        return np.divide(took, self.alone_s, out=np.ones_like(took), where=self.alone_s > 0)

    @property
    def utilisation(self) -> np.ndarray:
        """Share of its capacity that each link carried over the makespan, shape (L,)."""
        return self.link_bytes / (self.capacity * self.makespan_s) if self.makespan_s > 0 else np.zeros_like(self.capacity)

    def hottest(self, top: int = 10) -> np.ndarray:
        """Return the indices of the `top` most utilised links, hottest first."""
        return np.argsort(-self.utilisation, kind="stable")[:top]


def fair_rates(indptr: ArrayLike, links: ArrayLike, capacity: ArrayLike, weight: ArrayLike = 1.0) -> np.ndarray:
    """Return the max-min fair rate of each flow, bytes/s; a flow without links is infinitely fast.

    Parameters
    ----------
    indptr, links : array_like of int
        Paths, as the module says.
    capacity : array_like of float
        Bytes/s of each link.
    weight : array_like of float
        How many identical flows a row stands for; the rate is that of one of them.

    Raises
    ------
    NetworkError
        When the table is not one, or a link that is used has no capacity.
    """
    indptr, links, capacity, weight = _table(indptr, links, capacity, weight)
    rate = np.full(len(weight), np.inf)
    lengths = np.diff(indptr)
    moving = np.flatnonzero(lengths)
    if len(moving):
        rate[moving] = filling.fill(np.repeat(np.arange(len(moving)), lengths[moving]), links, weight[moving], capacity)
    return rate


def flow_times(
    indptr: ArrayLike,
    links: ArrayLike,
    capacity: ArrayLike,
    size_bytes: ArrayLike,
    start_s: ArrayLike = 0.0,
    latency_s: ArrayLike = 0.0,
    weight: ArrayLike = 1.0,
    grain: float = 0.0,
    compiled: bool | None = None,
) -> FlowTimes:
    """Return when concurrent flows end, sharing links max-min fairly.

    Parameters
    ----------
    indptr, links : array_like of int
        Paths, as the module says.
    capacity : array_like of float
        Bytes/s of each link.
    size_bytes : array_like of float
        Bytes of one flow.
    start_s, latency_s : array_like of float
        When each flow is posted, and how long its path's latency keeps the first byte, seconds.
    weight : array_like of float
        How many identical flows a row stands for, which share the same links; times are those of each of them.
    grain : float
        0 is exact. Otherwise flows that end within this share of their duration after the next one end with it, each at the
        time foreseen then: fewer solutions, and no capacity given away earlier than that.
    compiled : bool, optional
        True for the numba path, False for numpy; the default takes numba where it is installed. They agree to rounding.

    Returns
    -------
    FlowTimes

    Raises
    ------
    NetworkError
        When the table is not one, a link that is used has no capacity, or sizes or times are negative or not finite.
    """
    indptr, links, capacity, weight = _table(indptr, links, capacity, weight)
    flows = len(weight)
    size, start, latency = (
        _column(name, v, flows) for name, v in (("size_bytes", size_bytes), ("start_s", start_s), ("latency_s", latency_s))
    )
    lengths = np.diff(indptr)
    entry = np.repeat(np.arange(flows), lengths)
    carried = np.bincount(links, (weight * size)[entry], len(capacity))
    narrowest = np.full(flows, np.inf)
    moving = np.flatnonzero(lengths)
    if len(moving):
        narrowest[moving] = np.minimum.reduceat(capacity[links], indptr[:-1][moving])
    ready = start + latency
    finish, solves = ready.copy(), 0
    sending = (lengths > 0) & (size > 0)
    if sending.any():
        keep = sending[entry] & ~_never_scarce(indptr, links, capacity)[links]
        used, dense = np.unique(links[keep], return_inverse=True)
        path = np.concatenate([[0], np.cumsum(np.bincount(entry[keep], minlength=flows)[sending])]).astype(np.int64)
        arguments = path, dense.astype(np.int64), capacity[used], size[sending], ready[sending], weight[sending], float(grain)
        finish[sending], solves = _run(arguments, compiled)
    return FlowTimes(start, finish, latency + size / narrowest, carried, capacity, solves)


def _run(arguments: tuple, compiled: bool | None) -> tuple[np.ndarray, int]:
    if compiled is not False:
        try:
            from simulator.network import compiled as numba_path
        except ImportError:
            if compiled:
                raise NetworkError("compiled=True needs numba, which is not installed; pip install 'myriad-simulator[fast]'") from None
        else:
            indptr, links, capacity, size, ready, weight, grain = arguments
            state = numba_path.lay_out(indptr, links, capacity, weight)
            return numba_path.run(state, size, ready, np.argsort(ready, kind="stable"), grain)
    return filling.run(*arguments)


def _never_scarce(indptr: np.ndarray, links: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """Return which links cannot be anyone's only bottleneck: no narrower than all the first, or all the last, links that feed them.

    If such a link were full, each of these would be full, too, of the same flows.
    """
    lengths = np.diff(indptr)
    ends = np.zeros(len(capacity), dtype=bool)
    wide = np.zeros(len(capacity), dtype=bool)
    for offset in (indptr[:-1], indptr[1:] - 1):
        edge = links[offset[lengths > 0]]
        ends[edge] = True
        pairs = np.sort(links * len(capacity) + np.repeat(edge, lengths[lengths > 0]))  # np.unique takes ten times as long
        pairs = pairs[np.append(True, pairs[1:] != pairs[:-1])]
        wide |= np.bincount(pairs // len(capacity), capacity[pairs % len(capacity)], len(capacity)) <= capacity * (1 + 1e-12)
    return wide & ~ends


def _table(indptr: ArrayLike, links: ArrayLike, capacity: ArrayLike, weight: ArrayLike) -> tuple[np.ndarray, ...]:
    indptr, links, capacity = np.asarray(indptr, dtype=np.int64), np.asarray(links, dtype=np.int64), np.asarray(capacity, dtype=float)
    if indptr.ndim != 1 or not len(indptr) or indptr[0] != 0 or indptr[-1] != len(links) or (np.diff(indptr) < 0).any():
        raise NetworkError(f"indptr must rise from 0 to the {len(links)} entries of links; found {indptr[:1]} to {indptr[-1:]}")
    if len(links) and not 0 <= links.min() <= links.max() < len(capacity):
        raise NetworkError(f"links name {links.min()} to {links.max()}; capacity has links 0 to {len(capacity) - 1}")
    dead = links[~(capacity[links] > 0)]
    if len(dead):
        raise NetworkError(f"link {dead[0]} carries flows at {capacity[dead[0]]:g} bytes/s; give it a rate, or route around it")
    weight = np.broadcast_to(np.asarray(weight, dtype=float), len(indptr) - 1)
    if not (weight > 0).all():
        raise NetworkError(f"weight must be above 0; found {weight[~(weight > 0)][0]:g}")
    return indptr, links, capacity, np.ascontiguousarray(weight)


def _column(name: str, values: ArrayLike, flows: int) -> np.ndarray:
    column = np.asarray(values, dtype=float)
    if column.ndim and column.shape != (flows,):
        raise NetworkError(f"{name} has shape {column.shape}; give one number, or one for each of {flows} flows")
    if not (np.isfinite(column) & (column >= 0)).all():
        raise NetworkError(f"{name} must be finite and not negative; found {np.ravel(column[~(np.isfinite(column) & (column >= 0))])[0]:g}")
    return np.ascontiguousarray(np.broadcast_to(column, flows))
