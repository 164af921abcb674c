"""Closed forms over the same prices as the simulation: `bound`, never above it, and `estimate`, which aims at it.

Both take one plan or columns of plans.
"""

from __future__ import annotations

import numpy as np

from simulator.engine.replay import replay, replay_sharded
from simulator.scenario.plan import Plan, PlanColumns, single
from simulator.scenario.scenario import Scenario
from simulator.schedules import Pair, Schedule, schedule
from simulator.stage_times import BlockPrice, StageTimes, price_blocks, stage_times
from simulator.units import Number
from simulator.workload.stages import blocks, stage_blocks


def _ahead(plan: Plan | PlanColumns) -> bool:
    """Whether sharded parameters are gathered ahead of the first forward."""
    return plan.zero in (1, 2) and plan.overlap.param_gather


def _per_rank(values: Number, order: Schedule) -> Number:
    """Return the sum over the stages that each rank holds."""
    return values[..., np.array(order.held)].sum(axis=-1)


def _after(plan: Plan | PlanColumns, t: StageTimes, order: Schedule) -> Number:
    """Return what follows the gradient norm on each rank: the optimizer, and the gather that does not run ahead."""
    return t.optimizer_s + (_per_rank(t.gather_s, order) if plan.zero in (1, 2) and not plan.overlap.param_gather else 0.0)


def _late(prices: tuple[BlockPrice, ...], weight_only: bool) -> Number:
    """Return how long the reductions of one pass outlast it: each starts behind its block, one after the other."""
    passed: Number = 0.0
    reduced: Number = 0.0
    for p in reversed(prices):
        passed = passed + (p.weight_s if weight_only else p.backward_s)
        reduced = np.maximum(reduced, passed) + p.reduce_s
    return np.maximum(reduced - passed, 0.0)


def _on_stages(values: list[Number], t: StageTimes) -> Number:
    return np.stack([np.broadcast_to(v, t.forward_s.shape[:-1]) for v in values], axis=-1)


def _by_composition(t: StageTimes, of) -> Number:
    """Evaluate ``of(blocks)`` once for each distinct make-up of a stage; (..., stages)."""
    known: dict[tuple[int, ...], Number] = {}
    keys = [tuple(map(id, stage)) for stage in t.stage_blocks]
    for key, stage in zip(keys, t.stage_blocks, strict=True):
        if key not in known:
            known[key] = of(stage)
    return _on_stages([known[key] for key in keys], t)


def _gathering(prices: tuple[BlockPrice, ...]) -> Number:
    """Return the end of a forward whose blocks each wait for their gather; gathers follow one another from the start."""
    passed: Number = 0.0
    gathered: Number = 0.0
    for p in prices:
        gathered = gathered + p.gather_s
        passed = np.where(np.asarray(p.gather_s) > 0, np.maximum(passed, gathered), passed) + p.forward_s
    return passed


def bound_s(plan: Plan | PlanColumns, t: StageTimes, micro_batches: Number, order: Schedule) -> Number:
    """Return a lower bound on the simulated step, seconds.

    Parameters
    ----------
    order : Schedule
        Places and kinds of actions; its own number of micro-batches does not matter.

    Notes
    -----
    Rank r cannot start before a micro-batch has come through the stages before its first, must do its own work for every
    micro-batch, and after its last input gradient the gradient still has to go back through the stages before it. One
    micro-batch alone must pass every stage twice. In pairs only the busier of compute and communication counts.
    Data-parallel collectives that ZeRO-2 and ZeRO-3 repeat for every micro-batch fill a stream of their own. Only what
    provably cannot hide is added at the ends.
    """
    held, split, pairs = np.array(order.held), order.splits, order.pairs
    m = np.asarray(micro_batches, dtype=float)[..., None] / len(order.paths)
    f, gradient = t.forward_s, t.input_s if split else t.backward_s
    hops = np.asarray(t.hop_s)[..., None] * np.array(order.messages_before)
    fill, drain = (np.cumsum(x, axis=-1) - x + hops for x in (f, gradient))
    fill, drain = fill[..., held].min(axis=-1), drain[..., held].min(axis=-1)
    if pairs:
        work = before_last = _per_rank(t.forward_compute_s + t.backward_compute_s, order)
        before_last = _per_rank(t.forward_compute_s, order) if split else before_last
    else:
        work = _per_rank(f + (t.input_s + t.weight_s if split else t.backward_s), order)
        before_last = _per_rank(f + gradient, order)
    ends = fill + m * work
    alone = (f + gradient).sum(axis=-1) + 2 * np.asarray(t.hop_s) * order.messages_before[-1]
    last = np.maximum((fill + m * before_last + drain).max(axis=-1), alone)
    if plan.zero < 2 and not plan.overlap.grad_reduce:
        reduce = _per_rank(t.reduce_s, order)
    else:
        one_by_one = not split and not pairs
        late = _by_composition(t, lambda stage: _late(stage, False) if one_by_one else stage[0].reduce_s if stage else 0.0)
        reduce = late[..., held[:, 0]] if order.wiring == "loop" else late[..., held].min(axis=-1)
    first = reduce[..., order.paths[0][0][0]] if not split else 0.0
    reduced = np.maximum((ends + reduce).max(axis=-1), last + first)
    if _ahead(plan) or plan.zero >= 3:
        reduced = reduced + t.first_gather_s
    if plan.zero >= 2:
        repeated = t.reduce_s + (2 * t.gather_s if plan.zero >= 3 else 0.0)
        reduced = np.maximum(reduced, (m * _per_rank(repeated, order)).max(axis=-1))
    return reduced + t.norm_s + _after(plan, t, order).max(axis=-1)


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
        [run for block in t.stage_blocks[forward] for run in block.forward_runs],
        [run for block in reversed(t.stage_blocks[backward]) for run in block.backward_runs],
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
    return reduced + t.norm_s + _after(plan, t, order).max(axis=-1)


