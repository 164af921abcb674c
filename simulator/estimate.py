"""Closed forms over the same prices as the simulation: `bound`, never above it, and `estimate`, which aims at it.

Both take one plan or columns of plans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from simulator.engine.replay import replay, replay_sharded
from simulator.pricing import op_s, segments_s
from simulator.scenario.cluster import Cluster
from simulator.scenario.job import Job
from simulator.scenario.model import Model
from simulator.scenario.plan import Plan, PlanColumns, single
from simulator.scenario.scenario import Scenario
from simulator.units import Number
from simulator.workload.ops import Block
from simulator.workload.schedules import execution_order, schedule
from simulator.workload.stages import StageBlocks, blocks, stage_blocks
from simulator.workload.step import NORM_OP, gradient_ops, optimizer_ops, parameter_ops, send_op


@dataclass(frozen=True, slots=True)
class BlockPrice:
    """Seconds of one block for one micro-batch: its passes, and its data-parallel collectives."""

    forward_s: Number
    backward_s: Number
    gather_s: Number
    reduce_s: Number


def price_blocks(all_blocks: Mapping[str, Block], model: Model, plan: Plan | PlanColumns, cluster: Cluster) -> dict[str, BlockPrice]:
    """Return the price of every block."""

    def one_by_one(ops: tuple) -> Number:
        return segments_s(((op,) for op in ops), model, plan, cluster)

    return {
        name: BlockPrice(
            segments_s(b.forward, model, plan, cluster),
            segments_s(b.backward, model, plan, cluster),
            one_by_one(parameter_ops(b, plan)),
            one_by_one(gradient_ops(b, plan)),
        )
        for name, b in all_blocks.items()
    }


@dataclass(frozen=True, slots=True)
class PipelineTimes:
    """Seconds of one step's parts, on every virtual stage (..., pp * vpp) or rank (..., pp).

    Parameters
    ----------
    forward_s, backward_s, gather_s, reduce_s : ndarray (..., stages)
        One micro-batch, and the data-parallel collectives of one pass.
    late_reduce_s : ndarray (..., stages)
        What remains of the reductions after a backward when they run beside it.
    optimizer_s : ndarray (..., pp)
        Optimizer kernels.
    hop_s, norm_s, first_gather_s : ndarray (...)
        A message between stages, the all-reduce of the gradient norm, the gather of the first block, which nothing can hide.
    stage_blocks : tuple
        Prices of the blocks of each virtual stage, in order.
    """

    forward_s: Number
    backward_s: Number
    gather_s: Number
    reduce_s: Number
    late_reduce_s: Number
    optimizer_s: Number
    hop_s: Number
    norm_s: Number
    first_gather_s: Number
    stage_blocks: tuple[tuple[BlockPrice, ...], ...]


def pipeline_times(
    model: Model,
    plan: Plan | PlanColumns,
    job: Job,
    cluster: Cluster,
    stages: tuple[StageBlocks, ...],
    all_blocks: Mapping[str, Block],
    prices: Mapping[str, BlockPrice],
) -> PipelineTimes:
    """Return the parts of one step; all plans share pp, vpp and the layout."""
    pp, kinds = single(plan.pp), list(prices)
    counts = np.array([[stage.count(kind) for stage in stages] for kind in kinds], dtype=float)  # (kinds, stages)
    plans = np.broadcast_shapes(np.shape(plan.tp), np.shape(plan.dp_shard))

    def over_stages(field: str) -> Number:
        values = np.stack([np.broadcast_to(getattr(prices[kind], field), plans) for kind in kinds], axis=-1)
        return values @ counts

    def over_ranks(of: Callable[[tuple[str, ...]], Number], names: list[tuple[str, ...]]) -> Number:
        """Evaluate each distinct set of blocks once."""
        known = {key: np.broadcast_to(of(key), plans) for key in dict.fromkeys(names)}
        return np.stack([known[key] for key in names], axis=-1)

    def optimizer(names: tuple[str, ...]) -> Number:
        dense, expert = (
            sum(names.count(k) * getattr(all_blocks[k], f) for k in dict.fromkeys(names)) for f in ("dense_parameters", "expert_parameters")
        )
        return segments_s(((op,) for op in optimizer_ops(dense, expert, model, plan, job)), model, plan, cluster)

    own = [tuple(name for s in range(rank, len(stages), pp) for name in stages[s]) for rank in range(pp)]
    return PipelineTimes(
        forward_s=over_stages("forward_s"),
        backward_s=over_stages("backward_s"),
        gather_s=over_stages("gather_s"),
        reduce_s=over_stages("reduce_s"),
        late_reduce_s=over_ranks(lambda names: _late([prices[n] for n in reversed(names)]), list(stages)),
        optimizer_s=over_ranks(optimizer, own),
        hop_s=op_s(send_op(plan, model, job), model, plan, cluster) if pp > 1 else np.zeros(()),
        norm_s=op_s(NORM_OP, model, plan, cluster),
        first_gather_s=prices[stages[0][0]].gather_s if stages[0] else np.zeros(()),
        stage_blocks=tuple(tuple(prices[name] for name in stage) for stage in stages),
    )


def _late(prices: list[BlockPrice]) -> Number:
    """Return how long the reductions of one pass outlast it: each starts behind its block, one after the other."""
    passed: Number = 0.0
    reduced: Number = 0.0
    for p in prices:
        passed = passed + p.backward_s
        reduced = np.maximum(reduced, passed) + p.reduce_s
    return np.maximum(reduced - passed, 0.0)


def _gathering(prices: tuple[BlockPrice, ...]) -> Number:
    """Return the end of a forward whose blocks each wait for their gather; gathers follow one another from the start."""
    passed: Number = 0.0
    gathered: Number = 0.0
    for p in prices:
        gathered = gathered + p.gather_s
        passed = np.where(np.asarray(p.gather_s) > 0, np.maximum(passed, gathered), passed) + p.forward_s
    return passed


def _ahead(plan: Plan | PlanColumns) -> bool:
    """Whether sharded parameters are gathered ahead of the first forward."""
    return plan.zero in (1, 2) and plan.overlap.param_gather


def _per_rank(values: Number, pp: int) -> Number:
    """Return the sum over the chunks of each rank."""
    return values.reshape(*values.shape[:-1], -1, pp).sum(axis=-2)


def _after(plan: Plan | PlanColumns, t: PipelineTimes, pp: int) -> Number:
    """Return what follows the gradient norm on each rank: the optimizer, and the gather that does not run ahead."""
    return t.optimizer_s + (_per_rank(t.gather_s, pp) if plan.zero in (1, 2) and not plan.overlap.param_gather else 0.0)


def bound_s(plan: Plan | PlanColumns, t: PipelineTimes, micro_batches: Number) -> Number:
    """Return a lower bound on the simulated step, seconds.

    Notes
    -----
    Rank r cannot start before a micro-batch has come through the ranks before it, must do its own work for every
    micro-batch, and after its last backward the gradient still has to go back through the ranks before it. One
    micro-batch alone must pass every stage twice. Data-parallel collectives that ZeRO-2 and ZeRO-3 repeat for every
    micro-batch fill a stream of their own. Only what provably cannot hide is added at the ends.
    """
    pp = single(plan.pp)
    m = np.asarray(micro_batches, dtype=float)[..., None]
    f, b = t.forward_s, t.backward_s
    hop = np.asarray(t.hop_s)[..., None]
    ranks = np.arange(pp)
    fill = np.cumsum(f[..., :pp], axis=-1) - f[..., :pp] + hop * ranks
    drain = np.cumsum(b[..., :pp], axis=-1) - b[..., :pp] + hop * ranks
    exposed = plan.zero < 2 and not plan.overlap.grad_reduce
    reduce = _per_rank(t.reduce_s, pp) if exposed else t.late_reduce_s[..., :pp]
    ends = fill + m * _per_rank(f + b, pp)
    alone = (f + b).sum(axis=-1) + 2 * np.asarray(t.hop_s) * (f.shape[-1] - 1)
    last = np.maximum((ends + drain).max(axis=-1), alone)
    reduced = np.maximum((ends + reduce).max(axis=-1), last + reduce[..., 0])
    if _ahead(plan) or plan.zero >= 3:
        reduced = reduced + t.first_gather_s
    if plan.zero >= 2:
        repeated = t.reduce_s + (2 * t.gather_s if plan.zero >= 3 else 0.0)
        reduced = np.maximum(reduced, (m * _per_rank(repeated, pp)).max(axis=-1))
    return reduced + t.norm_s + _after(plan, t, pp).max(axis=-1)


@lru_cache(maxsize=256)
def _order(name: str, pp: int, vpp: int, micro_batches: int) -> tuple:
    return tuple(execution_order(schedule(name, pp, vpp, micro_batches), vpp))


def estimate_s(plan: Plan | PlanColumns, t: PipelineTimes, micro_batches: int, name: str) -> Number:
    """Return an estimate of the simulated step, seconds; all plans share schedule and micro-batches.

    Notes
    -----
    The schedule is replayed action by action with the same prices. Long steps are replayed for six and eight rounds of
    pp micro-batches and continued at that pace. Where ZeRO-2 reduces and ZeRO-3 gathers for every micro-batch, the blocks of
    an action and the data-parallel stream beside them are replayed too.
    """
    pp, vpp = single(plan.pp), single(plan.vpp)
    ready, busy = None, 0.0
    if _ahead(plan):
        gathers = t.gather_s.reshape(*t.gather_s.shape[:-1], vpp, pp)
        first = np.stack([np.broadcast_to(_gathering(stage), t.gather_s.shape[:-1]) for stage in t.stage_blocks], axis=-1)
        ready = (np.cumsum(gathers, axis=-2) - gathers).reshape(t.gather_s.shape) + first
        busy = gathers.sum(axis=-2)
    every = 1.0 if plan.zero >= 3 else 0.0  # whether parameters are gathered for every pass

    def ends(n: int) -> Number:
        order = _order(name, pp, vpp, n)
        if plan.zero < 2:
            return replay(order, t.forward_s, t.backward_s, t.hop_s, pp, ready)
        prices = [[(p.forward_s, p.backward_s, every * p.gather_s, p.reduce_s) for p in stage] or [(0.0,) * 4] for stage in t.stage_blocks]
        return replay_sharded(order, prices, t.hop_s, pp, ready, busy)

    long, short = 8 * pp, 6 * pp
    if name == "gpipe" or micro_batches <= long or (name == "interleaved" and micro_batches % pp):
        done = ends(micro_batches)
    else:
        early, late = ends(short), ends(long)
        done = late + (late - early) * ((micro_batches - long) / (long - short))
    reduced = done.max(axis=-1) if plan.zero >= 2 else _reduced(plan, t, done, pp, vpp)
    return reduced + t.norm_s + _after(plan, t, pp).max(axis=-1)


def _reduced(plan: Plan | PlanColumns, t: PipelineTimes, ends: Number, pp: int, vpp: int) -> Number:
    """Return when all gradients are summed: chunk by chunk behind the last backward of each, or all of them after it."""
    if plan.zero < 2 and not plan.overlap.grad_reduce:
        return (ends[..., :pp] + _per_rank(t.reduce_s, pp)).max(axis=-1)
    done: Number = 0.0
    for chunk in range(vpp - 1, -1, -1):
        here = slice(chunk * pp, (chunk + 1) * pp)
        ready = ends[..., here]
        done = np.maximum(done + t.reduce_s[..., here], ready + t.late_reduce_s[..., here])
    return done.max(axis=-1)


def _one(scenario: Scenario) -> tuple[PipelineTimes, int]:
    model, plan, job, cluster = scenario.model, scenario.plan, scenario.job, scenario.cluster
    all_blocks = blocks(model, plan, job)
    prices = price_blocks(all_blocks, model, plan, cluster)
    times = pipeline_times(model, plan, job, cluster, stage_blocks(model, plan, job), all_blocks, prices)
    return times, job.global_batch // (plan.dp * plan.micro_batch)


def bound(scenario: Scenario) -> float:
    """Return seconds that the simulated step of `scenario` cannot be below."""
    times, micro_batches = _one(scenario)
    return float(bound_s(scenario.plan, times, micro_batches))


def estimate(scenario: Scenario) -> float:
    """Return the estimated seconds of one step of `scenario`; balanced ranks, no slow hosts."""
    times, micro_batches = _one(scenario)
    return float(estimate_s(scenario.plan, times, micro_batches, scenario.plan.schedule))
