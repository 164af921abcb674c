"""Replay a pipeline schedule as a max-plus recurrence, for many plans at once.

Coarser than `simulator.engine.events`: an action of `replay` is one number of seconds, a message one latency; `replay_streams`
also knows the streams of a rank, which pairs and collectives for every micro-batch need.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from simulator.schedules import EXCHANGE, Schedule, Step, turn_ends
from simulator.units import Number

#: segments of operations side by side, each a stream and its seconds
Runs = tuple[tuple[tuple[str, Number], ...], ...]


def replay(order: Schedule, seconds: Mapping[str, Number], hop: Number, ready: Number | None = None, blocking: bool = False) -> np.ndarray:
    """Return when each chunk of each rank ends its last backward, seconds.

    Parameters
    ----------
    order : Schedule
        Without pairs.
    seconds : mapping of str to ndarray (..., stages)
        One F, B, I or W on each stage.
    hop : Number (...)
        A message between ranks.
    ready : ndarray (..., pp, vpp), optional
        Earliest end of the first forward of a chunk, when its parameters have to arrive first.
    blocking : bool
        Whether a rank starts its next action only when its message has left, as with synchronous sends.

    Returns
    -------
    ndarray (..., pp, vpp)

    Notes
    -----
    An action starts when its rank is free and its message is there; a rank's messages leave one after the other:
    ``end = max(end of the rank's previous action, arrival) + duration``, ``arrival = max(previous arrival, end) + hop``.
    """
    shape = next(iter(seconds.values())).shape[:-1]
    durations = {kind: [x[..., s].copy() for s in range(x.shape[-1])] for kind, x in seconds.items()}
    free: list[Number] = [np.zeros(shape)] * order.pp
    mail = _Mail(order, hop)
    last: list[list[Number]] = [[np.zeros(shape)] * order.vpp for _ in range(order.pp)]
    started = set()
    for rank, _, (step,) in order.steps:
        kind, chunk = step.kind, step.chunk
        end = (free[rank] if step.takes is None else np.maximum(free[rank], mail.take(step))) + durations[kind][step.stage]
        if ready is not None and kind == "F" and (rank, chunk) not in started:
            started.add((rank, chunk))
            end = np.maximum(end, ready[..., rank, chunk])
        free[rank] = end
        if kind in "BW":
            last[rank][chunk] = end
        left = mail.send(rank, step, end)
        if blocking:
            free[rank] = left
    return np.stack([np.stack(row, axis=-1) for row in last], axis=-2)


class _Mail:
    """Messages under way; those of a rank leave one after the other, what stays on a rank takes no time."""

    def __init__(self, order: Schedule, hop: Number):
        self.hop = hop
        self.line: list[Number] = [0.0] * order.pp
        self.sent: dict[int, Number] = {}

    def take(self, step: Step) -> Number | None:
        """Return when the input of an action arrives; None where nothing sends it."""
        return None if step.takes is None else self.sent.pop(step.takes)

    def send(self, rank: int, step: Step, end: Number) -> Number:
        """Hand the result of an action on to whoever waits for it; return when it has left the rank, `end` where nothing leaves."""
        if step.leaves:
            end = self.line[rank] = np.maximum(self.line[rank], end) + self.hop
        if step.sends is not None:
            self.sent[step.sends] = end
        return end


@dataclass(frozen=True, slots=True)
class Lap:
    """One block of an action, seconds.

    Parameters
    ----------
    runs : tuple
        Segments of (stream, seconds), one after the other; the operations of a segment run side by side.
    gather, reduce : Number
        The gather that it waits for, and the reduction that follows it, on the data-parallel stream; 0 takes no time. None is no
        reduction: one of no time still takes its turn among those that wait.
    queued : bool
        Whether its all-to-alls start behind the kernels launched before them (`simulator.scenario.plan.Overlap`).
    by_segments : bool
        In a pair: `simulator.schedules.by_segments`.
    host : Number, optional
        In a pair: how long the host is busy with it, which serves both actions; the block ends no sooner.
    """

    runs: Runs
    gather: Number = 0.0
    reduce: Number | None = None
    queued: bool = False
    by_segments: bool = False
    host: Number | None = None


@dataclass(frozen=True, slots=True)
class Passage:
    """What an entry does to the clocks of its rank, as a max-plus matrix.

    Parameters
    ----------
    matrix : ndarray of shape (4 + n, 4 + n, ...)
        ``new = max over j of (matrix[:, j] + old[j])`` for an entry of n actions. Clocks: end of the entry, when its last h
        blocks began (and gathers of later ones may start), the newest first, the data-parallel stream, the ends of up to h blocks
        whose reductions wait. The other n: of the old ones the arrival of each action's message, of the new ones the end of each
        action. h is how many blocks are gathered ahead, at least 1.
    held : tuple of (object, Number)
        The reductions that wait until later blocks have asked for their gathers, the oldest first, each with a key of its own.

    Notes
    -----
    Baccelli, Cohen, Olsder, Quadrat, "Synchronization and Linearity", 1992, chapter 2.
    """

    matrix: np.ndarray
    held: Held

    def after(self, clocks: np.ndarray, messages: Sequence[Number | None]) -> np.ndarray:
        """Return the clocks after an entry; no message is one that was there from the start."""
        new = (self.matrix[:, : len(clocks)] + clocks).max(axis=1)
        for column, arrives in enumerate(messages, start=len(clocks)):
            if arrives is not None:
                np.maximum(new, self.matrix[:, column] + arrives, out=new)
        return new

    @classmethod
    def of(cls, laps: Sequence[Sequence[Lap]], held: Held, shape: tuple[int, ...], what: tuple, ahead: int) -> Passage:
        """Return what an entry does: the laps of its action, or those of the two of a pair, which take turns by segments.

        Parameters
        ----------
        held : tuple of (object, Number)
            Reductions that the entries before left waiting.
        shape : tuple of int
            That of all seconds, one per plan.
        what : tuple
            The entry, to tell its reductions from those of others.
        ahead : int
            Blocks that are gathered ahead.
        """
        h = max(ahead, 1)
        count = _clocks(ahead) + len(laps)
        unit = np.full((count, count, *shape), -np.inf)
        unit[range(count), range(count)] = 0.0
        waiting = [(key, unit[2 + h + n], seconds) for n, (key, seconds) in enumerate(held)]
        walk = _Walk(unit[0], unit[1 + h], waiting, ahead)
        threads = [_Thread(unit[0], list(unit[1 : 1 + h])) for _ in laps]
        walk.take_turns(threads, laps, unit[_clocks(ahead) :], what)
        last = reduce(np.maximum, [thread.last for thread in threads])
        begun = [reduce(np.maximum, [thread.begun[n] for thread in threads]) for n in range(h)]
        behind = [end for _, end, _ in walk.waiting] + [last] * (h - len(walk.waiting))
        matrix = np.stack([last, *begun, walk.parallel, *behind, *(thread.last for thread in threads)])
        return cls(matrix, tuple((key, seconds) for key, _, seconds in walk.waiting))


#: reductions that wait, the oldest first: what tells one from others, and its seconds
Held = tuple[tuple[Hashable, Number], ...]


def _clocks(ahead: int) -> int:
    """Return the clocks that a rank keeps from entry to entry (`Passage`)."""
    return 2 + 2 * max(ahead, 1)


@dataclass(slots=True)
class _Thread:
    """The chain of one action: its end so far, and when its blocks began, the newest first."""

    last: np.ndarray
    begun: list[np.ndarray]


class _Walk:
    """The streams of one rank while an entry runs; times are vectors of distances from the clocks at its beginning."""

    def __init__(self, free: np.ndarray, parallel: np.ndarray, waiting: list[tuple[Hashable, np.ndarray, Number]], ahead: int):
        self.free, self.parallel, self.waiting, self.ahead = free, parallel, waiting, ahead
        self.streams: dict[str, np.ndarray] = {}

    def take_turns(
        self, threads: Sequence[_Thread], laps: Sequence[Sequence[Lap]], messages: Sequence[np.ndarray], what: tuple = ()
    ) -> None:
        """Run the actions of an entry in turn (`turn_ends`); `what` tells its reductions from those of others."""
        turns = [self.steps(thread, row, at, (what, n)) for n, (thread, row, at) in enumerate(zip(threads, laps, messages, strict=True))]
        if not any(lap.by_segments for row in laps for lap in row):
            turns.reverse()
        while turns:
            turns = [turn for turn in turns if next(turn, None) is not None]

    def steps(self, thread: _Thread, laps: Sequence[Lap], message: np.ndarray, of: tuple[Hashable, int]) -> Iterator[bool]:
        """Run the laps of one action, the first of a pair the forward; yields where its turn ends."""
        waits: list[tuple[Number, np.ndarray]] = [(1.0, message)]
        for number, lap in enumerate(laps):
            if np.any(np.asarray(lap.gather) > 0):
                self._talk(thread.begun[self.ahead - 1] if self.ahead else thread.last, lap.gather)
                waits.append((lap.gather, self.parallel))
            while len(self.waiting) > max(self.ahead - 1, 0):
                _, start, seconds = self.waiting.pop(0)
                self._talk(start, seconds)
            thread.begun = [thread.last, *thread.begun[:-1]]
            if lap.host is not None:
                launched = self.streams["host"] = np.maximum(thread.last, self.streams.get("host", self.free)) + lap.host
            exchanges = 0
            for segment in lap.runs:
                streams = [stream for stream, _ in segment]
                before, after = turn_ends(streams, of[1] == 0, exchanges, lap.by_segments)
                exchanges += EXCHANGE in streams
                if before:
                    yield True
                begin = thread.last
                for there, end in waits:
                    begin = np.where(np.asarray(there) > 0, np.maximum(begin, end), begin)
                waits.clear()
                if lap.queued and EXCHANGE in streams:
                    begin = np.maximum(begin, self.streams.get("compute", self.free))
                ends = []
                for stream, seconds in segment:
                    self.streams[stream] = np.maximum(begin, self.streams.get(stream, self.free)) + seconds
                    ends.append(self.streams[stream])
                thread.last = reduce(np.maximum, ends)
                if after:
                    yield True
            if lap.host is not None:
                thread.last = np.maximum(thread.last, launched)
                if lap.by_segments:
                    yield True
            if lap.reduce is not None:
                self.waiting.append(((of, number), thread.last, lap.reduce))

    def _talk(self, start: np.ndarray, seconds: Number) -> None:
        done = np.maximum(self.parallel, start) + seconds
        self.parallel = np.where(np.asarray(seconds) > 0, done, self.parallel)


def entry_s(laps: Sequence[Sequence[Lap]], shape: tuple[int, ...]) -> Number:
    """Return how long an entry without gathers takes at least: with every message there and every stream free when it begins.

    Parameters
    ----------
    laps, shape
        As for `Passage.of`.
    """
    start = np.zeros(shape)
    walk, threads = _Walk(start, start, [], 0), [_Thread(start, [start]) for _ in laps]
    walk.take_turns(threads, laps, [start] * len(laps))
    return reduce(np.maximum, [thread.last for thread in threads])


def replay_streams(
    order: Schedule,
    laps: Callable[[tuple[tuple[str, int], ...]], Sequence[Sequence[Lap]]],
    shape: tuple[int, ...],
    hop: Number,
    ready: Number | None = None,
    busy: Number | float = 0.0,
    blocking: bool = False,
    ahead: int = 1,
    alike: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return when each chunk of each rank ends its last backward, and when each rank has reduced what it reduces on the way.

    Parameters
    ----------
    order, hop, ready, blocking
        As for `replay`; with pairs.
    laps : callable
        Returns the laps of an entry's actions from their (kind, stage).
    shape : tuple of int
        That of all seconds, one per plan.
    busy : ndarray (..., pp)
        When the data-parallel stream of each rank is free for the first time.
    ahead : int
        Blocks that are gathered ahead of the one that runs.
    alike : sequence of int, optional
        For every stage one that has the same blocks; what their entries do is then found once.

    Returns
    -------
    ndarray (..., pp, vpp), ndarray (..., pp)
    """
    alike = range(order.stages) if alike is None else alike
    busy = np.broadcast_to(busy, (*shape, order.pp))
    count, parallel = _clocks(ahead), 1 + max(ahead, 1)
    clocks = [np.zeros((count, *shape)) for _ in range(order.pp)]
    for rank, own in enumerate(clocks):
        own[parallel] = busy[..., rank]
    held: list[Held] = [()] * order.pp
    known: dict[tuple, Passage] = {}
    mail, started = _Mail(order, hop), set()
    last: list[list[Number]] = [[np.zeros(shape)] * order.vpp for _ in range(order.pp)]
    for rank, _, parts in order.steps:
        what = tuple((a.kind, alike[a.stage]) for a in parts)
        key = (what, tuple(of for of, _ in held[rank]))
        if key not in known:
            known[key] = Passage.of(laps(what), held[rank], shape, what, ahead)
        new = known[key].after(clocks[rank], [mail.take(a) for a in parts])
        for i, a in enumerate(parts, start=count):
            if ready is not None and a.kind == "F" and (rank, a.chunk) not in started:
                started.add((rank, a.chunk))
                new[i] = np.maximum(new[i], ready[..., rank, a.chunk])
                new[0] = np.maximum(new[0], new[i])
        clocks[rank], held[rank] = new[:count], known[key].held
        ended = list(zip(parts, new[count:], strict=True))
        for a, end in sorted(ended, key=lambda part: float(part[1].sum())) if len(ended) > 1 else ended:
            if a.kind in "BW":
                last[rank][a.chunk] = end
            left = mail.send(rank, a, end)
            if blocking:
                new[0] = np.maximum(new[0], left)
    done = []
    for own, left in zip(clocks, held, strict=True):
        end = own[parallel]
        for behind, (_, seconds) in zip(own[parallel + 1 :], left, strict=False):
            end = np.where(np.asarray(seconds) > 0, np.maximum(end, behind) + seconds, end)
        done.append(np.maximum(end, own[0]))
    return np.stack([np.stack(row, axis=-1) for row in last], axis=-2), np.stack(done, axis=-1)
