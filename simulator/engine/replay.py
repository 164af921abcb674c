"""Replay a pipeline schedule as a max-plus recurrence, for many plans at once.

Coarser than `simulator.engine.events`: an action of `replay` is one number of seconds, a message one latency; `replay_streams`
also knows the streams of a rank, which pairs and collectives for every micro-batch need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from simulator.schedules import Action, Schedule, actions
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
    for rank, action in order.order:
        assert isinstance(action, Action)
        arrives = mail.take(rank, action)
        begin = free[rank] if arrives is None else np.maximum(free[rank], arrives)
        end = begin + durations[action.kind][order.held[rank][action.chunk]]
        if ready is not None and action.kind == "F" and (rank, action.chunk) not in started:
            started.add((rank, action.chunk))
            end = np.maximum(end, ready[..., rank, action.chunk])
        free[rank] = end
        if action.kind in "BW":
            last[rank][action.chunk] = end
        left = mail.send(rank, action, end)
        if blocking:
            free[rank] = left
    return np.stack([np.stack(row, axis=-1) for row in last], axis=-2)


class _Mail:
    """Messages under way; those of a rank leave one after the other, what stays on a rank takes no time."""

    def __init__(self, order: Schedule, hop: Number):
        self.order, self.hop = order, hop
        self.line: list[Number] = [0.0] * order.pp
        self.sent: dict[tuple[str, int, int, int], Number] = {}

    def take(self, rank: int, action: Action) -> Number | None:
        """Return when the input of `action` arrives; None where nothing sends it."""
        return self.sent.pop((_side(action), rank, action.chunk, action.micro_batch), None) if action.kind != "W" else None

    def send(self, rank: int, action: Action, end: Number) -> Number:
        """Hand the result of `action` on to whoever waits for it; return when it has left the rank, `end` where nothing leaves."""
        target = self.order.target(rank, action)
        if target is None:
            return end
        if target[0] != rank:
            end = self.line[rank] = np.maximum(self.line[rank], end) + self.hop
        self.sent[_side(action), *target, action.micro_batch] = end
        return end


def _side(action: Action) -> str:
    """Messages go forward with activations or back with gradients."""
    return "F" if action.kind == "F" else "G"


@dataclass(frozen=True, slots=True)
class Lap:
    """One block of an action, seconds.

    Parameters
    ----------
    runs : tuple
        Segments of (stream, seconds), one after the other; the operations of a segment run side by side.
    gather, reduce : Number
        The gather that it waits for, and the reduction that follows it, on the data-parallel stream; 0 for none.
    """

    runs: Runs
    gather: Number = 0.0
    reduce: Number = 0.0


@dataclass(frozen=True, slots=True)
class Passage:
    """What an entry does to the clocks of its rank, as a max-plus matrix.

    Parameters
    ----------
    matrix : ndarray of shape (4 + n, 4 + n, ...)
        ``new = max over j of (matrix[:, j] + old[j])`` for an entry of n actions. Clocks: end of the entry, end of the segment
        before its last block (when the next gather may start), the data-parallel stream, the block whose reduction waits. The
        other n: of the old ones the arrival of each action's message, of the new ones the end of each action.
    held : Number
        The reduction that waits until the next block has asked for its gather; 0 for none.

    Notes
    -----
    Baccelli, Cohen, Olsder, Quadrat, "Synchronization and Linearity", 1992, chapter 2.
    """

    matrix: np.ndarray
    held: Number

    def after(self, clocks: np.ndarray, messages: Sequence[Number | None]) -> np.ndarray:
        """Return the clocks after an entry; no message is one that was there from the start."""
        new = (self.matrix[:, :4] + clocks).max(axis=1)
        for column, arrives in enumerate(messages, start=4):
            if arrives is not None:
                np.maximum(new, self.matrix[:, column] + arrives, out=new)
        return new

    @classmethod
    def of(cls, laps: Sequence[Sequence[Lap]], held: Number, shape: tuple[int, ...]) -> Passage:
        """Return what an entry does: the laps of its action, or those of the two of a pair, which take turns by segments.

        Parameters
        ----------
        held : Number
            Reduction that the entry before left waiting.
        shape : tuple of int
            That of all seconds, one per plan.
        """
        count = 4 + len(laps)
        unit = np.full((count, count, *shape), -np.inf)
        unit[range(count), range(count)] = 0.0
        walk = _Walk(unit[0], unit[2], [(unit[3], held)])
        threads = [_Thread(unit[0], unit[1]) for _ in laps]
        walk.take_turns(threads, laps, unit[4:])
        last, earlier = (reduce(np.maximum, [getattr(thread, name) for thread in threads]) for name in ("last", "earlier"))
        behind, left = walk.waiting[-1] if walk.waiting else (last, 0.0)
        return cls(np.stack([last, earlier, walk.parallel, behind, *(thread.last for thread in threads)]), left)


@dataclass(slots=True)
class _Thread:
    """The chain of one action: its end so far, and the end before the block that it is in."""

    last: np.ndarray
    earlier: np.ndarray


class _Walk:
    """The streams of one rank while an entry runs; times are vectors of distances from the clocks at its beginning."""

    def __init__(self, free: np.ndarray, parallel: np.ndarray, waiting: list[tuple[np.ndarray, Number]]):
        self.free, self.parallel, self.waiting = free, parallel, waiting
        self.streams: dict[str, np.ndarray] = {}

    def take_turns(self, threads: Sequence[_Thread], laps: Sequence[Sequence[Lap]], messages: Sequence[np.ndarray]) -> None:
        """Run the actions of an entry, a segment of each in turn."""
        turns = [self.steps(thread, row, message) for thread, row, message in zip(threads, laps, messages, strict=True)]
        while turns:
            turns = [turn for turn in turns if next(turn, None) is not None]

    def steps(self, thread: _Thread, laps: Sequence[Lap], message: np.ndarray) -> Iterator[bool]:
        """Run the laps of one action; yields after each segment."""
        waits: list[tuple[Number, np.ndarray]] = [(1.0, message)]
        for lap in laps:
            if np.any(np.asarray(lap.gather) > 0):
                self._talk(thread.earlier, lap.gather)
                waits.append((lap.gather, self.parallel))
            for start, seconds in self.waiting:
                self._talk(start, seconds)
            self.waiting.clear()
            thread.earlier = thread.last
            for segment in lap.runs:
                begin = thread.last
                for there, end in waits:
                    begin = np.where(np.asarray(there) > 0, np.maximum(begin, end), begin)
                waits.clear()
                ends = []
                for stream, seconds in segment:
                    self.streams[stream] = np.maximum(begin, self.streams.get(stream, self.free)) + seconds
                    ends.append(self.streams[stream])
                thread.last = reduce(np.maximum, ends)
                yield True
            if np.any(np.asarray(lap.reduce) > 0):
                self.waiting.append((thread.last, lap.reduce))

    def _talk(self, start: np.ndarray, seconds: Number) -> None:
        done = np.maximum(self.parallel, start) + seconds
        self.parallel = np.where(np.asarray(seconds) > 0, done, self.parallel)


def entry_s(laps: Sequence[Sequence[Lap]], shape: tuple[int, ...]) -> Number:
    """Return how long an entry takes at least: with every message there and every stream free when it begins.

    Parameters
    ----------
    laps, shape
        As for `Passage.of`.
    """
    walk, threads = _Walk(np.zeros(shape), np.zeros(shape), []), [_Thread(np.zeros(shape), np.zeros(shape)) for _ in laps]
    walk.take_turns(threads, laps, [np.zeros(shape)] * len(laps))
    return reduce(np.maximum, [thread.last for thread in threads])


def replay_streams(
    order: Schedule,
    laps: Callable[[tuple[tuple[str, int], ...]], Sequence[Sequence[Lap]]],
    shape: tuple[int, ...],
    hop: Number,
    ready: Number | None = None,
    busy: Number | float = 0.0,
    blocking: bool = False,
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
    alike : sequence of int, optional
        For every stage one that has the same blocks; what their entries do is then found once.

    Returns
    -------
    ndarray (..., pp, vpp), ndarray (..., pp)
    """
    alike = range(order.stages) if alike is None else alike
    busy = np.broadcast_to(busy, (*shape, order.pp))
    clocks = [np.stack([np.zeros(shape), np.zeros(shape), busy[..., r], np.zeros(shape)]) for r in range(order.pp)]
    held: list[tuple[tuple | None, Number]] = [(None, 0.0)] * order.pp  # whose reduction waits, and its seconds
    known: dict[tuple, Passage] = {}
    mail, started = _Mail(order, hop), set()
    last: list[list[Number]] = [[np.zeros(shape)] * order.vpp for _ in range(order.pp)]
    for rank, entry in order.order:
        parts = tuple(actions((entry,)))
        what = tuple((a.kind, alike[order.held[rank][a.chunk]]) for a in parts)
        key = (what, held[rank][0])
        if key not in known:
            known[key] = Passage.of(laps(what), held[rank][1], shape)
        new = known[key].after(clocks[rank], [mail.take(rank, a) for a in parts])
        for i, a in enumerate(parts, start=4):
            if ready is not None and a.kind == "F" and (rank, a.chunk) not in started:
                started.add((rank, a.chunk))
                new[i] = np.maximum(new[i], ready[..., rank, a.chunk])
                new[0] = np.maximum(new[0], new[i])
        left_over = known[key].held
        clocks[rank], held[rank] = new[:4], (what if np.any(left_over) else None, left_over)
        ended = list(zip(parts, new[4:], strict=True))
        for a, end in sorted(ended, key=lambda part: float(part[1].sum())) if len(ended) > 1 else ended:
            if a.kind in "BW":
                last[rank][a.chunk] = end
            left = mail.send(rank, a, end)
            if blocking:
                new[0] = np.maximum(new[0], left)
    done = [np.maximum(np.where(np.asarray(left) > 0, np.maximum(c[2], c[3]) + left, c[2]), c[0]) for c, (_, left) in zip(clocks, held)]
    return np.stack([np.stack(row, axis=-1) for row in last], axis=-2), np.stack(done, axis=-1)
