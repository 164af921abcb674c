"""Replay a pipeline schedule as a max-plus recurrence, for many plans at once.

Coarser than `simulator.engine.events`: an action is one number of seconds, a message one latency. What a stream of
communication does beside the actions is not seen here.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simulator.units import Number


def replay(
    order: Sequence[tuple[int, tuple[str, int, int]]], forward: Number, backward: Number, hop: Number, pp: int, ready: Number | None = None
) -> np.ndarray:
    """Return when each virtual stage ends its last backward, seconds.

    Parameters
    ----------
    order : sequence of (rank, (kind, chunk, micro-batch))
        Actions, each after all that it needs.
    forward, backward : ndarray (..., stages)
        Seconds of one micro-batch on each virtual stage.
    hop : Number (...)
        Seconds of a message between neighbouring stages.
    pp : int
        Pipeline ranks.
    ready : ndarray (..., stages), optional
        Earliest end of the first forward of a stage, when its parameters have to arrive first.

    Returns
    -------
    ndarray (..., stages)

    Notes
    -----
    An action starts when its rank is free and its message is there:
    ``end = max(end of the rank's previous action, end of the neighbour's action + hop) + duration``.
    """
    stages = forward.shape[-1]
    f, b = ([x[..., s].copy() for s in range(stages)] for x in (forward, backward))
    free: list[Number] = [np.zeros(forward.shape[:-1])] * pp
    sent: dict[tuple[str, int, int], Number] = {}
    last: list[Number] = [0.0] * stages
    for rank, (kind, chunk, micro_batch) in order:
        stage = chunk * pp + rank
        ahead = kind == "F"
        arrives = sent.pop((kind, stage + (-1 if ahead else 1), micro_batch), None)
        begin = free[rank] if arrives is None else np.maximum(free[rank], arrives)
        end = begin + (f if ahead else b)[stage]
        if ready is not None and ahead and micro_batch == 0:
            end = np.maximum(end, ready[..., stage])
        free[rank] = end
        if not ahead:
            last[stage] = end
        if stage != (stages - 1 if ahead else 0):
            sent[(kind, stage, micro_batch)] = end + hop
    return np.stack(last, axis=-1)
