"""The host that launches a pass: how long the device waits for it, and it for the device."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from simulator.pricing.compute import host_wait_s
from simulator.scenario.kernels import Kernels
from simulator.units import Number
from simulator.workload.ops import Op, Segment, awaited, launched, launches_of, reads_back


def wait_s(segments: tuple[Segment, ...], seconds: Callable[[Op], Number], kernels: Kernels, dispatch_s: float | None) -> Number:
    """Return how much longer a pass of a block takes than its segments, because one thread launches its kernels.

    Parameters
    ----------
    segments : tuple of Segment
        All of the pass.
    seconds : callable
        Returns the seconds of an operation.
    dispatch_s : float or None
        What a kernel of a module of Transformer Engine costs the host; None costs nothing.

    Notes
    -----
    A host that never reads from the device is as far ahead as it gets: the pass takes the longer of all launches, with what the host
    waits for, and all segments. Where it reads how many rows the experts get, it has nothing launched ahead any more: the device waits
    for the next launch, and each part between two such reads takes its own time. Kernel i starts when the one before it has ended and
    its first launch is done, and ends no sooner than its last: the pace of equal blocks in a row is that of the second of two.
    """
    if dispatch_s is None:
        return 0.0
    priced = [[seconds(op) for op in segment] for segment in segments]
    lasts = list(map(longest, priced))
    device = sum(lasts, 0.0)
    reads = reads_back(segments, kernels)
    if not reads:
        meanwhile = device - sum((lasts[at] for at in awaited(segments, kernels)), 0.0)
        return host_wait_s(launched(segments, kernels), meanwhile, dispatch_s)
    launches = launches_of(segments, kernels)
    host: Number = 0.0
    ended: Number = 0.0
    began: Number = 0.0
    for _ in range(2):
        began = ended
        for at, (row, lengths) in enumerate(zip(launches, priced, strict=True)):
            if reads.get(at) is False:
                host = np.maximum(host, ended)
            start = ended
            for many, length in zip(row, lengths, strict=True):
                if not np.any(many):
                    ended = np.maximum(ended, start + length)
                    continue
                first, host = host + np.minimum(many, 1.0) * dispatch_s, host + many * dispatch_s
                ended = np.maximum(np.maximum(ended, host), np.maximum(start, first) + length)
            if reads.get(at):
                host = np.maximum(host, ended)
    return np.maximum(ended - began - device, 0.0)


def longest(parts: list[Number]) -> Number:
    """Return the longest of operations that run side by side, for every plan."""
    return parts[0] if len(parts) == 1 else np.maximum.reduce(np.broadcast_arrays(*parts))
