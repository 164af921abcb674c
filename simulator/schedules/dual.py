"""DualPipe and DualPipeV: forward and backward of different micro-batches in pairs.

References
----------
DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, section 3.2.1 (DualPipe). Qi et al., "DualPipe could be better without
the Dual", 2025 (the V shape cut out of it).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from simulator.errors import PlanError, Problem
from simulator.schedules.table import Action, Entry, Pair, Schedule


@dataclass
class _Row:
    """One rank's row, written phase by phase; ``here`` and ``there`` are its near and far chunk."""

    here: int
    there: int
    offset: dict[int, int]
    entries: list[Entry] = field(default_factory=list)
    forwards: dict[int, int] = field(default_factory=lambda: {0: 0, 1: 0})
    backwards: dict[int, int] = field(default_factory=lambda: {0: 0, 1: 0})
    owed: deque[Action] = field(default_factory=deque)

    def next_forward(self, chunk: int) -> Action:
        self.forwards[chunk] += 1
        return Action("F", chunk, self.offset[chunk] + self.forwards[chunk] - 1)

    def next_backward(self, chunk: int, kind: str = "B") -> Action:
        self.backwards[chunk] += 1
        return Action(kind, chunk, self.offset[chunk] + self.backwards[chunk] - 1)

    def forward(self, chunk: int) -> None:
        self.entries.append(self.next_forward(chunk))

    def backward(self, chunk: int, split: bool = False) -> None:
        action = self.next_backward(chunk, "I" if split else "B")
        self.entries.append(action)
        if split:
            self.owed.append(Action("W", chunk, action.micro_batch))

    def weight(self) -> None:
        self.entries.append(self.owed.popleft())

    def pair(self, forward: int, backward: int) -> None:
        self.entries.append(Pair(self.next_forward(forward), self.next_backward(backward)))


def _row(row: _Row, place: int, half: int, per_direction: int) -> tuple[Entry, ...]:
    """Write the eight phases for the rank that is `place`-th from its end; `half` ranks lead to the middle."""
    here, there, inner = row.here, row.there, half - place - 1
    for _ in range(2 * inner):
        row.forward(here)
    for _ in range(place + 1):
        row.forward(here)
        row.forward(there)
    for _ in range(inner):
        row.backward(there, split=True)
        row.weight()
        row.forward(there)
    for i in range(per_direction - 2 * half + place + 1):
        if i == 0 and inner == 0:  # in the middle the two depend on each other
            row.forward(here)
            row.backward(there)
        else:
            row.pair(here, there)
        row.pair(there, here)
    for _ in range(inner):
        row.backward(there)
        row.pair(there, here)
    split = False
    for i in range(place + 1):
        split = split or (i == (place + 1) // 2 and place % 2 == 1)
        row.backward(there, split)
        split = split or (i == (place + 1) // 2 and place % 2 == 0)
        row.backward(here, split)
    for _ in range(inner):
        row.weight()
        row.backward(here, split=True)
    while row.owed:
        row.weight()
    return tuple(row.entries)


def dualpipe(pp: int, vpp: int, m: int) -> Schedule:
    """Return DualPipe: two copies of the model in opposite directions, half of the micro-batches each.

    Raises
    ------
    PlanError
        When pp or the micro-batches are odd, or there are fewer than two micro-batches per rank.
    """
    if pp % 2 or m % 2 or m < 2 * pp:
        numbers = f"dualpipe with pp = {pp} and {m} micro-batches"
        raise PlanError(
            [Problem("dualpipe needs even ranks and micro-batches", numbers, f"use an even pp and an even number from {2 * pp} on")]
        )
    rows = []
    for rank in range(pp):
        near = rank < pp // 2
        row = _Row(here=0 if near else 1, there=1 if near else 0, offset={0: 0, 1: m // 2})
        rows.append(_row(row, min(rank, pp - 1 - rank), pp // 2, m // 2))
    return Schedule("dualpipe", pp, 2, m, tuple(rows), "two-way")


def dualpipev(pp: int, vpp: int, m: int) -> Schedule:
    """Return DualPipeV: one copy of the model in a V, chunk 1 back from the last rank.

    Raises
    ------
    PlanError
        When there are fewer than two micro-batches per rank.
    """
    if m < 2 * pp:
        raise PlanError([Problem("dualpipev needs two micro-batches per rank", f"pp = {pp}, {m} micro-batches", f"use at least {2 * pp}")])
    rows = tuple(_row(_Row(0, 1, {0: 0, 1: 0}), rank, pp, m) for rank in range(pp))
    return Schedule("dualpipev", pp, 2, m, rows, "v")
