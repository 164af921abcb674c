"""Run a step program as discrete events in SimPy.

The engine knows streams, dependencies and meetings, and nothing of what a task does: a stream takes its nodes in order;
a node starts when the nodes that it needs have ended and every class that meets there has arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import simpy

from simulator.errors import DeadlockError


def run(
    queues: Mapping[tuple[int, str], Sequence[int]],
    needs: Sequence[tuple[int, ...]],
    meet: Sequence[int],
    seconds: np.ndarray,
    describe: Callable[[int], str] = str,
) -> tuple[np.ndarray, np.ndarray]:
    """Return start and end of every node, seconds.

    Parameters
    ----------
    queues : mapping
        Nodes of each (class, stream), in order.
    needs : sequence of tuple of int
        Nodes that must end before a node starts.
    meet : sequence of int
        Meeting of a node, or -1; the nodes of a meeting start together and last as long as the longest.
    seconds : ndarray of shape (nodes,)
        How long each takes.
    describe : callable
        Names a node in an error.

    Raises
    ------
    DeadlockError
        When streams wait for each other for ever; names the first node that each waits with.
    """
    env = simpy.Environment()
    count = len(needs)
    start, end = np.full(count, np.nan), np.full(count, np.nan)
    duration: list[float] = seconds.tolist()
    ended: list[bool] = [False] * count
    awaited: dict[int, simpy.Event] = {}
    gates = _Gates(env, meet, duration)
    starts, ends = [0.0] * count, [0.0] * count

    def stream(nodes: Sequence[int]) -> Iterator[simpy.Event]:
        for node in nodes:
            for need in needs[node]:
                if not ended[need]:
                    event = awaited.get(need)
                    if event is None:
                        event = awaited[need] = env.event()
                    yield event
            length = duration[node]
            if meet[node] >= 0:
                gate = gates.arrive(node)
                if gate is not None:
                    yield gate
                length = gates.longest[meet[node]]
            starts[node] = env.now
            if length > 0.0:
                yield env.timeout(length)
            ends[node] = env.now
            ended[node] = True
            waiters = awaited.pop(node, None)
            if waiters is not None:
                waiters.succeed()

    for nodes in queues.values():
        env.process(stream(nodes))
    env.run()
    if not all(ended):
        stuck = [next(n for n in nodes if not ended[n]) for nodes in queues.values() if not all(ended[n] for n in nodes)]
        raise DeadlockError(f"the step never ends: {'; '.join(describe(n) for n in stuck[:8])} wait for each other")
    start[:], end[:] = starts, ends
    return start, end


class _Gates:
    """Meetings: how many nodes each expects, and who has come."""

    def __init__(self, env: simpy.Environment, meet: Sequence[int], duration: Sequence[float]):
        self.env, self.meet = env, meet
        self.missing: dict[int, int] = {}
        self.longest: dict[int, float] = {}
        self.events: dict[int, simpy.Event] = {}
        for node, number in enumerate(meet):
            if number >= 0:
                self.missing[number] = self.missing.get(number, 0) + 1
                self.longest[number] = max(self.longest.get(number, 0.0), duration[node])

    def arrive(self, node: int) -> simpy.Event | None:
        """Return what to wait for; None for the last to come, which opens the gate."""
        number = self.meet[node]
        self.missing[number] -= 1
        event = self.events.get(number)
        if self.missing[number] == 0:
            if event is not None:
                event.succeed()
            return None
        if event is None:
            event = self.events[number] = self.env.event()
        return event
