"""GPipe, 1F1B and interleaved 1F1B."""

from __future__ import annotations

from collections.abc import Callable

from simulator.errors import PlanError, Problem
from simulator.schedules.table import Action, Entry, Pair, Schedule


def gpipe(pp: int, vpp: int, m: int) -> Schedule:
    """Return all forwards, then all backwards (Huang et al., "GPipe", 2019)."""
    return Schedule("gpipe", pp, 1, m, tuple(tuple(Action(kind, 0, i) for kind in "FB" for i in range(m)) for _ in range(pp)))


def one_f_one_b(pp: int, vpp: int, m: int) -> Schedule:
    """Return PipeDream-Flush (Narayanan et al., "Memory-Efficient Pipeline-Parallel DNN Training", 2021)."""
    rows = []
    for rank in range(pp):
        ahead = min(pp - rank - 1, m)
        row = [Action("F", 0, i) for i in range(ahead)]
        for i in range(m - ahead):
            row += [Action("F", 0, ahead + i), Action("B", 0, i)]
        row += [Action("B", 0, i) for i in range(m - ahead, m)]
        rows.append(tuple(row))
    return Schedule("1f1b", pp, 1, m, tuple(rows))


def round_of(pp: int, m: int, name: str) -> int:
    """Return the micro-batches that go through the chunks together: pp, or more when pp does not divide m, as in torch.

    Raises
    ------
    PlanError
        When the micro-batches do not divide into rounds.
    """
    rounds = max(1, m // pp)
    if m % rounds:
        numbers = f"{name} schedule: {m} micro-batches do not divide into {rounds} rounds of pp = {pp}"
        raise PlanError(
            [Problem("micro-batches divide into rounds", numbers, f"use {m // pp * pp or pp} micro-batches, or schedule: 1f1b")]
        )
    return m // rounds


def numbered(pp: int, vpp: int, group: int) -> Callable[[str, int], Action]:
    """Return a function from the running number of a forward or backward to its action, chunks in turn per round."""

    def action(kind: str, index: int) -> Action:
        block, within = divmod(index, group * vpp)
        chunk, position = divmod(within, group)
        return Action(kind, chunk if kind == "F" else vpp - 1 - chunk, block * group + position)

    return action


def interleaved(pp: int, vpp: int, m: int) -> Schedule:
    """Return interleaved 1F1B (Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters", 2021, 2.2)."""
    group = round_of(pp, m, "interleaved")
    action, rows = numbered(pp, vpp, group), []
    for rank in range(pp):
        ahead = min((vpp - 1) * group + 2 * (pp - 1 - rank), m * vpp)
        row = [action("F", i) for i in range(ahead)]
        for i in range(m * vpp - ahead):
            row += [action("F", ahead + i), action("B", i)]
        row += [action("B", i) for i in range(m * vpp - ahead, m * vpp)]
        rows.append(tuple(row))
    return Schedule("interleaved", pp, vpp, m, tuple(rows))


def interleaved_overlapped(pp: int, vpp: int, m: int) -> Schedule:
    """Return interleaved 1F1B with one more warm-up forward, so that each later forward pairs with an independent backward.

    The pairs hide each other's expert all-to-all, as Megatron-Core's combined forward and backward does.
    """
    group = round_of(pp, m, "interleaved-overlapped")
    action, rows = numbered(pp, vpp, group), []
    for rank in range(pp):
        ahead = min((vpp - 1) * group + 2 * (pp - 1 - rank) + 1, m * vpp)
        row: list[Entry] = [action("F", i) for i in range(ahead)]
        row += [Pair(action("F", ahead + i), action("B", i)) for i in range(m * vpp - ahead)]
        row += [action("B", i) for i in range(m * vpp - ahead, m * vpp)]
        rows.append(tuple(row))
    return Schedule("interleaved-overlapped", pp, vpp, m, tuple(rows))
