"""Put a step program of uniform ranks into an order that can be replayed, once for any number of replays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from simulator.errors import DeadlockError

#: the kernel before; chains of collectives, each with whether all of it comes after that kernel
Exposing = tuple[int, tuple[tuple[tuple[int, ...], bool], ...]]
#: the kernel before; what the host launches one after the other
Launching = tuple[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class RankProgram:
    """A step program in an order that can be replayed.

    Parameters
    ----------
    stages, ranks : int
        Pipeline stages, and ranks in each.
    order : list of int
        Every node after all that it waits for; the first node of a meeting stands for all of them.
    stage : list of int
    computes : list of bool
        Whether the node runs on the compute stream.
    group : list of (int, int)
        Size and stride of the groups that a collective spans inside the stage; size 1 for everything else.
    before : list of tuple of int
        What a node waits for.
    meeting : dict of int to tuple of int
        The nodes of different stages that start together, by the one that stands for them.
    exposing : dict of int to tuple
        For a kernel after communication: the kernel before it, and the chains of collectives that it waits for, latest
        first, each with whether all of it comes after that kernel. For the end of stage s, the key is ``-1 - s``.
    launching : dict of int to tuple
        For a kernel that waits for the host: the kernel before it, and what the host launches for it since that one needed it.
    sinks : list of int
        Nodes that no node of their stage waits for.
    slot : list of int
        Row of the working memory that holds a node's end until nothing needs it.
    """

    stages: int
    ranks: int
    order: list[int]
    stage: list[int]
    computes: list[bool]
    group: list[tuple[int, int]]
    before: list[tuple[int, ...]]
    meeting: dict[int, tuple[int, ...]]
    exposing: dict[int, Exposing]
    launching: dict[int, Launching]
    sinks: list[int]
    slot: list[int]

    def __len__(self) -> int:
        return len(self.stage)


def prepare(
    queues: Mapping[tuple[int, str], Sequence[int]],
    needs: Sequence[tuple[int, ...]],
    meet: Sequence[int],
    group: Sequence[tuple[int, int]],
    ranks: int,
    describe: Callable[[int], str] = str,
) -> RankProgram:
    """Return a step program in an order that can be replayed, with the working memory that it needs.

    Parameters
    ----------
    queues, needs, meet, describe
        As for `simulator.engine.events.run`; the classes are the pipeline stages, in order.
    group : sequence of (int, int)
        Size and stride of each node's groups inside the stage, ``(1, 1)`` for what is not a collective.
    ranks : int
        Ranks in one stage.

    Raises
    ------
    DeadlockError
        When nodes wait for each other for ever.
    """
    count = len(needs)
    stage, computes, previous = [0] * count, [False] * count, [-1] * count
    for (number, stream), nodes in queues.items():
        for earlier, node in zip([-1, *nodes[:-1]], nodes, strict=True):
            stage[node], computes[node], previous[node] = number, stream == "compute", earlier
    before = [_waits(needs, previous, node) for node in range(count)]
    members: dict[int, list[int]] = {}
    for node, number in enumerate(meet):
        if number >= 0:
            members.setdefault(number, []).append(node)
    meeting = {nodes[0]: tuple(nodes) for nodes in members.values()}
    order = _order(before, meeting, describe)
    waited = [False] * count
    for n, waits in enumerate(before):
        for m in waits:
            waited[m] = waited[m] or stage[m] == stage[n]
    sinks = [n for n in range(count) if not waited[n]]
    collective = [group[n][0] > 1 or meet[n] >= 0 for n in range(count)]
    exposing = _exposures(queues, needs, previous, stage, collective, sinks)
    launching = _launches(queues, before, stage, order, meeting)
    slot = _slots(order, before, meeting, exposing, launching)
    stages = max(stage, default=-1) + 1
    return RankProgram(stages, ranks, order, stage, computes, list(group), before, meeting, exposing, launching, sinks, slot)


def _waits(needs: Sequence[tuple[int, ...]], previous: Sequence[int], node: int) -> tuple[int, ...]:
    """Return what `node` waits for; the one before it on its stream is left out when something needed ends no earlier."""
    wanted, earlier = needs[node], previous[node]
    if len(wanted) > 1:
        wanted = tuple(dict.fromkeys(wanted))
    if earlier < 0 or earlier in wanted or any(earlier in needs[n] for n in wanted):
        return wanted
    return (*wanted, earlier)


def _order(before: Sequence[tuple[int, ...]], meeting: Mapping[int, tuple[int, ...]], describe: Callable[[int], str]) -> list[int]:
    """Return the nodes so that each follows what it waits for, depth first: a vector is used again while it is in the cache."""
    leader = list(range(len(before)))
    for first, nodes in meeting.items():
        for node in nodes:
            leader[node] = first
    missing, after = [0] * len(before), [[] for _ in before]
    for node, waits in enumerate(before):
        missing[leader[node]] += len(waits)
        for other in waits:
            after[leader[other]].append(leader[node])
    ready = [n for n in range(len(before) - 1, -1, -1) if leader[n] == n and not missing[n]]
    order = []
    while ready:
        node = ready.pop()
        order.append(node)
        for other in reversed(after[node]):
            missing[other] -= 1
            if not missing[other]:
                ready.append(other)
    if len(order) < len(set(leader)):
        stuck = [n for n in range(len(before)) if missing[leader[n]]]
        raise DeadlockError(f"the step never ends: {'; '.join(describe(n) for n in stuck[:8])} wait for each other")
    return order


def _exposures(
    queues: Mapping[tuple[int, str], Sequence[int]],
    needs: Sequence[tuple[int, ...]],
    previous: Sequence[int],
    stage: Sequence[int],
    collective: Sequence[bool],
    sinks: Sequence[int],
) -> dict[int, Exposing]:
    """Return which chains of collectives each kernel, and the end of each stage, waits for.

    A chain goes back to the first collective that an earlier kernel has waited for: that one cannot hold up anything now.
    """

    def own(node: int) -> Sequence[int]:
        return [m for m in needs[node] if stage[m] == stage[node]]

    def talks(node: int) -> Sequence[int]:
        return [m for m in needs[node] if collective[m] and stage[m] == stage[node]]

    exposing: dict[int, Exposing] = {}
    for (number, stream), kernels in queues.items():
        if stream != "compute":
            continue
        over: set[int] = set()
        tail = tuple(n for n in sinks if stage[n] == number)
        for kernel, node in zip([-1, *kernels], [*kernels, -1 - number], strict=True):
            last = talks(node) if node >= 0 else [n for n in tail if collective[n]]
            if not last:
                continue
            chains = []
            for link in last:
                chain = [link]
                while True:
                    link = (talks(link) or previous[link : link + 1])[-1]
                    if link < 0 or not collective[link] or link in over:
                        break
                    chain.append(link)
                chains.append((tuple(chain), kernel in own(chain[-1])))
            over.update(last)
            exposing[node] = kernel, tuple(chains)
    return exposing


def _launches(
    queues: Mapping[tuple[int, str], Sequence[int]],
    before: Sequence[tuple[int, ...]],
    stage: Sequence[int],
    order: Sequence[int],
    meeting: Mapping[int, tuple[int, ...]],
) -> dict[int, Launching]:
    """Return what the host of each stage launches for each kernel that waits for it, since the kernel before it."""
    hosts = {number: queue for (number, stream), queue in queues.items() if stream == "host"}
    done = [0] * len(before)  # how much of its queue the host has launched by the end of a node, at least
    if not hosts:
        return {}
    place = {node: at for queue in hosts.values() for at, node in enumerate(queue, start=1)}
    for first in order:
        for node in meeting.get(first, (first,)):
            done[node] = place.get(node, max((done[m] for m in before[node] if stage[m] == stage[node]), default=0))
    launching: dict[int, Launching] = {}
    for (number, stream), kernels in queues.items():
        if stream == "compute" and number in hosts:
            for earlier, node in zip([-1, *kernels[:-1]], kernels, strict=True):
                launched = tuple(hosts[number][done[earlier] if earlier >= 0 else 0 : done[node]])
                if launched:
                    launching[node] = earlier, launched
    return launching


def _slots(
    order: Sequence[int],
    before: Sequence[tuple[int, ...]],
    meeting: Mapping[int, tuple[int, ...]],
    exposing: Mapping[int, Exposing],
    launching: Mapping[int, Launching],
) -> list[int]:
    """Return a row of working memory for each node, used again once its last reader is done."""

    def reads(node: int) -> Iterable[int]:
        waits = before[node] if node >= 0 else ()
        if node in launching:
            kernel, launched = launching[node]
            waits = (*waits, *launched, *((kernel,) if kernel >= 0 else ()))
        if node not in exposing:
            return waits
        kernel, chains = exposing[node]
        return (*waits, *(link for chain, _ in chains for link in chain), *((kernel,) if kernel >= 0 else ()))

    last = [0] * len(before)
    for position, first in enumerate(order):
        for node in meeting.get(first, (first,)):
            last[node] = position
            for other in reads(node):
                last[other] = position
    for node in range(-1, min(exposing, default=0) - 1, -1):
        for other in reads(node):
            last[other] = len(order)
    slot, free, used, gone = [0] * len(before), [], 0, 0
    done = sorted(range(len(before)), key=last.__getitem__)
    for position, first in enumerate(order):
        for node in meeting.get(first, (first,)):
            if not free:
                free.append(used)
                used += 1
            slot[node] = free.pop()
        while gone < len(done) and last[done[gone]] == position:
            free.append(slot[done[gone]])
            gone += 1
    return slot
