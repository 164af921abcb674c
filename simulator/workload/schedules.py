"""Pipeline orders as printable tables: which action each rank runs when.

Actions are those of ``torch.distributed.pipelining``: F forward, B backward (input and weight gradient together).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from simulator.errors import DeadlockError, PlanError, Problem


class Action(NamedTuple):
    """One entry of a schedule: ``F`` or ``B`` of a micro-batch on a model chunk of this rank."""

    kind: str
    chunk: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.chunk}{self.kind}{self.micro_batch}"


#: one row per pipeline rank
Table = tuple[tuple[Action, ...], ...]


def _gpipe(pp: int, vpp: int, m: int) -> Table:
    return tuple(tuple(Action(kind, 0, i) for kind in "FB" for i in range(m)) for _ in range(pp))


def _one_f_one_b(pp: int, vpp: int, m: int) -> Table:
    """Narayanan et al., "PipeDream-Flush" in "Memory-Efficient Pipeline-Parallel DNN Training", 2021."""
    rows = []
    for rank in range(pp):
        ahead = min(pp - rank - 1, m)
        row = [Action("F", 0, i) for i in range(ahead)]
        for i in range(m - ahead):
            row += [Action("F", 0, ahead + i), Action("B", 0, i)]
        row += [Action("B", 0, i) for i in range(m - ahead, m)]
        rows.append(tuple(row))
    return tuple(rows)


def _interleaved(pp: int, vpp: int, m: int) -> Table:
    """Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters", SC 2021, section 2.2.

    Micro-batches go through the chunks in groups; a group has pp of them, or more when pp does not divide m, as in torch.
    """
    rounds = max(1, m // pp)
    if m % rounds:
        numbers = f"interleaved schedule: {m} micro-batches do not divide into {rounds} rounds of pp = {pp}"
        raise PlanError(
            [Problem("micro-batches divide into rounds", numbers, f"use {m // pp * pp or pp} micro-batches, or schedule: 1f1b")]
        )
    group, rows = m // rounds, []
    for rank in range(pp):

        def action(kind: str, index: int) -> Action:
            block, within = divmod(index, group * vpp)
            chunk, position = divmod(within, group)
            return Action(kind, chunk if kind == "F" else vpp - 1 - chunk, block * group + position)

        ahead = min((vpp - 1) * group + 2 * (pp - 1 - rank), m * vpp)
        row = [action("F", i) for i in range(ahead)]
        for i in range(m * vpp - ahead):
            row += [action("F", ahead + i), action("B", i)]
        row += [action("B", i) for i in range(m * vpp - ahead, m * vpp)]
        rows.append(tuple(row))
    return tuple(rows)


_SCHEDULES = {"gpipe": _gpipe, "1f1b": _one_f_one_b, "interleaved": _interleaved}


@lru_cache(maxsize=64)
def schedule(name: str, pp: int, vpp: int, micro_batches: int) -> Table:
    """Return the order of actions on every pipeline rank.

    Parameters
    ----------
    name : str
        ``gpipe``, ``1f1b`` or ``interleaved``.
    pp, vpp, micro_batches : int
        Pipeline ranks, model chunks per rank, micro-batches per step.

    Raises
    ------
    PlanError
        When the schedule does not exist for these numbers.
    """
    return _SCHEDULES[name](pp, vpp, micro_batches)


def execution_order(table: Table, vpp: int = 1) -> list[tuple[int, Action]]:
    """Return the table's actions as (rank, action), each after all that it needs.

    A forward needs the forward of the previous virtual stage, a backward the backward of the next one and its own forward.

    Raises
    ------
    DeadlockError
        When ranks wait for each other for ever; names the action that each waits for.
    """
    pp = len(table)
    last = pp * vpp - 1
    done: set[tuple[str, int, int]] = set()
    position, order = [0] * pp, []
    while sum(position) < sum(map(len, table)):
        before = len(order)
        for rank, row in enumerate(table):
            while position[rank] < len(row):
                action = row[position[rank]]
                stage = action.chunk * pp + rank
                if action.kind == "F":
                    ready = stage == 0 or ("F", stage - 1, action.micro_batch) in done
                else:
                    ready = ("F", stage, action.micro_batch) in done
                    ready = ready and (stage == last or ("B", stage + 1, action.micro_batch) in done)
                if not ready:
                    break
                done.add((action.kind, stage, action.micro_batch))
                order.append((rank, action))
                position[rank] += 1
        if len(order) == before:
            waiting = ", ".join(f"rank {r} for {row[p]}" for r, (row, p) in enumerate(zip(table, position, strict=True)) if p < len(row))
            raise DeadlockError(f"schedule deadlocks: {waiting}; check that every action it waits for stands in the table before")
    return order


@lru_cache(maxsize=512)
def in_flight(name: str, pp: int, vpp: int, micro_batches: int) -> np.ndarray:
    """Return how many micro-batches' activations each rank holds, chunk by chunk, at the moments that may be its peak.

    Returns
    -------
    ndarray of shape (pp, moments, vpp)
        Distinct counts per chunk right after a forward; short rows are padded with zeros.

    Notes
    -----
    1F1B and interleaved tables repeat after the warm-up, so the counts of a few rounds are those of all.
    """
    if name == "gpipe":
        return np.full((pp, 1, 1), float(micro_batches))
    rounds = 1 if name == "1f1b" else 3
    if micro_batches % pp == 0 or name == "1f1b":
        micro_batches = min(micro_batches, rounds * pp)
    moments = []
    for row in schedule(name, pp, vpp, micro_batches):
        held, seen = [0] * vpp, set()
        for action in row:
            held[action.chunk] += 1 if action.kind == "F" else -1
            if action.kind == "F":
                seen.add(tuple(held))
        moments.append(sorted(seen))
    counts = np.zeros((pp, max(map(len, moments)), vpp))
    for rank, rows in enumerate(moments):
        counts[rank, : len(rows)] = rows
    return counts


def as_text(table: Table) -> str:
    """Return the table as text, one line per rank."""
    return "\n".join(" ".join(map(str, row)) for row in table) + "\n"
