"""An estimate of the simulated step: the schedule replayed over the same prices; for one plan or columns of plans."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from simulator.engine.replay import Lap, replay, replay_streams
from simulator.pricing.stage_times import PASSES, BlockPrice, StageTimes, pair_runs, price_blocks, stage_times
from simulator.scenario.plan import Plan, PlanColumns, single
from simulator.scenario.scenario import Scenario
from simulator.schedules import Schedule, by_segments, schedule
from simulator.units import Number
from simulator.workload.stages import blocks, stage_blocks
from simulator.workload.step import gathers

#: rounds of pp micro-batches that stand for longer steps: from the first on, a round takes as long as the one before
ROUNDS = (6, 8)


def rounds(pp: int) -> tuple[int, int]:
    """Return the micro-batches of the two steps that stand for any longer one."""
    short, long = (count * pp for count in ROUNDS)
    return short, long


def continued(early: Number, late: Number, micro_batches: int, pp: int) -> Number:
    """Return when `micro_batches` end, where those of `rounds` end `early` and `late`: at the pace between these."""
    short, long = rounds(pp)
    return late + (late - early) * ((micro_batches - long) / (long - short))


def _ahead(plan: Plan | PlanColumns) -> bool:
    """Whether sharded parameters are gathered ahead of the first forward."""
    return plan.zero in (1, 2) and plan.overlap.param_gather


def _per_rank(values: Number, order: Schedule) -> Number:
    """Return the sum over the stages that each rank holds."""
    return values[..., np.array(order.held)].sum(axis=-1)


def _after(plan: Plan | PlanColumns, t: StageTimes, order: Schedule) -> Number:
    """Return what follows the gradient norm on each rank: the optimizer, and the gather that does not run ahead."""
    return t.optimizer_s + (_per_rank(t.gather_s, order) if plan.zero in (1, 2) and not plan.overlap.param_gather else 0.0)


def _late(prices: tuple[BlockPrice, ...], passed_s: Callable[[BlockPrice], Number]) -> Number:
    """Return how long the reductions of one pass outlast it: each starts behind its block, one after the other."""
    passed: Number = 0.0
    reduced: Number = 0.0
    for p in reversed(prices):
        passed = passed + passed_s(p)
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
        passed = np.where(np.asarray(p.gather_s) > 0, np.maximum(passed, gathered), passed) + p.pass_s("F")
    return passed


def estimate_s(plan: Plan | PlanColumns, t: StageTimes, micro_batches: int, order_of) -> Number:
    """Return an estimate of the simulated step, seconds; all plans share schedule and micro-batches.

    Parameters
    ----------
    order_of : callable
        Returns the `Schedule` for a number of micro-batches.

    Notes
    -----
    The schedule is replayed action by action with the same prices. Long steps are replayed for `ROUNDS` rounds of pp
    micro-batches and continued at that pace. Where ZeRO-2 reduces and ZeRO-3 gathers for every micro-batch, and in pairs,
    the blocks of an action and the streams beside them are replayed, too.
    """
    pp = single(plan.pp)
    short, long = rounds(pp)
    if plan.schedule in ("gpipe", "table") or micro_batches <= long or (single(plan.vpp) > 1 and micro_batches % pp):
        order = order_of(micro_batches)
        ends, done = _ends(plan, t, order)
    else:
        order = order_of(short)
        both = zip(_ends(plan, t, order), _ends(plan, t, order_of(long)), strict=True)
        ends, done = (continued(early, late, micro_batches, pp) for early, late in both)
    reduced = done.max(axis=-1) if plan.zero >= 2 else _reduced(plan, t, ends, order)
    return reduced + t.norm_s + _after(plan, t, order).max(axis=-1)


def _ends(plan: Plan | PlanColumns, t: StageTimes, order: Schedule) -> tuple[Number, Number]:
    """Return when each chunk of each rank ends its last backward (..., pp, vpp), and each rank all that ZeRO-2 and 3 reduce (..., pp)."""
    held = np.array(order.held)
    ready, busy = None, 0.0
    if _ahead(plan):
        sharded, earlier = t.gather_s[..., held], held[:, None, :] < held[:, :, None]  # chunks gather in the order of their stages
        ready = np.einsum("...rd,rcd->...rc", sharded, earlier) + _by_composition(t, _gathering)[..., held]
        busy = sharded.sum(axis=-1)
    if plan.zero < 2 and not order.pairs:
        ends = replay(order, {kind: t.pass_s(kind) for kind in PASSES}, t.hop_s, ready, not plan.overlap.pp)
        return ends, ends.max(axis=-1)
    args = order, lambda what: _laps(plan, t, what), t.forward_s.shape[:-1], t.hop_s
    keys = [tuple(map(id, stage)) for stage in t.stage_blocks]
    ahead, alike = plan.overlap.prefetch if plan.zero >= 3 else 1, [keys.index(key) for key in keys]
    return replay_streams(*args, ready, busy, not plan.overlap.pp, ahead, alike)


def _laps(plan: Plan | PlanColumns, t: StageTimes, what: tuple[tuple[str, int], ...]) -> list[list[Lap]]:
    """Return the blocks of an entry as the streams run them; those of a pair segment by segment."""
    blocks_of = [t.stage_blocks[stage] if kind == "F" else t.stage_blocks[stage][::-1] for kind, stage in what]
    if len(what) == 2:
        runs = pair_runs(*(t.stage_blocks[stage] for _, stage in what), t.accelerator)
    else:
        runs = [[(((("compute", p.pass_s(kind)),),), None) for p in row] for (kind, _), row in zip(what, blocks_of, strict=True)]
    found, how = [], (plan.overlap.queued, by_segments(plan.schedule, plan.table))
    for (kind, _), row, own in zip(what, blocks_of, runs, strict=True):
        times, reduces = gathers(plan, kind), plan.zero >= 2 and kind in "BW"
        found.append(
            [Lap(r, times * p.gather_s, p.reduce_s if reduces else None, *how, host) for (r, host), p in zip(own, row, strict=True)]
        )
    return [row or [Lap(((("compute", 0.0),),))] for row in found]  # a stage without blocks still waits for its message


def _reduced(plan: Plan | PlanColumns, t: StageTimes, ends: Number, order: Schedule) -> Number:
    """Return when all gradients are summed: chunk by chunk behind the last backward of each, or all of them after it."""
    if plan.zero < 2 and not plan.overlap.grad_reduce:
        return (ends.max(axis=-1) + _per_rank(t.reduce_s, order)).max(axis=-1)
    held, done, ranks = np.array(order.held), 0.0, np.arange(order.pp)
    late = {kind: _by_composition(t, lambda stage, kind=kind: _late(stage, lambda p: p.pass_s(kind))) for kind in "BW"}
    for turn in zip(*order.finishes, strict=True):  # of each rank, the next chunk to be done
        chunk = np.array([c for c, _ in turn])
        stage, outlast = held[ranks, chunk], np.stack([late[kind][..., held[r, c]] for r, (c, kind) in enumerate(turn)], axis=-1)
        done = np.maximum(done + t.reduce_s[..., stage], ends[..., ranks, chunk] + outlast)
    return done.max(axis=-1)


def times_of(scenario: Scenario) -> tuple[StageTimes, int]:
    """Return the parts of one step of `scenario`, and its micro-batches."""
    model, plan, job, cluster = scenario.model, scenario.plan, scenario.job, scenario.cluster
    micro_batches = job.global_batch // (plan.dp * plan.micro_batch)
    all_blocks = blocks(model, plan, job)
    prices = price_blocks(all_blocks, model, plan, cluster)
    stages = stage_blocks(model, plan, job)
    return stage_times(model, plan, job, cluster, stages, all_blocks, prices, orders(plan)(micro_batches)), micro_batches


def orders(plan: Plan):
    """Return a function from the number of micro-batches to the `Schedule` of `plan`."""
    return lambda m: schedule(plan.schedule, plan.pp, plan.vpp, m, plan.table)


def estimate(scenario: Scenario) -> float:
    """Return the estimated seconds of one step of `scenario`; balanced ranks, no slow hosts."""
    return float(estimates(scenario))


def estimates(scenario: Scenario) -> np.ndarray:
    """Return `estimate` for a cluster whose speeds may be columns: one number for each of them."""
    times, micro_batches = times_of(scenario)
    return np.asarray(estimate_s(scenario.plan, times, micro_batches, orders(scenario.plan)))
