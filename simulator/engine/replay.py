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
    An action starts when its rank is free and its message is there; a rank's messages leave one after the other:
    ``end = max(end of the rank's previous action, arrival) + duration``, ``arrival = max(previous arrival, end) + hop``.
    """
    stages = forward.shape[-1]
    f, b = ([x[..., s].copy() for s in range(stages)] for x in (forward, backward))
    free: list[Number] = [np.zeros(forward.shape[:-1])] * pp
    line: list[Number] = [0.0] * pp
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
            line[rank] = np.maximum(line[rank], end) + hop
            sent[(kind, stage, micro_batch)] = line[rank]
    return np.stack(last, axis=-1)


def passage(blocks: Sequence[tuple[Number, Number, Number]], held: Number, shape: tuple[int, ...]) -> np.ndarray:
    """Return what one action does to its rank's clocks, as a max-plus matrix.

    Parameters
    ----------
    blocks : sequence of (pass, gather, reduction)
        Seconds of each block of the action in order: its pass, the gather that it waits for and the reduction that follows
        it; 0 for none.
    held : Number
        Reduction of the block before the action, which lets the first gather go first.
    shape : tuple of int
        That of all these numbers, one entry per plan.

    Returns
    -------
    ndarray of shape (3, 4, ...)
        ``new = max over j of (matrix[:, j] + old[j])``. Clocks: end of the last block, of the one before it, and of the
        data-parallel stream; the fourth old one is the arrival of the message.

    Notes
    -----
    Baccelli, Cohen, Olsder, Quadrat, "Synchronization and Linearity", 1992, chapter 2.
    """
    unit = np.full((4, 4, *shape), -np.inf)
    unit[range(4), range(4)] = 0.0
    last, earlier, stream, message = unit
    begin = np.maximum(last, message)
    for seconds, gather, reduce in blocks:
        waits = np.asarray(gather) > 0
        stream = np.where(waits, np.maximum(stream, earlier) + gather, stream)
        begin = np.where(waits, np.maximum(begin, stream), begin)
        stream = np.where(np.asarray(held) > 0, np.maximum(stream, last) + held, stream)
        earlier, last, held = last, begin + seconds, reduce
        begin = last
    return np.stack([last, earlier, stream])


def replay_sharded(
    order: Sequence[tuple[int, tuple[str, int, int]]],
    blocks: Sequence[Sequence[tuple[Number, Number, Number, Number]]],
    hop: Number,
    pp: int,
    ready: Number | None = None,
    busy: Number | float = 0.0,
) -> np.ndarray:
    """Return when each rank has done its passes and summed its gradients, when collectives run for every micro-batch, seconds.

    Parameters
    ----------
    order, hop, pp, ready
        As for `replay`.
    blocks : sequence of sequence of (forward, backward, gather, reduce)
        Seconds of each block of each virtual stage; a stage has at least one.
    busy : ndarray (..., pp)
        When the data-parallel stream of each rank is free for the first time.

    Returns
    -------
    ndarray (..., pp)
    """
    shape = np.broadcast_shapes(np.shape(hop), *(np.shape(x) for stage in blocks for block in stage for x in block))
    nothing: Number = 0.0
    clocks = [np.stack([np.zeros(shape), np.zeros(shape), np.broadcast_to(busy, (*shape, pp))[..., r]]) for r in range(pp)]
    held, held_by, line = [nothing] * pp, [-1] * pp, [nothing] * pp
    known: dict[tuple[str, int, int], np.ndarray] = {}
    sent: dict[tuple[str, int, int], Number] = {}
    for rank, (kind, chunk, micro_batch) in order:
        stage, ahead = chunk * pp + rank, kind == "F"
        matrix = known.get((kind, stage, held_by[rank]))
        if matrix is None:
            row = [(f, g, nothing) for f, _, g, _ in blocks[stage]] if ahead else [(b, g, r) for _, b, g, r in blocks[stage][::-1]]
            matrix = known[(kind, stage, held_by[rank])] = passage(row, held[rank], shape)
        arrives = sent.pop((kind, stage + (-1 if ahead else 1), micro_batch), np.zeros(shape))
        clock = (matrix + np.concatenate([clocks[rank], arrives[None]])).max(axis=1)
        if ready is not None and ahead and micro_batch == 0:
            clock[0] = np.maximum(clock[0], ready[..., stage])
        clocks[rank] = clock
        held[rank], held_by[rank] = (nothing, -1) if ahead else (blocks[stage][0][3], stage)
        if stage != (len(blocks) - 1 if ahead else 0):
            line[rank] = np.maximum(line[rank], clock[0]) + hop
            sent[(kind, stage, micro_batch)] = line[rank]
    done = []
    for (last, _, stream), reduce in zip(clocks, held, strict=True):
        stream = np.where(np.asarray(reduce) > 0, np.maximum(stream, last) + reduce, stream)
        done.append(np.maximum(stream, last))
    return np.stack(done, axis=-1)
