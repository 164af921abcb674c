"""Closed forms over the same prices as the simulation: `bound`, never above it, and `estimate`, which aims at it.

Both take one plan or columns of plans.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import groupby

import numpy as np

from simulator.engine.replay import replay, replay_sharded
from simulator.scenario.plan import Plan, PlanColumns, single
from simulator.scenario.scenario import Scenario
from simulator.schedules import Pair, Schedule, schedule
from simulator.stage_times import BUSY, StageTimes, stage_times
from simulator.units import Number
from simulator.workload.stages import StageBlocks


def _ahead(plan: Plan | PlanColumns) -> bool:
    """Whether sharded parameters are gathered ahead of the first forward."""
    return plan.zero in (1, 2) and plan.overlap.param_gather


def _own(t: StageTimes, order: Schedule, ranks: Sequence[int] | slice = slice(None)) -> np.ndarray:
    """Return the blocks of each kind that ranks hold, (K, ranks)."""
    return t.counts[:, np.array(order.held)[ranks]].sum(axis=-1)


def _after(plan: Plan | PlanColumns, t: StageTimes, own: np.ndarray) -> Number:
    """Return what follows the gradient norm on ranks that hold `own`: the optimizer, and the gather that does not run ahead."""
    return t.optimizer_s(own) + (t.over("gather_s", own) if plan.zero in (1, 2) and not plan.overlap.param_gather else 0.0)


def runs_of(names: Iterable[str]) -> list[tuple[str, int]]:
    """Return blocks as (name, how many of it in a row)."""
    return [(name, len(list(same))) for name, same in groupby(names)]


def _late(t: StageTimes, names: StageBlocks, weight_only: bool) -> Number:
    """Return how long the reductions of one pass outlast it: each starts behind its block, one after the other.

    Notes
    -----
    Of n equal blocks, which take b and are reduced in r, the first or the last decides:
    ``reduced + n r``, ``passed + b + n r`` or ``passed + n b + r``.
    """
    passed: Number = 0.0
    reduced: Number = 0.0
    for name, n in runs_of(reversed(names)):
        backward, reduce = t.of(name, "weight_s" if weight_only else "backward_s"), t.of(name, "reduce_s")
        reduced = np.maximum(np.maximum(reduced, passed + backward) + n * reduce, passed + n * backward + reduce)
        passed = passed + n * backward
    return np.maximum(reduced - passed, 0.0)


def _by_composition(t: StageTimes, places: Sequence[int], of: Callable[[StageBlocks], Number]) -> Number:
    """Return ``of(blocks)`` of the stages at `places`, evaluated once for each distinct make-up; (..., places)."""
    known = {stage: of(stage) for stage in dict.fromkeys(t.stages[place] for place in places)}
    shape = t.prices["forward_s"].shape[:-1]
    return np.stack([np.broadcast_to(known[t.stages[place]], shape) for place in places], axis=-1)


def _gathering(t: StageTimes, names: StageBlocks) -> Number:
    """Return the end of a forward whose blocks each wait for their gather; gathers follow one another from the start.

    Notes
    -----
    Of n equal blocks the first or the last decides, as in `_late`.
    """
    passed: Number = 0.0
    gathered: Number = 0.0
    for name, n in runs_of(names):
        forward, gather = t.of(name, "forward_s"), t.of(name, "gather_s")
        waits = np.maximum(gathered + gather + n * forward, gathered + n * gather + forward)
        passed = passed + n * forward
        passed = np.where(gather > 0, np.maximum(passed, waits), passed)
        gathered = gathered + n * gather
    return passed


@lru_cache(maxsize=4096)
def decisive(held: tuple[tuple[int, ...], ...], stages: tuple[StageBlocks, ...], two_way: bool, pairs: bool) -> tuple[int, ...]:
    """Return the ranks whose bounds are looked at, rank 0 first.

    Notes
    -----
    Ranks that hold the same blocks chunk by chunk do the same work. Of these, one whose first stage comes earlier waits less
    for its first micro-batch and for the last gradient to return, so the one with the latest first stage decides; in pairs also
    the earliest, which runs more forwards alone. In two-way pipelines no rank is later in both directions, and all count.
    """
    if two_way:
        return tuple(range(len(held)))
    by_stage = sorted(enumerate(held), key=lambda row: row[1][0])
    last = {tuple(stages[stage] for stage in own): rank for rank, own in by_stage}
    first = {tuple(stages[stage] for stage in own): rank for rank, own in reversed(by_stage)} if pairs else {}
    return tuple(sorted({0, *last.values(), *first.values()}))


def _in_pairs(plan: Plan | PlanColumns, t: StageTimes, order: Schedule, ranks: list[int], m: Number) -> Number:
    """Return the least time that ranks need for their forwards and backwards, partly in pairs; (..., ranks).

    Notes
    -----
    Outside pairs actions follow one another. Pairs last as long as the busiest stream, compute slowed as in the simulation
    (`simulator.simulate`), and as their backwards.
    """
    blocks, many = t.counts[:, np.array(order.held)[ranks]], m[..., None]  # (K, ranks, vpp), (..., 1, 1)
    apart = [np.minimum(of_kind, many) for of_kind in order.alone[:, ranks]]
    forwards, backwards = (many - of_kind for of_kind in apart)
    busy = {
        stream: (forwards * t.over(f"forward_{stream}_s", blocks) + backwards * t.over(f"backward_{stream}_s", blocks)).sum(axis=-1)
        for stream in BUSY
    }
    share = plan.overlap.multiprocessors
    busy["compute"] = busy["compute"] + share / (1 - share) * np.minimum(busy["compute"], busy["ep"])
    backward = t.over("backward_s", blocks)
    longest = np.maximum.reduce([*busy.values(), (backwards * backward).sum(axis=-1)])
    return longest + (apart[0] * t.over("forward_s", blocks) + apart[1] * backward).sum(axis=-1)


def bound_s(plan: Plan | PlanColumns, t: StageTimes, micro_batches: Number, order: Schedule) -> Number:
    """Return a lower bound on the simulated step, seconds.

    Parameters
    ----------
    order : Schedule
        Places and kinds of actions; its own number of micro-batches matters only for how many actions stand outside pairs.

    Notes
    -----
    Rank r cannot start before a micro-batch has come through the stages before its first, must do its own work for every
    micro-batch, and after its last input gradient the gradient still has to go back through the stages before it. One
    micro-batch alone must pass every stage twice. Of pairs see `_in_pairs`.
    Data-parallel collectives that ZeRO-2 and ZeRO-3 repeat for every micro-batch fill a stream of their own. Only what
    provably cannot hide is added at the ends. Only `decisive` ranks are looked at.
    """
    two_way, split, pairs = order.wiring == "two-way", order.splits, order.pairs
    ranks = list(decisive(order.held, t.stages, two_way, pairs))
    held = np.array(order.held)[ranks]
    own, entry = _own(t, order, ranks), held if two_way else held[:, :1]
    m = np.asarray(micro_batches, dtype=float)[..., None] / len(order.paths)
    gradient = "input_s" if split else "backward_s"
    hops = np.asarray(t.hop_s)[..., None, None] * np.array(order.messages_before)[entry]
    fill, drain = ((t.over(field, t.before[:, entry]) + hops).min(axis=-1) for field in ("forward_s", gradient))
    if pairs:
        work = _in_pairs(plan, t, order, ranks, m)
        before_last = m * np.maximum.reduce([t.over(f"forward_{stream}_s", own) for stream in BUSY]) if split else work
    else:
        before_last = m * (t.over("forward_s", own) + t.over(gradient, own))
        work = before_last + m * t.over("weight_s", own) if split else before_last
    ends = fill + work
    every = t.counts.sum(axis=-1, keepdims=True)
    alone = (t.over("forward_s", every) + t.over(gradient, every))[..., 0] + 2 * np.asarray(t.hop_s) * order.messages_before[-1]
    last = np.maximum((fill + before_last + drain).max(axis=-1), alone)
    reduce = _exposed(plan, t, order, held, own)
    first = reduce[..., 0] if not split else 0.0
    reduced = np.maximum((ends + reduce).max(axis=-1), last + first)
    if _ahead(plan) or plan.zero >= 3:
        reduced = reduced + t.first_gather_s
    if plan.zero >= 2:
        repeated = t.over("reduce_s", own) + (2 * t.over("gather_s", own) if plan.zero >= 3 else 0.0)
        reduced = np.maximum(reduced, (m * repeated).max(axis=-1))
    return reduced + t.norm_s + _after(plan, t, own).max(axis=-1)


def _exposed(plan: Plan | PlanColumns, t: StageTimes, order: Schedule, held: np.ndarray, own: np.ndarray) -> Number:
    """Return the part of the gradient reduction that nothing can hide on ranks that hold `held`; (..., ranks)."""
    if plan.zero < 2 and not plan.overlap.grad_reduce:
        return t.over("reduce_s", own)
    one_by_one = not order.splits and not order.pairs

    def late(stage: StageBlocks) -> Number:
        return _late(t, stage, False) if one_by_one else t.of(stage[0], "reduce_s") if stage else 0.0

    if order.wiring == "loop":
        return _by_composition(t, held[:, 0], late)
    return np.minimum.reduce([_by_composition(t, places, late) for places in held.T])


def pair_s(t: StageTimes, forward: int, backward: int, share: float) -> tuple[Number, Number]:
    """Return when a forward on one stage and a backward on another end that start together and interleave, seconds.

    Parameters
    ----------
    share : float
        Share of the multiprocessors that communication takes while it runs beside compute.

    Notes
    -----
    The two take turns segment by segment on shared streams, as in the step program. Compute is slowed by
    ``1 + share / (1 - share)`` for the part of the time in which communication runs.
    """
    threads = (
        [run for name in t.stages[forward] for run in t.runs[name][0]],
        [run for name in reversed(t.stages[backward]) for run in t.runs[name][1]],
    )
    parts = [part for thread in threads for run in thread for part in run]
    compute, talk = (sum((seconds for stream, seconds in parts if stream == name), 0.0) for name in ("compute", "ep"))
    slow = 1 + share / (1 - share) * np.minimum(1.0, talk / np.maximum(compute, 1e-12))
    ends: list[Number] = [0.0, 0.0]
    streams: dict[str, Number] = {}
    for turn in range(max(map(len, threads))):
        for which, thread in enumerate(threads):
            if turn < len(thread):
                begin, last = ends[which], ends[which]
                for stream, seconds in thread[turn]:
                    seconds = seconds * slow if stream == "compute" else seconds
                    done = np.maximum(begin, streams.get(stream, 0.0)) + seconds
                    streams[stream] = done
                    last = np.maximum(last, done)
                ends[which] = last
    return ends[0], ends[1]


def estimate_s(plan: Plan | PlanColumns, t: StageTimes, micro_batches: int, order_of) -> Number:
    """Return an estimate of the simulated step, seconds; all plans share schedule and micro-batches.

    Parameters
    ----------
    order_of : callable
        Returns the `Schedule` for a number of micro-batches.

    Notes
    -----
    The schedule is replayed action by action with the same prices. Long steps are replayed for six and eight rounds of
    pp micro-batches and continued at that pace. Where ZeRO-2 reduces and ZeRO-3 gathers for every micro-batch, the blocks of
    an action and the data-parallel stream beside them are replayed too; pairs then count as forward and backward one after
    the other, which is too long.
    """
    pp = single(plan.pp)
    long, short = 8 * pp, 6 * pp
    if plan.schedule in ("gpipe", "table") or micro_batches <= long or (single(plan.vpp) > 1 and micro_batches % pp):
        order = order_of(micro_batches)
        done = _ends(plan, t, order)
    else:
        order = order_of(short)
        early, late = _ends(plan, t, order), _ends(plan, t, order_of(long))
        done = late + (late - early) * ((micro_batches - long) / (long - short))
    reduced = done.max(axis=-1) if plan.zero >= 2 else _reduced(plan, t, done, order)
    return reduced + t.norm_s + _after(plan, t, _own(t, order)).max(axis=-1)


def _ends(plan: Plan | PlanColumns, t: StageTimes, order: Schedule) -> Number:
    """Return when each chunk of each rank ends its last backward (..., pp, vpp); with ZeRO-2 and 3 each rank (..., pp)."""
    held = np.array(order.held)
    ready, busy = None, 0.0
    if _ahead(plan):
        gathers = t.gather_s[..., held]
        ready = np.cumsum(gathers, axis=-1) - gathers + _by_composition(t, range(len(t.stages)), lambda stage: _gathering(t, stage))[..., held]
        busy = gathers.sum(axis=-1)
    pairs = {
        (f, b): pair_s(t, f, b, plan.overlap.multiprocessors)
        for rank, row in enumerate(order.table)
        for f, b in {(held[rank, e.forward.chunk], held[rank, e.backward.chunk]) for e in row if isinstance(e, Pair)}
    }
    if plan.zero < 2:
        seconds = {"F": t.forward_s, "B": t.backward_s, "I": t.input_s, "W": t.weight_s}
        return replay(order, seconds, pairs, t.hop_s, ready)
    every = 1.0 if plan.zero >= 3 else 0.0  # whether parameters are gathered for every pass
    nothing = [(0.0, 0.0, 0.0)]  # a stage without blocks still waits for its message
    stages = [
        {
            "F": [(t.of(k, "forward_s"), every * t.of(k, "gather_s"), 0.0) for k in stage] or nothing,
            "B": [(t.of(k, "backward_s"), every * t.of(k, "gather_s"), t.of(k, "reduce_s")) for k in reversed(stage)] or nothing,
            "I": [(t.of(k, "input_s"), every * t.of(k, "gather_s"), 0.0) for k in reversed(stage)] or nothing,
            "W": [(t.of(k, "weight_s"), 0.0, t.of(k, "reduce_s")) for k in reversed(stage)] or nothing,
        }
        for stage in t.stages
    ]
    return replay_sharded(order, stages, t.hop_s, ready, busy)


def _reduced(plan: Plan | PlanColumns, t: StageTimes, ends: Number, order: Schedule) -> Number:
    """Return when all gradients are summed: chunk by chunk behind the last backward of each, or all of them after it."""
    if plan.zero < 2 and not plan.overlap.grad_reduce:
        return (ends.max(axis=-1) + t.over("reduce_s", _own(t, order))).max(axis=-1)
    held, done, ranks = np.array(order.held), 0.0, np.arange(order.pp)
    late = _by_composition(t, range(len(t.stages)), lambda stage: _late(t, stage, order.splits))
    for chunk in np.array(order.finishes).T:  # of each rank, the next chunk to be done
        stage = held[ranks, chunk]
        done = np.maximum(done + t.reduce_s[..., stage], ends[..., ranks, chunk] + late[..., stage])
    return done.max(axis=-1)


def orders(plan: Plan):
    """Return a function from the number of micro-batches to the `Schedule` of `plan`."""
    return lambda m: schedule(plan.schedule, plan.pp, plan.vpp, m, plan.table)


def bound(scenario: Scenario) -> float:
    """Return seconds that the simulated step of `scenario` cannot be below."""
    plan, micro_batches = scenario.plan, scenario.micro_batches
    return float(bound_s(plan, stage_times(scenario), micro_batches, orders(plan)(micro_batches)))


def estimate(scenario: Scenario) -> float:
    """Return the estimated seconds of one step of `scenario`; balanced ranks, no slow hosts."""
    return float(estimate_s(scenario.plan, stage_times(scenario), scenario.micro_batches, orders(scenario.plan)))
