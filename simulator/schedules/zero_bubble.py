"""Zero-bubble schedules: the weight gradient waits until it can fill a gap.

References
----------
Qi, Wan, Huang, Lin, "Zero Bubble Pipeline Parallelism", ICLR 2024 (ZB-H1, ZB-H2, the automatic scheduler).
Qi, Wan, Amar, Lin, "Pipeline Parallelism with Controllable Memory", NeurIPS 2024 (ZB-V).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from simulator.errors import PlanError, Problem
from simulator.schedules.classic import numbered, round_of
from simulator.schedules.table import Action, Entry, Schedule, actions


def _delayed_weights(forwards: list[Action], inputs: list[Action], ahead: int, delay: int) -> tuple[Entry, ...]:
    """Return `ahead` forwards, then forward and input gradient in turn; each weight gradient `delay` input gradients late."""
    row: list[Entry] = list(forwards[:ahead])
    owed: deque[Action] = deque()
    for i, action in enumerate(inputs):
        if ahead + i < len(forwards):
            row.append(forwards[ahead + i])
        row.append(action)
        owed.append(Action("W", action.chunk, action.micro_batch))
        if i >= delay:
            row.append(owed.popleft())
    return (*row, *owed)


def zb_h1(pp: int, vpp: int, m: int) -> Schedule:
    """Return ZB-H1: the warm-up and memory of 1F1B, a third of its bubble at F = I = W."""
    rows = []
    for rank in range(pp):
        forwards, inputs = ([Action(kind, 0, i) for i in range(m)] for kind in "FI")
        rows.append(_delayed_weights(forwards, inputs, min(pp - rank - 1, m), rank))
    return Schedule("zb-h1", pp, 1, m, tuple(rows))


def zb_h2(pp: int, vpp: int, m: int) -> Schedule:
    """Return ZB-H2: twice the warm-up and memory, no idle time inside a rank's row at F = I = W."""
    if m < 2 * pp - 1:
        raise PlanError([Problem("zb-h2 needs a full warm-up", f"pp = {pp}, {m} micro-batches", f"use at least {2 * pp - 1}")])
    rows = []
    for rank in range(pp):
        forwards, inputs = ([Action(kind, 0, i) for i in range(m)] for kind in "FI")
        rows.append(_delayed_weights(forwards, inputs, 2 * (pp - rank - 1), 2 * rank))
    return Schedule("zb-h2", pp, 1, m, tuple(rows))


def interleaved_zero_bubble(pp: int, vpp: int, m: int) -> Schedule:
    """Return interleaved 1F1B with split backward, weight gradients `rank` input gradients late (torch's InterleavedZeroBubble)."""
    group = round_of(pp, m, "interleaved-zb")
    action, rows = numbered(pp, vpp, group), []
    for rank in range(pp):
        forwards, inputs = ([action(kind, i) for i in range(m * vpp)] for kind in "FI")
        rows.append(_delayed_weights(forwards, inputs, min((vpp - 1) * group + pp - 1 - rank, m * vpp), rank))
    return Schedule("interleaved-zb", pp, vpp, m, tuple(rows))


def zb_v(pp: int, vpp: int, m: int) -> Schedule:
    """Return ZB-V: two chunks in a V, the activation memory of 1F1B, no idle time inside a row at F = I = W."""
    if m < 2 * pp - 1:
        raise PlanError([Problem("zb-v needs a full warm-up", f"pp = {pp}, {m} micro-batches", f"use at least {2 * pp - 1}")])
    return Schedule("zb-v", pp, 2, m, tuple(_v_row(pp, rank, m) for rank in range(pp)), "v")


def _v_row(pp: int, rank: int, m: int) -> tuple[Entry, ...]:
    row: list[Entry] = []
    count = {(kind, chunk): 0 for kind in "FIW" for chunk in (0, 1)}

    def run(*steps: str) -> None:
        for chunk, kind in ((int(s[0]), s[1]) for s in steps):
            row.append(Action(kind, chunk, count[kind, chunk]))
            count[kind, chunk] += 1

    for _ in range(2 * (pp - rank) - 1):
        run("0F")
    for _ in range(rank):
        run("1F", "0F")
    for _ in range(pp - rank):
        run("1F", "1I", "1W")
    while count["F", 1] < count["F", 0] or count["F", 0] < m:
        if count["F", 0] < m:
            run("0F")
        run("0I", "0W", "1F", "1I", "1W")
    for _ in range(rank):
        run("0I", "1I")
    for _ in range(pp - rank):
        run("0I", "0W")
    while count["W", 1] < m:
        run("1W")
    while count["W", 0] < m:
        run("0W")
    return tuple(row)