def _ends(plan: Plan | PlanColumns, t: StageTimes, order: Schedule) -> Number:
    """Return when each chunk of each rank ends its last backward (..., pp, vpp); with ZeRO-2 and 3 each rank (..., pp)."""
    held = np.array(order.held)
    ready, busy = None, 0.0
    if _ahead(plan):
        gathers, earlier = t.gather_s[..., held], held[:, None, :] < held[:, :, None]  # chunks gather in the order of their stages
        ready = np.einsum("...rd,rcd->...rc", gathers, earlier) + _by_composition(t, _gathering)[..., held]
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
            "F": [(p.forward_s, every * p.gather_s, 0.0) for p in stage] or nothing,
            "B": [(p.backward_s, every * p.gather_s, p.reduce_s) for p in reversed(stage)] or nothing,
            "I": [(p.input_s, every * p.gather_s, 0.0) for p in reversed(stage)] or nothing,
            "W": [(p.weight_s, 0.0, p.reduce_s) for p in reversed(stage)] or nothing,
        }
        for stage in t.stage_blocks
    ]
    return replay_sharded(order, stages, t.hop_s, ready, busy)


def _reduced(plan: Plan | PlanColumns, t: StageTimes, ends: Number, order: Schedule) -> Number:
    """Return when all gradients are summed: chunk by chunk behind the last backward of each, or all of them after it."""
    if plan.zero < 2 and not plan.overlap.grad_reduce:
        return (ends.max(axis=-1) + _per_rank(t.reduce_s, order)).max(axis=-1)
    held, done, ranks = np.array(order.held), 0.0, np.arange(order.pp)
    late = _by_composition(t, lambda stage: _late(stage, order.splits))
    for chunk in np.array(order.finishes).T:  # of each rank, the next chunk to be done
        stage = held[ranks, chunk]
        done = np.maximum(done + t.reduce_s[..., stage], ends[..., ranks, chunk] + late[..., stage])
    return done.max(axis=-1)


def _one(scenario: Scenario) -> tuple[StageTimes, int]:
    model, plan, job, cluster = scenario.model, scenario.plan, scenario.job, scenario.cluster
    micro_batches = job.global_batch // (plan.dp * plan.micro_batch)
    all_blocks = blocks(model, plan, job)
    prices = price_blocks(all_blocks, model, plan, cluster)
    stages = stage_blocks(model, plan, job)
    return stage_times(model, plan, job, cluster, stages, all_blocks, prices, orders(plan)(micro_batches)), micro_batches


def orders(plan: Plan):
    """Return a function from the number of micro-batches to the `Schedule` of `plan`."""
    return lambda m: schedule(plan.schedule, plan.pp, plan.vpp, m, plan.table)


def bound(scenario: Scenario) -> float:
    """Return seconds that the simulated step of `scenario` cannot be below."""
    times, micro_batches = _one(scenario)
    return float(bound_s(scenario.plan, times, micro_batches, orders(scenario.plan)(micro_batches)))


def estimate(scenario: Scenario) -> float:
    """Return the estimated seconds of one step of `scenario`; balanced ranks, no slow hosts."""
    times, micro_batches = _one(scenario)
    return float(estimate_s(scenario.plan, times, micro_batches, orders(scenario.plan)))
