"""Zero-bubble schedules: the weight gradient waits until it can fill a gap.

References
----------
Qi, Wan, Huang, Lin, "Zero Bubble Pipeline Parallelism", ICLR 2024 (ZB-H1, ZB-H2, the automatic scheduler).
Qi, Wan, Amar, Lin, "Pipeline Parallelism with Controllable Memory", NeurIPS 2024 (ZB-V).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from simulator.errors import PlanError, Problem
from simulator.schedules.classic import numbered, round_of
from simulator.schedules.table import Action, Entry, Schedule, Table


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


def automatic(
    pp: int,
    m: int,
    held: int,
    times: Sequence[float] = (1.0, 1.0, 1.0),
    hop: float = 0.0,
    kept: float = 1.0,
    name: str = "zb-auto",
) -> Schedule:
    """Return the best zero-bubble schedule found under a memory limit, all stages alike.

    Parameters
    ----------
    pp, m : int
        Ranks and micro-batches.
    held : int
        Micro-batches whose activations a rank may hold, at least pp; F takes one, I and W give it back.
    times : sequence of float
        Durations of F, I and W.
    hop : float
        Duration of a message.
    kept : float
        Share of the activations that W gives back, because the weight gradient needs them; I gives back the rest.

    Notes
    -----
    After the heuristic of the paper, section 3.1: as many warm-up forwards as are worth their memory, then I and F in turn;
    W goes where its rank would wait, and where memory is full. What the paper leaves to a search over binary choices is
    searched here, too: how much longer than 1F1B's the warm-up of the earlier ranks is, and what share of a W must fit into
    a gap. ZB-H1 and ZB-H2 take part where they fit, so that the result is never slower. Ties go
    to the shortest longest row (`longest_row`), then to them.
    """
    f, i, _ = times
    longer = dict.fromkeys((0.0, 1.0, (i + 2 * hop) / f))
    warm_ups = dict.fromkeys(tuple(min(held, m, pp - r + int(x * (pp - 1 - r) + 1e-9)) for r in range(pp)) for x in longer)
    by_hand = [zb_h1(pp, 1, m)] if held >= pp else []
    by_hand += [zb_h2(pp, 1, m)] if held >= 2 * pp - 1 and m >= 2 * pp - 1 else []
    found = [(s.table, row_ends(s, times, hop)) for s in by_hand]
    found += [_filled(pp, m, warm_up, held, times, hop, kept, share) for warm_up in warm_ups for share in (1.0, 0.5, 0.0)]
    table, _ = min(found, key=lambda one: (round(max(one[1]), 9), longest_row(one[1], f, hop)))
    return Schedule(name, pp, 1, m, table)


def _filled(
    pp: int, m: int, warm_up: Sequence[int], held: int, times: Sequence[float], hop: float, kept: float, share: float
) -> tuple[Table, list[float]]:
    """Return the table in which rank r runs at most ``warm_up[r]`` forwards ahead of its input gradients, and when its rows end.

    The order of F and I is then given, and each rank fills in its W: into a gap of at least `share` of one before the next
    F or I, and before an F for which memory lacks.
    """
    f, i, w = times
    rows: list[list[Entry]] = [[] for _ in range(pp)]
    clock, forwards, inputs, weights = [0.0] * pp, [0] * pp, [0] * pp, [0] * pp
    arrived = {("F", 0, n): 0.0 for n in range(m)}
    awake = list(range(pp))
    while awake:
        r = awake.pop()
        while inputs[r] < m:
            kind = "F" if forwards[r] < m and forwards[r] - inputs[r] < warm_up[r] else "I"
            number = forwards[r] if kind == "F" else inputs[r]
            if (kind, r, number) not in arrived:
                break
            arrives = arrived[kind, r, number]
            while weights[r] < inputs[r]:
                gap, used = arrives - clock[r], forwards[r] - inputs[r] + kept * (inputs[r] - weights[r])
                full = kind == "F" and used + 1 > held + 1e-9
                if not full and (gap < share * w - 1e-9 or gap <= 1e-9):
                    break
                rows[r].append(Action("W", 0, weights[r]))
                weights[r], clock[r] = weights[r] + 1, clock[r] + w
            rows[r].append(Action(kind, 0, number))
            clock[r] = max(clock[r], arrives) + (f if kind == "F" else i)
            if kind == "F":
                forwards[r] += 1
            else:
                inputs[r] += 1
            if kind == "F" and r == pp - 1:
                arrived["I", r, number] = clock[r]
            elif kind == "F" or r:
                neighbour = r + 1 if kind == "F" else r - 1
                arrived[kind, neighbour, number] = clock[r] + hop
                awake.append(neighbour)
    table = tuple((*row, *(Action("W", 0, n) for n in range(done, m))) for row, done in zip(rows, weights, strict=True))
    return table, [end + w * (m - done) for end, done in zip(clock, weights, strict=True)]


def longest_row(ends: Sequence[float], forward: float, hop: float) -> float:
    """Return the longest time from a rank's first to its last action; rank r starts when r forwards and messages have passed.

    What the paper calls the cost of a schedule: steps follow one another at this pace when nothing makes all ranks wait.
    """
    return round(max(end - rank * (forward + hop) for rank, end in enumerate(ends)), 9)


def row_ends(schedule: Schedule, times: Sequence[float] = (1.0, 1.0, 1.0), hop: float = 0.0) -> list[float]:
    """Return when each rank ends, all stages alike; F, I and W take `times`, B what I and W take."""
    ends = [0.0] * schedule.pp
    for rank, _, _, end in schedule.spans(times, hop):
        ends[rank] = end
    return ends


def zb_1p(pp: int, vpp: int, m: int) -> Schedule:
    """Return the best schedule found that holds at most pp micro-batches, the memory of 1F1B, at F = I = W."""
    return automatic(pp, m, pp, name="zb-1p")


def zb_2p(pp: int, vpp: int, m: int) -> Schedule:
    """Return the best schedule found that holds at most 2 pp micro-batches, at F = I = W."""
    return automatic(pp, m, 2 * pp, name="zb-2p")
