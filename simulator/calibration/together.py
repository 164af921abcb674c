"""Collectives where a step runs them: between kernels that empty the caches, among ranks that do not arrive together.

A collective that is repeated by itself finds its buffers in the cache, its threads awake and its partners ready. In a step it finds
none of these. So probes of every layout run whole, and each call is split into what the last rank to arrive spends in it (the cost of
the collective) and what the others spend more (waiting, a property of the kernels before it).
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from simulator.calibration.cases import Case, Row, counts, ops_of
from simulator.calibration.clock import STILL, batch, quartiles, timed
from simulator.calibration.moe_model import Options
from simulator.calibration.moe_step import MoEStep
from simulator.calibration.recorder import Call, Spent

#: steps before the first that counts
WARM = 1
#: an exchange below this share of the largest of its step carries no rows
SMALL = 1 / 16
#: axes along which a step communicates, as recorded names begin
TALK = ("tp", "ep", "dp", "edp", "pp", "world")


#: what one rank did in a step: time by recorded name, the whole step, and its collectives in order
Seen = tuple[dict[str, Spent], Spent, list[Call]]


def observed(step: MoEStep, tokens: torch.Tensor, device: torch.device) -> list[Seen]:
    """Run one recorded step and return what every rank did in it; all ranks together."""
    whole, calls = timed(step, tokens, device), step.recorder.calls()
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (step.recorder.take(), whole, calls))
    return everyone


def _cost(calls: Sequence[Call]) -> float:
    """Return the seconds of one collective from those of its ranks.

    The last rank to arrive waits for nobody: the least time is the cost, what the mean is more is waiting. But tensor-parallel ranks
    do the same work and meet a hundred times a step: what they wait is how the collectives themselves came in late, and recurs with them.
    """
    seconds = [call.seconds for call in calls]
    return statistics.fmean(seconds) if calls[0].axis == "tp" else min(seconds)


def waited(ranks: list[list[Call]]) -> dict[str, float]:
    """Return the seconds that ranks waited in collectives for the last one to arrive, mean over ranks, by axis; none for tp.

    Parameters
    ----------
    ranks : list of list of Call
        The calls of each rank, in the same order.
    """
    found: dict[str, float] = defaultdict(float)
    for calls in zip(*ranks, strict=True):
        seconds = [call.seconds for call in calls]
        found[calls[0].axis] += statistics.fmean(seconds) - _cost(calls)
    return found


def split(ranks: list[list[Call]]) -> dict[tuple[str, float], list[float]]:
    """Return the seconds of every collective by name and bytes, without what `waited` says.

    Parameters
    ----------
    ranks : list of list of Call
        The calls of each rank, in the same order.

    Notes
    -----
    An exchange of rows is announced and accompanied by small ones (their numbers, their weights), which the simulator does not
    count: these are shared out over the exchanges of rows.
    """
    costs = defaultdict(list)
    exchanges = []
    for calls in zip(*ranks, strict=True):
        cost, size = _cost(calls), statistics.fmean(call.size for call in calls)
        if calls[0].name.startswith("all_to_all"):
            exchanges.append((calls[0].name, size, cost))
        else:
            costs[calls[0].name, size].append(cost)
    most = max((size for _, size, _ in exchanges), default=0.0)
    rows = [(name, size) for name, size, _ in exchanges if size > SMALL * most]
    if rows:
        mean, total = statistics.fmean(size for _, size in rows), sum(seconds for *_, seconds in exchanges)
        costs[rows[0][0], round(mean)] = [total / len(rows)] * len(rows)
    return costs


def together(case: Case, rank: int, device: torch.device, repeats: int, turn: int) -> Iterator[Row]:
    """Yield a row per collective and size of the probe, one per kind of kernel, and those of its waiting and the whole step.

    Notes
    -----
    A row is the median over steps of the mean over the calls of a step: a step adds up its calls, and a few slow ones count in it.
    """
    step, tokens = MoEStep(case.model, case.plan, case.job, rank, Options(lr=STILL), device), batch(case, device)
    for _ in range(WARM):
        step.run(tokens)
    step.recorder.on = True
    step.recorder.take()
    taken: dict[tuple[str, float], list[Spent]] = defaultdict(list)
    number: dict[tuple[str, float], int] = {}
    for _ in range(repeats):
        everyone = observed(step, tokens, device)
        calls = [calls for *_, calls in everyone]
        for key, seconds in split(calls).items():
            taken[key].append(Spent(statistics.fmean(seconds)))
            number[key] = len(seconds)
        taken["wait", 0.0].append(Spent(sum(waited(calls).values())))
        took = [times | {"step": whole} for times, whole, _ in everyone]
        for name in {name for times in took for name in times if name.split(".")[0] not in TALK}:
            spent = [times.get(name, Spent()) for times in took]
            taken[name, 0.0].append(Spent(statistics.fmean(s.wall_s for s in spent), statistics.fmean(s.cpu_s for s in spent)))
    step.close()
    counted = counts(ops_of(case))
    for (name, size), spent in taken.items():
        middle, spread = quartiles([s.wall_s for s in spent])
        cpu, _ = quartiles([s.cpu_s for s in spent])
        calls, flop, moved = counted.get(name, (float(number.get((name, size), 1)), 0.0, size))
        yield Row("together", case.name, name, dist.get_world_size(), calls, flop, moved, middle, spread, cpu, repeats, turn)
