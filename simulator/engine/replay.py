"""Replay a pipeline schedule as a max-plus recurrence, for many plans at once.

Coarser than `simulator.engine.events`: an action is one number of seconds, a message one latency. What a stream of
communication does beside the actions is not seen here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from simulator.schedules import Action, Schedule, actions
from simulator.units import Number


def replay(
    order: Schedule,
    seconds: Mapping[str, Number],
    pairs: Mapping[tuple[int, int], tuple[Number, Number]],
    hop: Number,
    ready: Number | None = None,
) -> np.ndarray:
    """Return when each chunk of each rank ends its last backward, seconds.

    Parameters
    ----------
    order : Schedule
    seconds : mapping of str to ndarray (..., stages)
        One F, B, I or W on each stage.
    pairs : mapping of (int, int) to (Number, Number)
        When the forward and the backward of a pair end, by their stages; they start together.
    hop : Number (...)
        A message between ranks.
    ready : ndarray (..., pp, vpp), optional
        Earliest end of the first forward of a chunk, when its parameters have to arrive first.

    Returns
    -------
    ndarray (..., pp, vpp)

    Notes
    -----
    An entry starts when its rank is free and its messages are there; a rank's messages leave one after the other:
    ``end = max(end of the rank's previous entry, arrival) + duration``, ``arrival = max(previous arrival, end) + hop``.
    """
    shape = next(iter(seconds.values())).shape[:-1]
    durations = {kind: [x[..., s].copy() for s in range(x.shape[-1])] for kind, x in seconds.items()}
    free: list[Number] = [np.zeros(shape)] * order.pp
    line: list[Number] = [0.0] * order.pp
    sent: dict[tuple[str, int, int, int], Number] = {}
    last: list[list[Number]] = [[np.zeros(shape)] * order.vpp for _ in range(order.pp)]
    started = set()
    for rank, entry in order.order:
        held, parts = order.held[rank], tuple(actions((entry,)))
        begins = []
        for action in parts:
            arrives = sent.pop((_side(action), rank, action.chunk, action.micro_batch), None) if action.kind != "W" else None
            begins.append(free[rank] if arrives is None else np.maximum(free[rank], arrives))
        if len(parts) == 1:
            ends = [begins[0] + durations[parts[0].kind][held[parts[0].chunk]]]
        else:  # the backward stands behind the forward in the streams; one that comes late runs by itself
            forward, backward = (held[action.chunk] for action in parts)
            ends = [begins[0] + last for last in pairs[forward, backward]]
            ends[1] = np.maximum(ends[1], begins[1] + durations["B"][backward])
        for i, action in enumerate(parts):
            if action.kind == "F" and (rank, action.chunk) not in started:
                started.add((rank, action.chunk))
                ends[i] = ends[i] if ready is None else np.maximum(ends[i], ready[..., rank, action.chunk])
        free[rank] = ends[0] if len(ends) == 1 else np.maximum(*ends)
        for action, end in sorted(zip(parts, ends, strict=True), key=lambda part: float(np.mean(part[1]))):
            if action.kind in "BW":
                last[rank][action.chunk] = end
            target = order.target(rank, action)
            if target is not None and target[0] == rank:
                sent[_side(action), *target, action.micro_batch] = end
            elif target is not None:
                line[rank] = sent[_side(action), *target, action.micro_batch] = np.maximum(line[rank], end) + hop
    return np.stack([np.stack(row, axis=-1) for row in last], axis=-2)


def _side(action: Action) -> str:
    """Messages go forward with activations or back with gradients."""
    return "F" if action.kind == "F" else "G"


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
    order: Schedule,
    stages: Sequence[Mapping[str, Sequence[tuple[Number, Number, Number]]]],
    hop: Number,
    ready: Number | None = None,
    busy: Number | float = 0.0,
) -> np.ndarray:
    """Return when each rank has done its passes and summed its gradients, when collectives run for every micro-batch, seconds.

    Parameters
    ----------
    order, hop, ready
        As for `replay`; a pair runs as forward then backward.
    stages : sequence of mapping of str to sequence of (pass, gather, reduction)
        For each stage and kind of action, its blocks in order, as for `passage`.
    busy : ndarray (..., pp)
        When the data-parallel stream of each rank is free for the first time.

    Returns
    -------
    ndarray (..., pp)
    """
    shape = np.broadcast_shapes(np.shape(hop), *(np.shape(x) for stage in stages for row in stage.values() for block in row for x in block))
    nothing: Number = 0.0
    clocks = [np.stack([np.zeros(shape), np.zeros(shape), np.broadcast_to(busy, (*shape, order.pp))[..., r]]) for r in range(order.pp)]
    held: list[tuple[int, Number]] = [(-1, nothing)] * order.pp  # the stage whose last reduction waits, and its seconds
    known: dict[tuple[str, int, int], np.ndarray] = {}
    line: list[Number] = [0.0] * order.pp
    sent: dict[tuple[str, int, int, int], Number] = {}
    started = set()
    for rank, entry in order.order:
        for action in actions((entry,)):
            stage, row = order.held[rank][action.chunk], stages[order.held[rank][action.chunk]][action.kind]
            key = (action.kind, stage, held[rank][0])
            if key not in known:
                known[key] = passage(row, held[rank][1], shape)
            arrives = sent.pop((_side(action), rank, action.chunk, action.micro_batch), None) if action.kind != "W" else None
            arrives = np.zeros(shape) if arrives is None else arrives
            clock = (known[key] + np.concatenate([clocks[rank], arrives[None]])).max(axis=1)
            if ready is not None and action.kind == "F" and (rank, action.chunk) not in started:
                started.add((rank, action.chunk))
                clock[0] = np.maximum(clock[0], ready[..., rank, action.chunk])
            clocks[rank] = clock
            held[rank] = (stage, row[-1][2]) if action.kind in "BW" and row else (-1, nothing)
            target = order.target(rank, action)
            if target is not None and target[0] == rank:
                sent[_side(action), *target, action.micro_batch] = clock[0]
            elif target is not None:
                line[rank] = sent[_side(action), *target, action.micro_batch] = np.maximum(line[rank], clock[0]) + hop
    done = []
    for (last, _, stream), (_, reduce) in zip(clocks, held, strict=True):
        stream = np.where(np.asarray(reduce) > 0, np.maximum(stream, last) + reduce, stream)
        done.append(np.maximum(stream, last))
    return np.stack(done, axis=-1)
