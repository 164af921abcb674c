"""Collectives where a step runs them: between kernels that empty the caches, among ranks that do not arrive together.

A collective that is repeated by itself finds its buffers in the cache, its threads awake and its partners ready. In a step it finds
none of these. So probes of every layout run whole, and each call is split into what the last rank to arrive spends in it (the cost of
the collective) and what the others spend more (waiting, a property of the kernels before it).
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.distributed as dist

from simulator.calibration.cases import Case, Row, counts, ops_of
from simulator.calibration.measure import STILL, batch, quartiles, timed
from simulator.calibration.moe_model import Options
from simulator.calibration.moe_step import MoEStep
from simulator.calibration.recorder import Call, Spent

#: steps before the first that counts
WARM = 1
#: an exchange below this share of the largest of its step carries no rows
SMALL = 1 / 16
#: axes along which a step communicates, as recorded names begin
TALK = ("tp", "ep", "dp", "edp", "pp", "world")


def split(ranks: list[list[Call]]) -> tuple[dict[tuple[str, float], list[float]], float]:
    """Return the seconds of every collective by name and bytes, and the mean over ranks of the seconds that they waited in them.

    Parameters
    ----------
    ranks : list of list of Call
        The calls of each rank, in the same order.

    Notes
    -----
    The last rank to arrive waits for nobody: the least time over ranks is the cost of a call, what the mean is more is waiting.
    An exchange of rows is announced and accompanied by small ones (their numbers, their weights), which the simulator does not
    count: these are shared out over the exchanges of rows.
    """
    costs, waited = defaultdict(list), 0.0
    exchanges = []
    for calls in zip(*ranks, strict=True):
        seconds, size = [call.seconds for call in calls], statistics.fmean(call.size for call in calls)
        waited += statistics.fmean(seconds) - min(seconds)
        if calls[0].name.startswith("all_to_all"):
            exchanges.append((calls[0].name, size, min(seconds)))
        else:
            costs[calls[0].name, size].append(min(seconds))
    most = max((size for _, size, _ in exchanges), default=0.0)
    rows = [(name, size) for name, size, _ in exchanges if size > SMALL * most]
    if rows:
        mean, total = statistics.fmean(size for _, size in rows), sum(seconds for *_, seconds in exchanges)
        costs[rows[0][0], round(mean)] = [total / len(rows)] * len(rows)
    return costs, waited


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
        whole, calls = timed(step, tokens, device), step.recorder.calls()
        kernels = {name: spent for name, spent in step.recorder.take().items() if name.split(".")[0] not in TALK}
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (kernels | {"step": whole}, calls))
        costs, waited = split([of for _, of in everyone])
        for key, seconds in costs.items():
            taken[key].append(Spent(statistics.fmean(seconds)))
            number[key] = len(seconds)
        taken["wait", 0.0].append(Spent(waited))
        for name in kernels.keys() | {"step"}:
            spent = [of.get(name, Spent()) for of, _ in everyone]
            taken[name, 0.0].append(Spent(statistics.fmean(s.wall_s for s in spent), statistics.fmean(s.cpu_s for s in spent)))
    step.close()
    counted = counts(ops_of(case))
    for (name, size), spent in taken.items():
        middle, spread = quartiles([s.wall_s for s in spent])
        cpu, _ = quartiles([s.cpu_s for s in spent])
        calls, flop, moved = counted.get(name, (float(number.get((name, size), 1)), 0.0, size))
        yield Row("together", case.name, name, dist.get_world_size(), calls, flop, moved, middle, spread, cpu, repeats, turn)
