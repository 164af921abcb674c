"""Replay every rank of a step program as a max-plus recurrence over its fixed order, vectorised over ranks.

The program has one class of ranks per pipeline stage; a node stands for the vector of the ranks of its stage, each with a
duration of its own. What overlaps or shares is in the durations beforehand: rates are not resolved while it runs, as
`simulator.engine.events` would be able to.

Notes
-----
With ``a_n(r)`` the time at which rank r is ready for node n and ``d_n(r)`` its duration there::

    a_n(r) = max(0, max over the nodes m that n waits for of e_m(r))
    e_n(r) = a_n(r) + d_n(r)                                          a kernel or a message
    e_n(r) = max of a_n over the group of r + max of d_n over it      a collective

A node waits for what it needs and for the node before it on its stream. A message goes to the rank of the same index in
the other stage, so an index means the same in all vectors.

References
----------
Baccelli, Cohen, Olsder, Quadrat, "Synchronization and Linearity", 1992, chapter 2 (max-plus recurrences of event graphs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from simulator.engine.order import RankProgram

#: seconds of a node: one number for all ranks of its stage, or one for each
Durations = Callable[[int], "float | np.ndarray"]


@dataclass(frozen=True, slots=True)
class Replay:
    """What every rank did, seconds; arrays of shape (stages, ranks).

    Parameters
    ----------
    end_s : ndarray
        End of the rank's last operation.
    compute_s : ndarray
        Sum of its kernels.
    exposed_s : ndarray
        Communication that the compute stream waited for while it was under way. The transfer of a message from another
        stage and the waiting for slower members of a group are not in it.
    host_s : ndarray
        What the compute stream waited for the host to launch beside no communication, in pairs; alone, a wait of its own says so
        and is one of the kernels.
    collective_s : ndarray
        Sum of its collectives, each as long as that of the slowest member; exposed or not.
    ends : ndarray of shape (nodes, ranks), optional
        End of every node on every rank of its stage.
    """

    end_s: np.ndarray
    compute_s: np.ndarray
    exposed_s: np.ndarray
    host_s: np.ndarray
    collective_s: np.ndarray
    ends: np.ndarray | None


def longest(values: np.ndarray, size: int, stride: int) -> np.ndarray:
    """Return the maximum over each group of `size` ranks `stride` apart.

    Parameters
    ----------
    values : ndarray of shape (..., ranks)

    Returns
    -------
    ndarray of shape (..., groups, 1, stride)
        Broadcasts against ``values.reshape(..., -1, size, stride)``.
    """
    x = values.reshape(*values.shape[:-1], -1, size, stride)
    while size > 1 and size % 2 == 0:  # by halves: five times as fast as numpy's reduction over a short axis
        size //= 2
        x = np.maximum(x[..., :size, :], x[..., size:, :])
    return x if size == 1 else x.max(axis=-2, keepdims=True)


class _Run:
    """The clocks of one replay."""

    def __init__(self, program: RankProgram, durations: Durations, keep: bool):
        self.program, self.durations = program, durations
        shape = (program.stages, program.ranks)
        self.ends = np.empty((len(program), program.ranks)) if keep else None
        pool = list(np.empty((max(program.slot, default=0) + 1, program.ranks)))
        self.rows = [pool[s] for s in program.slot] if self.ends is None else list(self.ends)
        self.lasted: list[float | np.ndarray] = [0.0] * len(pool)  # collectives, by slot
        self.lengths = [np.empty(program.ranks) for _ in pool]
        self.scratch, self.both, self.zero = np.empty(program.ranks), np.empty((2, program.ranks)), np.zeros(program.ranks)
        self.compute = [np.zeros(program.ranks) for _ in range(program.stages)]
        self.compute_all, self.exposed_all = [0.0] * program.stages, [0.0] * program.stages  # what is the same on all ranks
        self.exposed = [np.zeros(program.ranks) for _ in range(program.stages)]
        self.host = [np.zeros(program.ranks) for _ in range(program.stages)]
        self.collect = [np.zeros(program.ranks) for _ in range(program.stages)]
        self.collect_all = [0.0] * program.stages
        self.end = np.zeros(shape)

    def begin(self, node: int) -> np.ndarray:
        """Return when each rank is ready for `node`: a vector that may not be written to."""
        waits, rows = self.program.before[node], self.rows
        if len(waits) == 1:
            return rows[waits[0]]
        if not waits:
            return self.zero
        out = self.scratch
        np.maximum(rows[waits[0]], rows[waits[1]], out=out)
        for other in waits[2:]:
            np.maximum(out, rows[other], out=out)
        return out

    def collective(self, nodes: tuple[int, ...]) -> None:
        """Run collectives, of several stages if they meet, that start together and last as long as the longest."""
        program, ready, length = self.program, None, None
        for node in nodes:
            size, stride = program.group[node]
            arrives, takes = self.begin(node), self.durations(node)
            if isinstance(takes, np.ndarray):  # both maxima at once
                both = np.empty((2, program.ranks)) if len(nodes) > 1 else self.both
                both[0], both[1] = arrives, takes
                arrives, takes = longest(both, size, stride)
            else:
                arrives = longest(arrives, size, stride)
            if ready is None:
                ready, length = arrives if len(nodes) == 1 else arrives.copy(), takes
            else:
                ready, length = np.maximum(ready, arrives), np.maximum(length, takes)
        assert ready is not None
        assert length is not None
        for node in nodes:
            stage, slot, shape = program.stage[node], program.slot[node], (-1, *program.group[node])
            np.add(ready, length, out=self.rows[node].reshape(shape))
            if isinstance(length, np.ndarray):
                each = self.lasted[slot] = self.lengths[slot]
                np.copyto(each.reshape(shape), length)
                self.collect[stage] += each
            else:
                self.lasted[slot] = length
                self.collect_all[stage] += length

    def kernel(self, node: int, length: float | np.ndarray) -> None:
        """Add a kernel, and the communication that it had to wait for, to the sums of its ranks."""
        stage = self.program.stage[node]
        if isinstance(length, np.ndarray):
            self.compute[stage] += length
        else:
            self.compute_all[stage] += length
        waits = self.program.exposing.get(node)
        talked = 0.0 if waits is None else self.expose(stage, *waits)
        if node in self.program.launching:
            kernel, launched = self.program.launching[node]
            since = self.rows[kernel] if kernel >= 0 else self.zero
            gap = np.maximum(self.rows[node] - length - since - talked, 0.0)
            self.host[stage] += np.minimum(self.since(since, launched), gap)

    def since(self, since: np.ndarray, chain: tuple[int, ...]) -> np.ndarray:
        """Return how long `chain` was under way after `since`."""
        slot, lasted = self.program.slot, self.lasted
        return sum((np.minimum(np.maximum(self.rows[link] - since, 0.0), lasted[slot[link]]) for link in chain), self.zero)

    def expose(self, stage: int, kernel: int, chains: tuple[tuple[tuple[int, ...], bool], ...]) -> float | np.ndarray:
        """Add, and return, the time since `kernel` during which `chains` were under way; of two at once the longer counts."""
        slot, lasted = self.program.slot, self.lasted
        if len(chains) == 1 and chains[0][1]:
            length = sum(lasted[slot[link]] for link in chains[0][0])
            if isinstance(length, np.ndarray):
                self.exposed[stage] += length
            else:
                self.exposed_all[stage] += length
            return length
        since, most = self.rows[kernel] if kernel >= 0 else self.zero, self.zero
        for chain, _ in chains:
            most = np.maximum(most, self.since(since, chain))
        self.exposed[stage] += most
        return most


def replay_ranks(program: RankProgram, durations: Durations, keep: bool = False) -> Replay:
    """Return what every rank did.

    Parameters
    ----------
    program : RankProgram
    durations : callable
        ``durations(node)``: seconds of a node, one number for all ranks of its stage or an ndarray of shape (ranks,);
        called once per node.
    keep : bool
        Keep the end of every node on every rank: 8 bytes x nodes x ranks of a stage.
    """
    run = _Run(program, durations, keep)
    rows, computes, group, meeting = run.rows, program.computes, program.group, program.meeting
    launches = {node for _, launched in program.launching.values() for node in launched}
    final = [False] * len(program)
    for node in program.sinks:
        final[node] = True
    for first in program.order:
        nodes = meeting.get(first)
        if nodes is not None or group[first][0] > 1:
            run.collective(nodes or (first,))
        else:
            length = durations(first)
            np.add(run.begin(first), length, out=rows[first])
            if computes[first]:
                run.kernel(first, length)
            elif first in launches:
                run.lasted[program.slot[first]] = length
        for node in nodes or ((first,) if final[first] else ()):
            end = run.end[program.stage[node]]
            np.maximum(end, rows[node], out=end)
    for stage in range(program.stages):
        if -1 - stage in program.exposing:
            run.expose(stage, *program.exposing[-1 - stage])
    compute, exposed, collective = (
        np.stack([x + y for x, y in zip(vectors, scalars, strict=True)])
        for vectors, scalars in ((run.compute, run.compute_all), (run.exposed, run.exposed_all), (run.collect, run.collect_all))
    )
    return Replay(run.end, compute, exposed, np.stack(run.host), collective, run.ends)


def critical_path(program: RankProgram, replay: Replay) -> list[tuple[int, int, float, float]]:
    """Return the chain of operations that decides when the step ends, first to last.

    Parameters
    ----------
    replay : Replay
        With `ends` kept.

    Returns
    -------
    list of (int, int, float, float)
        Node, index of the rank in its stage, start and end, seconds: each starts when the one before it ends. Of a
        collective, the rank that came last.
    """
    ends = replay.ends
    if ends is None:
        raise ValueError("the critical path needs replay_ranks(..., keep=True)")
    together = {node: nodes for nodes in program.meeting.values() for node in nodes}
    rank, path = np.arange(program.ranks), []
    node = max(program.sinks, key=lambda n: ends[n].max(), default=-1)
    index = int(ends[node].argmax()) if node >= 0 else 0
    while node >= 0:
        end, latest, cause, at = float(ends[node, index]), 0.0, -1, index
        for one in together.get(node, (node,)):
            size, stride = program.group[one]
            members = rank[index % stride + index // (size * stride) * size * stride :: stride][:size]
            for other in program.before[one]:
                member = int(members[ends[other, members].argmax()])
                if ends[other, member] > latest or cause < 0:
                    latest, cause, at, node = float(ends[other, member]), other, member, one
        path.append((node, at, latest, end))
        node, index = cause, at
    return path[::-1]
