"""Pipeline schedules as printable tables: which action each rank runs when, and the dry run that refuses a wrong one.

Actions are those of ``torch.distributed.pipelining``: F forward, I input gradient, W weight gradient, B both. (The
zero-bubble paper's B is our I; DualPipe's B is our B.)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from simulator.errors import DeadlockError, PlanError, Problem


class Action(NamedTuple):
    """``F``, ``I``, ``W`` or ``B`` of a micro-batch on a model chunk of this rank."""

    kind: str
    chunk: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.chunk}{self.kind}{self.micro_batch}"


class Pair(NamedTuple):
    """A forward and a backward that run interleaved, each hiding the other's communication."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"{self.forward}+{self.backward}"


Entry = Action | Pair
#: one row per pipeline rank
Table = tuple[tuple[Entry, ...], ...]
#: how chunks follow one another: around the ranks again, back from the last rank (V), or two models in opposite directions
Wiring = Literal["loop", "v", "two-way"]
_ENTRY = re.compile(r"(\d+)([FIWB])(\d+)")


def actions(entries: Iterable[Entry]) -> Iterator[Action]:
    """Yield the actions of a row, pairs taken apart."""
    for entry in entries:
        yield from (entry,) if isinstance(entry, Action) else entry


class Step(NamedTuple):
    """An action as a replay takes it.

    Parameters
    ----------
    kind : str
    chunk, stage : int
    takes, sends : int or None
        Numbers of the message that it waits for, and of the one that it hands on.
    leaves : bool
        Whether that message goes to another rank.
    """

    kind: str
    chunk: int
    stage: int
    takes: int | None
    sends: int | None
    leaves: bool


