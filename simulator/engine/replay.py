"""Replay a pipeline schedule as a max-plus recurrence, for many plans at once.

Coarser than `simulator.engine.events`: an action is one number of seconds, a message one latency. What a stream of
communication does beside the actions is not seen here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    Actions go in `waves`: those that wait for nothing in each other are computed together.
    """
    w, shape = waves(order), next(iter(seconds.values())).shape[:-1]
    durations = np.stack([np.moveaxis(seconds[kind], -1, 0) for kind in KINDS if kind in seconds])  # (kinds, stages, ...)
    free, end, line, sent = (np.zeros((w.actions + 1, *shape)) for _ in range(4))  # the last row stands for nothing to wait for
    together = {stages: np.stack(np.broadcast_arrays(*ends, np.zeros(shape))[:2]) for stages, ends in pairs.items()}
    first = None if ready is None else np.moveaxis(np.asarray(ready), (-2, -1), (0, 1))
    for wave in w.waves:
        begin = np.maximum(free[wave.before], sent[wave.source])
        ends = begin + durations[wave.kind, wave.stage]
        if len(wave.paired):  # the backward stands behind the forward in the streams; one that comes late runs by itself
            forward, backward = wave.paired.T
            both = np.stack([together[stages] for stages in wave.stages])
            ends[forward] = begin[forward] + both[:, 0]
            ends[backward] = np.maximum(begin[forward] + both[:, 1], ends[backward])
        if first is not None and len(wave.firsts):
            ends[wave.firsts] = np.maximum(ends[wave.firsts], first[wave.rank[wave.firsts], wave.chunk[wave.firsts]])
        end[wave.action] = free[wave.action] = ends
        leaves = np.maximum(line[wave.line], ends)
        line[wave.action] = np.where(wave.travels.reshape(-1, *[1] * len(shape)), leaves + hop, line[wave.line])
        sent[wave.action] = np.where(wave.travels.reshape(-1, *[1] * len(shape)), leaves + hop, ends)
        if len(wave.paired):
            _leave_in_turn(wave, ends, hop, line, sent, free)
    return np.moveaxis(end[w.last], (0, 1), (-2, -1))


def _leave_in_turn(wave: _Wave, ends: np.ndarray, hop: Number, line: np.ndarray, sent: np.ndarray, free: np.ndarray) -> None:
    """Send the two messages of every pair in the order of their ends, and free the rank when both have ended."""
    forward, backward = wave.paired.T
    nodes = wave.action[forward], wave.action[backward]
    free[nodes[0]] = free[nodes[1]] = np.maximum(ends[forward], ends[backward])
    before, extra = line[wave.line[forward]], [1] * np.ndim(hop)
    go = [wave.travels[which].reshape(-1, *extra) for which in (forward, backward)]
    sooner = ends[forward] <= ends[backward]

    def leave(clock: np.ndarray, which: np.ndarray, travels: np.ndarray) -> np.ndarray:
        return np.where(travels, np.maximum(clock, ends[which]) + hop, clock)

    lines = [leave(before, forward, go[0]), leave(before, backward, go[1])]
    after = leave(lines[0], backward, go[1]), leave(lines[1], forward, go[0])
    sent[nodes[0]] = np.where(go[0], np.where(sooner, lines[0], after[1]), ends[forward])
    sent[nodes[1]] = np.where(go[1], np.where(sooner, after[0], lines[1]), ends[backward])
    line[nodes[0]] = line[nodes[1]] = np.where(sooner, after[0], after[1])


KINDS = ("F", "B", "I", "W")


@dataclass(frozen=True)
class _Wave:
    """Actions that wait for nothing in each other: their numbers, and those of what each waits for.

    Parameters
    ----------
    action : ndarray (n,)
        Number of the action.
    kind, stage, rank, chunk : ndarray (n,)
    before, source, line : ndarray (n,)
        The rank's previous entry, the action whose message it needs, and the last one that has sent from its rank.
    travels : ndarray (n,)
        Whether its result goes to another rank.
    firsts : ndarray
        Places of first forwards of a chunk.
    paired : ndarray (pairs, 2)
        Places of the forward and backward of each pair.
    stages : list of (int, int)
        Stages of the two.
    """

    action: np.ndarray
    kind: np.ndarray
    stage: np.ndarray
    rank: np.ndarray
    chunk: np.ndarray
    before: np.ndarray
    source: np.ndarray
    line: np.ndarray
    travels: np.ndarray
    firsts: np.ndarray
    paired: np.ndarray
    stages: list[tuple[int, int]]


@dataclass(frozen=True)
class _Waves:
    """The `_Wave` of a schedule in order, how many actions there are, and the last backward of each rank and chunk."""

    waves: list[_Wave]
    actions: int
    last: np.ndarray


def waves(order: Schedule) -> _Waves:
    """Return the actions of a schedule in waves, numbered in the order of its dry run; worked out once for each schedule."""
    if "_waves" not in order.__dict__:
        order.__dict__["_waves"] = _in_waves(order)
    return order.__dict__["_waves"]


def _in_waves(order: Schedule) -> _Waves:
    kinds = [k for k in KINDS if any(a.kind == k for row in order.table for a in actions(row))]
    rows: list[tuple] = []
    nothing, number = -1, 0
    before, line = [nothing] * order.pp, [nothing] * order.pp
    messages: dict[tuple, int] = {}
    level: list[int] = []
    last = np.full((order.pp, order.vpp), nothing)
    started: set[tuple[int, int]] = set()
    for rank, entry in order.order:
        parts = tuple(actions((entry,)))
        sources = [
            messages.pop((_side(a), rank, a.chunk, a.micro_batch), nothing) if a.kind != "W" else nothing for a in parts
        ]
        mine = 1 + max((level[n] for n in (before[rank], line[rank], *sources) if n != nothing), default=-1)
        was = before[rank], line[rank]
        for action, source in zip(parts, sources, strict=True):
            target, place = order.target(rank, action), (rank, action.chunk)
            first = action.kind == "F" and place not in started
            started |= {place} if first else set()
            travels = target is not None and target[0] != rank
            stage = order.held[rank][action.chunk]
            rows.append((mine, number, kinds.index(action.kind), stage, rank, action.chunk, was[0], source, was[1], travels, first, len(parts)))
            level.append(mine)
            if target is not None:
                messages[_side(action), *target, action.micro_batch] = number
            if action.kind in "BW":
                last[place] = number
            before[rank] = number
            line[rank] = number if travels else line[rank]
            number += 1
        if len(parts) > 1 and any(row[9] for row in rows[-2:]):
            line[rank] = number - 1
    return _Waves(_cut(np.array(rows)), number, last)


def _cut(rows: np.ndarray) -> list[_Wave]:
    """Cut the actions into waves by their level."""
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    found = []
    for part in np.split(rows, np.flatnonzero(np.diff(rows[:, 0])) + 1):
        _, action, kind, stage, rank, chunk, before, source, line, travels, first, parts = part.T
        paired = np.flatnonzero(parts > 1).reshape(-1, 2)
        stages = [(int(stage[f]), int(stage[b])) for f, b in paired]
        found.append(
            _Wave(action, kind, stage, rank, chunk, before, source, line, travels.astype(bool), np.flatnonzero(first), paired, stages)
        )
    return found


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
