"""Schedules of controllable memory in a V: one building block repeated for every micro-batch, the shorter the less it holds.

Times are in units of a forward, an input gradient and a weight gradient, all alike; a rank does six in a period: F, I and W of
both of its chunks.

References
----------
Qi, Wan, Amar, Lin, "Pipeline Parallelism with Controllable Memory", NeurIPS 2024: building blocks, and the memory of V-Min and
V-Half, a third and half of that of 1F1B.
"""

from __future__ import annotations

from itertools import product

from simulator.schedules.table import Action, Schedule

#: a forward, an input and a weight gradient of each chunk
PERIOD = 6
#: units from stage to stage: forwards on the way out and back, input gradients on the way out and back
MIN, HALF = (1, 1, 1, 1), (2, 1, 2, 1)


def v_min(pp: int, vpp: int, micro_batches: int) -> Schedule:
    """Return V-Min: everything is passed on at once, which holds a third of the activations of 1F1B; `vpp` is 2."""
    return _repeated("v-min", pp, micro_batches, MIN)


def v_half(pp: int, vpp: int, micro_batches: int) -> Schedule:
    """Return V-Half: forwards on the way out and input gradients back to the turn wait a unit: half of 1F1B's; `vpp` is 2."""
    return _repeated("v-half", pp, micro_batches, HALF)


def _starts(pp: int, offsets: tuple[int, int, int, int], turns: tuple[int, int, int]) -> list[tuple[int, int, int, int]]:
    """Return when each rank does F of chunk 0 and 1, I of chunk 1 and 0 for the first micro-batch."""
    out, back, out_again, home = offsets
    last = pp - 1
    first_turn = out * last + turns[0]
    middle = first_turn + back * last + turns[1]
    second_turn = middle + out_again * last + turns[2]
    return [
        (out * rank, first_turn + back * (last - rank), middle + out_again * rank, second_turn + home * (last - rank)) for rank in range(pp)
    ]


def _fits(starts: list[tuple[int, int, int, int]]) -> bool:
    """Return whether no rank does two things at once when the block is repeated."""
    return all(len({start % PERIOD for start in row}) == len(row) for row in starts)


def _building_block(pp: int, offsets: tuple[int, int, int, int]) -> list[dict[tuple[str, int], int]]:
    """Return when each rank does each (kind, chunk) for the first micro-batch: the earliest turns that can be repeated.

    Weight gradients go to the two units of the period that are left, the sooner after their input gradients the better.
    """
    turns = min((t for t in product(range(1, PERIOD + 1), repeat=3) if _fits(_starts(pp, offsets, t))), key=sum)
    rows = []
    for forward, forward_back, inputs, inputs_home in _starts(pp, offsets, turns):
        free = sorted(set(range(PERIOD)) - {start % PERIOD for start in (forward, forward_back, inputs, inputs_home)})
        ways = [(inputs + 1 + (x - inputs - 1) % PERIOD, inputs_home + 1 + (y - inputs_home - 1) % PERIOD) for x, y in (free, free[::-1])]
        weights, weights_home = min(ways, key=sum)
        at = {("F", 0): forward, ("F", 1): forward_back, ("I", 1): inputs, ("I", 0): inputs_home}
        rows.append(at | {("W", 1): weights, ("W", 0): weights_home})
    return rows


def _repeated(name: str, pp: int, micro_batches: int, offsets: tuple[int, int, int, int]) -> Schedule:
    rows = []
    for at in _building_block(pp, offsets):
        times = ((start + PERIOD * i, Action(kind, chunk, i)) for (kind, chunk), start in at.items() for i in range(micro_batches))
        rows.append(tuple(action for _, action in sorted(times)))
    return Schedule(name, pp, 2, micro_batches, tuple(rows), "v")