def automatic(pp: int, m: int, held: int, times: Sequence[float] = (1.0, 1.0, 1.0), hop: float = 0.0, name: str = "zb-auto") -> Schedule:
    """Return a zero-bubble schedule made by simulation under a memory limit, as the paper's heuristic does.

    Parameters
    ----------
    pp, m : int
        Ranks and micro-batches.
    held : int
        Micro-batches whose activations a rank may hold; F takes one, W gives it back.
    times : sequence of float
        Relative durations of F, I and W.
    hop : float
        Duration of a message.

    Notes
    -----
    Ranks act in order of time. An input gradient that has arrived goes first; else a forward, if memory allows and it does
    not come later than the next gradient; weight gradients fill what would be idle, and are forced when memory is full.
    """
    f, i_, w = times
    clock = [0.0] * pp
    done_f = [[0.0] * m if rank == 0 else [float("inf")] * m for rank in range(pp)]  # arrival of inputs
    done_i = [[float("inf")] * m for _ in range(pp)]  # arrival of gradients
    nf, ni, nw = [0] * pp, [0] * pp, [0] * pp
    rows: list[list[Entry]] = [[] for _ in range(pp)]
    while any(n < m for n in nw):
        best: tuple[float, int, int, str] | None = None
        for rank in range(pp):
            choice = _choose(clock[rank], nf[rank], ni[rank], nw[rank], m, held, done_f[rank], done_i[rank], f, w)
            if choice is not None:
                start, kind = choice
                candidate = (start, "IFW".index(kind), rank, kind)
                best = candidate if best is None else min(best, candidate)
        assert best is not None  # held >= pp keeps some rank able to act
        start, _, rank, kind = best
        if kind == "F":
            clock[rank] = start + f
            rows[rank].append(Action("F", 0, nf[rank]))
            if rank + 1 < pp:
                done_f[rank + 1][nf[rank]] = clock[rank] + hop
            else:
                done_i[rank][nf[rank]] = clock[rank]
            nf[rank] += 1
        elif kind == "I":
            clock[rank] = start + i_
            rows[rank].append(Action("I", 0, ni[rank]))
            if rank:
                done_i[rank - 1][ni[rank]] = clock[rank] + hop
            ni[rank] += 1
        else:
            clock[rank] = start + w
            rows[rank].append(Action("W", 0, nw[rank]))
            nw[rank] += 1
    return Schedule(name, pp, 1, m, tuple(map(tuple, rows)))


def _choose(
    now: float, nf: int, ni: int, nw: int, m: int, held: int, inputs: Sequence[float], gradients: Sequence[float], f: float, w: float
) -> tuple[float, str] | None:
    """Return when and what a rank would do next, or None when it knows of nothing yet."""
    gradient = gradients[ni] if ni < nf else float("inf")
    forward = inputs[nf] if nf < m and nf - nw < held else float("inf")
    if gradient <= now:
        return now, "I"
    soonest = min(gradient, forward)
    if forward <= now and forward + f <= max(gradient, now + f):
        return now, "F"
    if ni > nw and (soonest >= now + w or nf - nw >= held or soonest == float("inf")):
        return now, "W"
    if soonest < float("inf"):
        return max(now, soonest), "I" if gradient <= forward else "F"
    return None


def makespan(schedule: Schedule, times: Sequence[float] = (1.0, 1.0, 1.0), hop: float = 0.0) -> float:
    """Return when the last action of `schedule` ends, all stages alike; F, I and W take `times`, B what I and W take."""
    f, i, w = times
    seconds = {"F": f, "I": i, "W": w, "B": i + w}
    free, ended = [0.0] * schedule.pp, {}
    for rank, entry in schedule.order:
        for action in actions((entry,)):
            source = schedule.source(rank, action)
            side = "F" if action.kind == "F" else "G"
            arrives = 0.0 if source is None else ended[side, *source, action.micro_batch] + (hop if source[0] != rank else 0.0)
            free[rank] = max(free[rank], arrives) + seconds[action.kind]
            if action.kind != "W":
                ended[side, rank, action.chunk, action.micro_batch] = free[rank]
    return max(free)


def _best(name: str, candidates: Sequence[Schedule]) -> Schedule:
    return replace(min(candidates, key=makespan), name=name)


def zb_1p(pp: int, vpp: int, m: int) -> Schedule:
    """Return the best schedule found that holds at most pp micro-batches, the memory of 1F1B: made by simulation, or ZB-H1."""
    return _best("zb-1p", [zb_h1(pp, vpp, m), automatic(pp, m, pp)])


def zb_2p(pp: int, vpp: int, m: int) -> Schedule:
    """Return the best schedule found that holds at most 2 pp micro-batches: made by simulation, or ZB-H2."""
    return _best("zb-2p", ([zb_h2(pp, vpp, m)] if m >= 2 * pp - 1 else []) + [automatic(pp, m, 2 * pp)])