@dataclass(frozen=True)
class Schedule:
    """A table of actions, and the way a micro-batch takes through ranks and chunks.

    Parameters
    ----------
    name : str
    pp, vpp, micro_batches : int
        Pipeline ranks, model chunks per rank, micro-batches per step.
    table : tuple
        One row of actions per rank.
    wiring : str
        ``loop``: chunk c + 1 follows chunk c around the ranks. ``v``: chunk 1 runs back from the last rank to the first.
        ``two-way``: chunk 1 is a second copy of the model, entered at the last rank by the second half of the
        micro-batches.
    """

    name: str
    pp: int
    vpp: int
    micro_batches: int
    table: Table
    wiring: Wiring = "loop"

    @cached_property
    def paths(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """The (rank, chunk) that a micro-batch visits, one path or one for each direction."""
        forth = tuple((rank, 0) for rank in range(self.pp))
        back = tuple((rank, 1) for rank in reversed(range(self.pp)))
        if self.wiring == "v":
            return (forth + back,)
        if self.wiring == "two-way":
            return forth, back
        return (tuple((rank, chunk) for chunk in range(self.vpp) for rank in range(self.pp)),)

    @cached_property
    def stages(self) -> int:
        """Stages of one copy of the model."""
        return len(self.paths[0])

    @cached_property
    def stage(self) -> dict[tuple[int, int], int]:
        """(rank, chunk) -> stage of the model."""
        return {place: number for path in self.paths for number, place in enumerate(path)}

    @cached_property
    def held(self) -> tuple[tuple[int, ...], ...]:
        """For each rank, the stages that it holds, chunk by chunk."""
        return tuple(tuple(self.stage[rank, chunk] for chunk in range(self.vpp)) for rank in range(self.pp))

    @cached_property
    def splits(self) -> bool:
        """Whether weight gradients stand apart from input gradients anywhere."""
        return any(a.kind == "W" for row in self.table for a in actions(row))

    @cached_property
    def pairs(self) -> bool:
        """Whether forwards and backwards run in pairs anywhere."""
        return any(isinstance(entry, Pair) for row in self.table for entry in row)

    @cached_property
    def alone(self) -> np.ndarray:
        """Forwards and backwards of each chunk that run outside pairs, (2, pp, vpp); I and W together are one backward."""
        found = np.zeros((2, self.pp, self.vpp))
        for rank, row in enumerate(self.table):
            for kind, chunk, _ in (entry for entry in row if isinstance(entry, Action) and entry.kind != "W"):
                found[0 if kind == "F" else 1, rank, chunk] += 1
        return found

    @cached_property
    def paired(self) -> tuple[Counter[tuple[int, int]], ...]:
        """For each rank, how often a forward of one chunk runs in a pair with a backward of another."""
        return tuple(Counter((e.forward.chunk, e.backward.chunk) for e in row if isinstance(e, Pair)) for row in self.table)

    @cached_property
    def finishes(self) -> tuple[tuple[tuple[int, str], ...], ...]:
        """For each rank, its chunks in the order in which their last backward ends, and whether that is a B or a W."""
        last = [{a.chunk: (n, a.kind) for n, a in enumerate(actions(row)) if a.kind in "BW"} for row in self.table]
        return tuple(tuple((chunk, kind) for chunk, (_, kind) in sorted(at.items(), key=lambda item: item[1])) for at in last)

    @cached_property
    def messages_before(self) -> tuple[int, ...]:
        """For each stage, the messages that a micro-batch has taken to get there; the turn of a V needs none."""
        path = self.paths[0]
        return tuple(sum(a[0] != b[0] for a, b in zip(path[:n], path[1 : n + 1], strict=True)) for n in range(len(path)))

    @cached_property
    def neighbours(self) -> dict[tuple[int, int], tuple[tuple[int, int] | None, tuple[int, int] | None]]:
        """(rank, chunk) -> the (rank, chunk) before and after it on its path; None at the ends."""
        return {
            here: (before, after)
            for path in self.paths
            for before, here, after in zip((None, *path[:-1]), path, (*path[1:], None), strict=True)
        }

    def source(self, rank: int, action: Action) -> tuple[int, int] | None:
        """Return the (rank, chunk) whose result `action` waits for; None at the ends of the path and for W."""
        return None if action.kind == "W" else self.neighbours[rank, action.chunk][0 if action.kind == "F" else 1]

    def target(self, rank: int, action: Action) -> tuple[int, int] | None:
        """Return the (rank, chunk) that waits for the result of `action`."""
        return None if action.kind == "W" else self.neighbours[rank, action.chunk][1 if action.kind == "F" else 0]

    @property
    def order(self) -> tuple[tuple[int, Entry], ...]:
        """Entries as (rank, entry), each after all that it needs."""
        return tuple((rank, entry) for rank, entry, _ in self.steps)

    @cached_property
    def steps(self) -> tuple[tuple[int, Entry, tuple[Step, ...]], ...]:
        """Entries in `order`, each with its actions as a replay takes them: the dry run.

        Raises
        ------
        DeadlockError
            When ranks wait for each other for ever; names the entry that each waits with.
        """
        done: set[tuple[str, int, int, int]] = set()
        sent: dict[tuple[str, int, int, int], int] = {}
        position, steps = [0] * self.pp, []
        remaining = sum(map(len, self.table))
        while remaining:
            before = remaining
            for rank, row in enumerate(self.table):
                while position[rank] < len(row):
                    entry = row[position[rank]]
                    parts = (entry,) if isinstance(entry, Action) else tuple(entry)
                    if not self._ready(rank, parts, done):
                        break
                    steps.append((rank, entry, tuple(self._step(rank, action, sent) for action in parts)))
                    done.update([(a.kind, rank, a.chunk, a.micro_batch) for a in parts])
                    position[rank] += 1
                    remaining -= 1
            if remaining == before:
                stuck = [(r, p) for r, p in enumerate(position) if p < len(self.table[r])]
                waits = "; ".join(f"rank {r} with {self.table[r][p]} (entry {p})" for r, p in stuck)
                rows = "\n".join(f"rank {r}: {' '.join(map(str, self.table[r]))}" for r, _ in stuck[:4])
                raise DeadlockError(f"schedule {self.name} deadlocks: {waits}; what each waits for must come earlier\n{rows}")
        return tuple(steps)

    def _ready(self, rank: int, parts: tuple[Action, ...], done: set[tuple[str, int, int, int]]) -> bool:
        for kind, chunk, i in parts:
            before, after = self.neighbours[rank, chunk]
            if kind == "F":
                if before and ("F", *before, i) not in done:
                    return False
            elif kind == "W":
                if ("I", rank, chunk, i) not in done:
                    return False
            elif ("F", rank, chunk, i) not in done or (after and ("B", *after, i) not in done and ("I", *after, i) not in done):
                return False
        return True

    def _step(self, rank: int, action: Action, sent: dict[tuple[str, int, int, int], int]) -> Step:
        """Return an action whose turn it is; `sent` are the numbers of messages by who waits for them."""
        kind, chunk, i = action
        side, target = "F" if kind == "F" else "G", self.target(rank, action)  # activations go forward, gradients back
        takes = sent.get((side, rank, chunk, i)) if kind != "W" else None
        sends = sent.setdefault((side, *target, i), len(sent)) if target else None
        return Step(kind, chunk, self.stage[rank, chunk], takes, sends, target is not None and target[0] != rank)

    def check(self) -> Schedule:
        """Return self when every action stands exactly once where it belongs and nothing deadlocks.

        Raises
        ------
        PlanError
            Names the rank and its lost, doubled or foreign actions, with the row.
        DeadlockError
            See `steps`.
        """
        problems = [p for rank, row in enumerate(self.table) for p in self._row_problems(rank, row)]
        if len(self.table) != self.pp:
            problems.append(Problem("one row per rank", f"{len(self.table)} rows for pp = {self.pp}", "give a row for each pipeline rank"))
        if problems:
            raise PlanError(problems)
        _ = self.steps
        return self

    def expected(self, chunk: int) -> range:
        """Return the micro-batches that `chunk` works on."""
        half = self.micro_batches // 2
        if self.wiring != "two-way":
            return range(self.micro_batches)
        return range(half) if chunk == 0 else range(half, self.micro_batches)

    def _row_problems(self, rank: int, row: tuple[Entry, ...]) -> Iterator[Problem]:
        found = Counter(actions(row))
        if sum(found.values()) < 2 * len(self.expected(0)):  # before looking for each of what may be millions
            numbers = f"schedule {self.name}, rank {rank}: {sum(found.values())} actions for {self.micro_batches} micro-batches"
            yield Problem(
                "no action is lost", numbers, f"give each micro-batch its F and its B, or its I and W; the row: {' '.join(map(str, row))}"
            )
            return
        wanted = {(chunk, i) for chunk in range(self.vpp) for i in self.expected(chunk)}
        lost, foreign = [], [str(a) for a in found if (a.chunk, a.micro_batch) not in wanted]
        doubled = [str(a) for a, times in found.items() if times > 1]
        for chunk, i in sorted(wanted):
            forward, both, inputs, weights = (found[Action(kind, chunk, i)] for kind in "FBIW")
            lost += [] if forward else [f"{chunk}F{i}"]
            if both and (inputs or weights):
                doubled.append(f"{chunk}B{i} beside {chunk}I{i} or {chunk}W{i}")
            elif not both:
                lost += [f"{chunk}{kind}{i}" for kind, there in (("I", inputs), ("W", weights)) if not there]
        for rule, which in (("no action is lost", lost), ("no action stands twice", doubled), ("no action is invented", foreign)):
            if which:
                numbers = f"schedule {self.name}, rank {rank}: {', '.join(which[:6])}{' ...' if len(which) > 6 else ''}"
                yield Problem(rule, numbers, f"correct the row: {' '.join(map(str, row))}")

    @cached_property
    def in_flight(self) -> np.ndarray:
        """Micro-batches that each rank holds at the moments that may be its peak of memory.

        Shape (pp, moments, 2, vpp): with all their activations, and with only what the weight gradient still needs, chunk by
        chunk. F takes the activations, B gives them back, I gives back what W does not need. Short rows are padded with zeros.
        """
        return self._moments(actions)

    @cached_property
    def resident(self) -> np.ndarray:
        """As `in_flight`, but where the parts of a pair go layer by layer: what one gives back the other takes at once."""
        return self._moments(lambda row: (a for entry in row for a in sorted(actions((entry,)), key=lambda a: a.kind == "F")))

    def _moments(self, unpaired: Callable[[tuple[Entry, ...]], Iterator[Action]]) -> np.ndarray:
        takes = {"F": (1, 0), "B": (-1, 0), "I": (-1, 1), "W": (0, -1)}
        moments = []
        for row in self.table:
            parts = list(unpaired(row))
            steps = np.zeros((len(parts) + 1, 2, self.vpp))
            steps[np.arange(1, len(parts) + 1), :, [chunk for _, chunk, _ in parts]] = [takes[kind] for kind, _, _ in parts]
            peaks = [0] + [n for n, (kind, _, _) in enumerate(parts, start=1) if kind in "FI"]
            moments.append(_largest(np.cumsum(steps, axis=0)[peaks].reshape(len(peaks), -1)))
        counts = np.zeros((self.pp, max(map(len, moments)), 2, self.vpp))
        for rank, rows in enumerate(moments):
            counts[rank, : len(rows)] = rows.reshape(-1, 2, self.vpp)
        return counts

    def spans(self, times: Sequence[float] = (1.0, 1.0, 1.0), hop: float = 0.0) -> list[tuple[int, Entry, float, float]]:
        """Return (rank, entry, start, end) of every entry when all stages are alike.

        Parameters
        ----------
        times : sequence of float
            Durations of F, I and W; B and pairs take what their parts take.
        hop : float
            Duration of a message between ranks.
        """
        f, i, w = times
        lasts = {"F": f, "I": i, "W": w, "B": i + w}
        free, sent, found = [0.0] * self.pp, dict[int | None, float](), []
        for rank, entry, parts in self.steps:
            start = max([free[rank], *(sent[step.takes] for step in parts if step.takes is not None)])
            end = free[rank] = start + sum(lasts[step.kind] for step in parts)
            sent.update((step.sends, end + (hop if step.leaves else 0.0)) for step in parts)
            found.append((rank, entry, start, end))
        return found

    def __str__(self) -> str:
        return "\n".join(" ".join(map(str, row)) for row in self.table) + "\n"


def _largest(rows: np.ndarray) -> np.ndarray:
    """Return the rows of which no other is at least as large in every entry, in order."""
    kept, left = [], rows
    while len(left):
        first = left[left.sum(axis=1).argmax()]
        kept.append(first)
        left = left[(left > first).any(axis=1)]
    return np.array(sorted(map(tuple, kept)))


def read_table(text: str, name: str = "user") -> Table:
    """Return the table in a text, one line per rank, entries such as ``0F3``, ``1B2`` or ``0F3+1B2`` between blanks or commas.

    Comments (``#``) and the line that says the wiring are left out.

    Raises
    ------
    PlanError
        Names line and entry that are not understood.
    """
    rows = []
    lines = (x for x in text.splitlines() if x.strip() and not x.lstrip().startswith(("#", "wiring:")))
    for number, line in enumerate(lines, start=1):
        row: list[Entry] = []
        for word in re.split(r"[\s,;]+", line.strip().strip(",;")):
            parts = [_ENTRY.fullmatch(part) for part in word.split("+")]
            found = [Action(m[2], int(m[1]), int(m[3])) for m in parts if m]
            if len(found) != len(parts) or len(found) > 2 or (len(found) == 2 and (found[0].kind, found[1].kind) != ("F", "B")):
                raise PlanError(
                    [
                        Problem(
                            "schedule table",
                            f"{name}, line {number}: {word!r}",
                            "write chunk, F, I, W or B, micro-batch: 0F3, or a pair 0F3+1B2",
                        )
                    ]
                )
            row.append(found[0] if len(found) == 1 else Pair(*found))
        rows.append(tuple(row))
    if not rows:
        raise PlanError([Problem("schedule table", f"{name} is empty", "write one line of actions per pipeline rank")])
    return tuple(rows)
