"""Pipeline schedules by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from simulator.errors import PlanError, Problem, nearest
from simulator.scenario.plan import wiring
from simulator.schedules.classic import gpipe, interleaved, interleaved_overlapped, one_f_one_b
from simulator.schedules.controllable import v_half, v_min
from simulator.schedules.dual import dualpipe, dualpipev
from simulator.schedules.table import Action, Entry, Pair, Schedule, Step, Table, actions, read_table
from simulator.schedules.turns import EXCHANGE, by_segments, turn_ends
from simulator.schedules.zero_bubble import interleaved_zero_bubble, zb_1p, zb_2p, zb_h1, zb_h2, zb_v
from simulator.units import Number

SCHEDULES: dict[str, Callable[[int, int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "interleaved-overlapped": interleaved_overlapped,
    "interleaved-zb": interleaved_zero_bubble,
    "zb-h1": zb_h1,
    "zb-h2": zb_h2,
    "zb-1p": zb_1p,
    "zb-2p": zb_2p,
    "zb-v": zb_v,
    "v-half": v_half,
    "v-min": v_min,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}

__all__ = [
    "EXCHANGE",
    "SCHEDULES",
    "Action",
    "Entry",
    "Pair",
    "Schedule",
    "Step",
    "Table",
    "actions",
    "by_segments",
    "read_table",
    "repeating",
    "schedule",
    "turn_ends",
]


@lru_cache(maxsize=1024)
def schedule(name: str, pp: int, vpp: int, micro_batches: int, table: str | None = None) -> Schedule:
    """Return a schedule by name.

    Parameters
    ----------
    name : str
        A key of `SCHEDULES`, or ``table``.
    pp, vpp, micro_batches : int
        Pipeline ranks, model chunks per rank, micro-batches per step.
    table : str, optional
        Text of the user's own table; it goes through the dry run.

    Raises
    ------
    PlanError
        When there is no such schedule, it does not exist for these numbers, or a table loses, doubles or invents an action.
    DeadlockError
        When a table deadlocks.
    """
    if table is not None:
        return Schedule(name, pp, vpp, micro_batches, read_table(table, name), wiring(table)).check()
    if name not in SCHEDULES:
        raise PlanError([Problem("the schedule is known", f"schedule {name!r}", nearest(name, SCHEDULES))])
    return SCHEDULES[name](pp, vpp, micro_batches)


def repeating(name: str, pp: Number, micro_batches: Number) -> Number:
    """Return a number of micro-batches, three rounds or less, whose schedule has the memory peaks of the one with `micro_batches`.

    Notes
    -----
    Peaks are reached in the first rounds; what m leaves over of whole rounds stays over. Rounds have pp micro-batches, in
    interleaved schedules ``m / (m // pp)``. 1F1B needs one round, GPipe's formula none, ZB-1p and ZB-2p two.
    """
    m = np.asarray(micro_batches)
    if name in ("gpipe", "1f1b"):
        return np.minimum(m, pp)
    whole = np.maximum(m // pp, 1)
    rounds = 2 if name in ("zb-1p", "zb-2p") else 3
    few = rounds * m // whole if name.startswith("interleaved") else rounds * np.asarray(pp) + m % pp
    return np.where(whole > rounds, few, m)
