"""A lower bound on the simulated step, in closed form over the same prices; for one plan or columns of plans.

Shapes: (...) plans, K kinds of blocks, S stages, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import groupby

import numpy as np

from simulator.pricing.operations import Known, op_s
from simulator.pricing.stage_times import BlockPrice, least_pair_s, price_blocks
from simulator.scenario.cluster import Cluster
from simulator.scenario.job import Job
from simulator.scenario.model import Model
from simulator.scenario.plan import Plan, PlanColumns
from simulator.scenario.scenario import Scenario
from simulator.schedules import Schedule, schedule
from simulator.units import Number
from simulator.workload.blocks import Block
from simulator.workload.stages import StageBlocks, blocks, stage_blocks
from simulator.workload.step import NORM_OP, gradient_ops, optimizer_ops, parameter_ops, send_op

#: from the stages of a forward and of a backward to the seconds that the pair of them takes by itself
PairSeconds = Callable[[int, int], Number]
#: streams that the passes of a block keep busy
BUSY = ("compute", "tp", "cp", "ep", "host")
#: prices of a block that tokens and the groups inside a stage decide: its passes, and how long F and B keep each stream busy
PASSES = ("forward_s", "backward_s", "input_s", "weight_s", *(f"{name}_{stream}_s" for name in ("forward", "backward") for stream in BUSY))
#: prices that the data-parallel groups decide
SHARDING = ("gather_s", "reduce_s")
PARAMETERS = ("dense_parameters", "expert_parameters")


@dataclass(frozen=True)
class Sums:
    """Prices of blocks, summed over the stages and ranks that a bound asks for; all plans share the stages.

    Shapes: (...) plans, K kinds of blocks, S stages.

    Parameters
    ----------
    prices : mapping of str to ndarray (..., K)
        Of every kind of block: its `PASSES`, `SHARDING` and parameters.
    kinds : tuple of str
        Names of the K kinds.
    stages : tuple
        Blocks of every stage.
    hop_s, norm_s : ndarray (...)
        A message between ranks, the all-reduce of the gradient norm.
    optimize : callable
        Returns the seconds of the optimizer for dense and expert parameters of shape (..., n).
    """

    prices: Mapping[str, np.ndarray]
    kinds: tuple[str, ...]
    stages: tuple[StageBlocks, ...]
    hop_s: Number
    norm_s: Number
    optimize: Callable[[Number, Number], Number]

    def over(self, field: str, counts: np.ndarray) -> Number:
        """Return a price summed over ``counts`` blocks of each kind, (K, ...) to (..., ...)."""
        values = self.prices[field] @ counts.reshape(len(self.kinds), -1)
        return values.reshape(*values.shape[:-1], *counts.shape[1:])

    def of(self, name: str, field: str) -> Number:
        """Return the price of one block."""
        return self.prices[field][..., self.kinds.index(name)]

    @cached_property
    def counts(self) -> np.ndarray:
        """Blocks of each kind on each stage, (K, S)."""
        return block_counts(self.kinds, self.stages)

    @cached_property
    def before(self) -> np.ndarray:
        """Blocks of each kind on the stages before each, (K, S)."""
        return np.cumsum(self.counts, axis=-1) - self.counts

    def optimizer_s(self, counts: np.ndarray) -> Number:
        """Return the optimizer's seconds on ranks that hold ``counts`` blocks of each kind, (K, n) to (..., n)."""
        return self.optimize(self.over("dense_parameters", counts), self.over("expert_parameters", counts))

    @property
    def first_gather_s(self) -> Number:
        """The gather of the first block, which nothing can hide."""
        return self.of(self.stages[0][0], "gather_s") if self.stages[0] else np.zeros(())


@lru_cache(maxsize=4096)
def block_counts(kinds: tuple[str, ...], stages: tuple[StageBlocks, ...]) -> np.ndarray:
    """Return how many blocks of each kind stand on each stage, (K, S)."""
    return np.array([[stage.count(kind) for stage in stages] for kind in kinds], dtype=float)


def _stacked(rows: Sequence[Mapping[str, Number]], fields: Iterable[str]) -> dict[str, np.ndarray]:
    """Return fields of every kind of block side by side, each (..., K)."""
    return {field: np.stack(np.broadcast_arrays(*(np.asarray(row[field], dtype=float) for row in rows)), axis=-1) for field in fields}


def passes_table(
    all_blocks: Mapping[str, Block], model: Model, plan: Plan | PlanColumns, cluster: Cluster, known: Known | None = None
) -> dict[str, np.ndarray]:
    """Return the `PASSES` of every block, each (..., K); `known` prices may be shared by tables of the same degrees."""

    def row(price: BlockPrice) -> dict[str, Number]:
        found: dict[str, Number] = {name: getattr(price, name) for name in PASSES[:4]}
        for name, runs in (("forward", price.forward_runs), ("backward", price.backward_runs)):
            for stream in BUSY:
                found[f"{name}_{stream}_s"] = sum((s for run in runs for one, s in run if one == stream), 0.0)
        return found

    prices = price_blocks(all_blocks, model, plan, cluster, sharing=False, known=known)
    return _stacked([row(price) for price in prices.values()], PASSES)


def sharding_table(all_blocks: Mapping[str, Block], model: Model, plan: Plan | PlanColumns, cluster: Cluster) -> dict[str, np.ndarray]:
    """Return the `SHARDING` of every block, each (..., K)."""
    known = Known(model, plan, cluster)
    rows = [
        {"gather_s": known.in_turn_s(parameter_ops(block, plan)), "reduce_s": known.in_turn_s(gradient_ops(block, plan))}
        for block in all_blocks.values()
    ]
    return _stacked(rows, SHARDING)


def sizes_table(all_blocks: Mapping[str, Block], fields: Iterable[str] = PARAMETERS) -> dict[str, np.ndarray]:
    """Return parameters, or other sizes, of every block, each (..., K)."""
    return _stacked([{field: getattr(block, field) for field in fields} for block in all_blocks.values()], fields)


def optimizer_of(model: Model, plan: Plan | PlanColumns, job: Job, cluster: Cluster) -> Callable[[Number, Number], Number]:
    """Return a function from dense and expert parameters on ranks, (..., n), to the optimizer's seconds."""
    beside = plan.with_rank_axis()
    return lambda dense, expert: Known(model, beside, cluster).in_turn_s(optimizer_ops(dense, expert, model, beside, job))


def hop_s(model: Model, plan: Plan | PlanColumns, job: Job, cluster: Cluster) -> Number:
    """Return the seconds of a message between neighbours of a pipeline; 0 where it has one rank."""
    return np.where(np.asarray(plan.pp) > 1, op_s(send_op(plan, model, job), model, plan, cluster), 0.0)


def _own(t: Sums, order: Schedule, ranks: Sequence[int] | slice = slice(None)) -> np.ndarray:
    """Return the blocks of each kind that ranks hold, (K, ranks)."""
    return t.counts[:, np.array(order.held)[ranks]].sum(axis=-1)


def _after(plan: Plan | PlanColumns, t: Sums, own: np.ndarray) -> Number:
    """Return what follows the gradient norm on ranks that hold `own`: the optimizer, and the gather that does not run ahead."""
    return t.optimizer_s(own) + (t.over("gather_s", own) if plan.zero in (1, 2) and not plan.overlap.param_gather else 0.0)


def runs_of(names: Iterable[str]) -> list[tuple[str, int]]:
    """Return blocks as (name, how many of it in a row)."""
    return [(name, len(list(same))) for name, same in groupby(names)]


def _late(t: Sums, names: StageBlocks) -> Number:
    """Return how long the reductions of one pass outlast it: each starts behind its block, one after the other.

    Notes
    -----
    Of n equal blocks, which take b and are reduced in r, the first or the last decides:
    ``reduced + n r``, ``passed + b + n r`` or ``passed + n b + r``.
    """
    passed: Number = 0.0
    reduced: Number = 0.0
    for name, n in runs_of(reversed(names)):
        backward, reduce = t.of(name, "backward_s"), t.of(name, "reduce_s")
        reduced = np.maximum(np.maximum(reduced, passed + backward) + n * reduce, passed + n * backward + reduce)
        passed = passed + n * backward
    return np.maximum(reduced - passed, 0.0)


def _by_composition(t: Sums, places: Sequence[int], of: Callable[[StageBlocks], Number]) -> Number:
    """Return ``of(blocks)`` of the stages at `places`, evaluated once for each distinct make-up; (..., places)."""
    known = {stage: of(stage) for stage in dict.fromkeys(t.stages[place] for place in places)}
    shape = t.prices["forward_s"].shape[:-1]
    return np.stack([np.broadcast_to(known[t.stages[place]], shape) for place in places], axis=-1)


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


def _in_pairs(t: Sums, order: Schedule, ranks: list[int], m: Number, pair_s: PairSeconds | None) -> Number:
    """Return the least time that ranks need for their forwards and backwards, partly in pairs; (..., ranks).

    Notes
    -----
    Outside pairs actions follow one another. Pairs last as long as the busiest stream, and as their backwards; where `pair_s`
    says more, as each of them lasts by itself: the actions of a rank follow a pair only when both of its parts have ended.
    """
    blocks, many = t.counts[:, np.array(order.held)[ranks]], m[..., None]  # (K, ranks, vpp), (..., 1, 1)
    apart = [np.minimum(of_kind, many) for of_kind in order.alone[:, ranks]]
    forwards, backwards = (many - of_kind for of_kind in apart)
    busy = {
        stream: (forwards * t.over(f"forward_{stream}_s", blocks) + backwards * t.over(f"backward_{stream}_s", blocks)).sum(axis=-1)
        for stream in BUSY
    }
    backward = t.over("backward_s", blocks)
    longest = np.maximum.reduce([*busy.values(), (backwards * backward).sum(axis=-1)])
    if pair_s:
        own = [sum((n * pair_s(order.held[r][f], order.held[r][b]) for (f, b), n in order.paired[r].items()), 0.0) for r in ranks]
        longest = np.maximum(longest, np.stack(np.broadcast_arrays(*own, longest[..., 0])[:-1], axis=-1))
    return longest + (apart[0] * t.over("forward_s", blocks) + apart[1] * backward).sum(axis=-1)


def bound_s(plan: Plan | PlanColumns, t: Sums, micro_batches: Number, order: Schedule, pair_s: PairSeconds | None = None) -> Number:
    """Return a lower bound on the simulated step, seconds.

    Parameters
    ----------
    order : Schedule
        Places and kinds of actions; its own number of micro-batches matters only for how many actions stand outside pairs.
    pair_s : callable, optional
        Returns what a pair of a forward of one stage and a backward of another takes by itself, (...); makes the bound of a
        schedule with pairs tight. `order` then has the plans' own number of micro-batches.

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
        work = _in_pairs(t, order, ranks, m, pair_s)
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
    if (plan.zero in (1, 2) and plan.overlap.param_gather) or plan.zero >= 3:  # parameters are gathered before the first forward
        reduced = reduced + t.first_gather_s
    if plan.zero >= 2:
        repeated = t.over("reduce_s", own) + (2 * t.over("gather_s", own) if plan.zero >= 3 else 0.0)
        reduced = np.maximum(reduced, (m * repeated).max(axis=-1))
    return reduced + t.norm_s + _after(plan, t, own).max(axis=-1)


def _exposed(plan: Plan | PlanColumns, t: Sums, order: Schedule, held: np.ndarray, own: np.ndarray) -> Number:
    """Return the part of the gradient reduction that nothing can hide on ranks that hold `held`; (..., ranks)."""
    if plan.zero < 2 and not plan.overlap.grad_reduce:
        return t.over("reduce_s", own)
    one_by_one = not order.splits and not order.pairs

    def late(stage: StageBlocks) -> Number:
        return _late(t, stage) if one_by_one else t.of(stage[0], "reduce_s") if stage else 0.0

    if order.wiring == "loop":
        return _by_composition(t, held[:, 0], late)
    return np.minimum.reduce([_by_composition(t, places, late) for places in held.T])


def bound(scenario: Scenario) -> float:
    """Return seconds that the simulated step of `scenario` cannot be below."""
    model, plan, job, cluster = scenario.model, scenario.plan, scenario.job, scenario.cluster
    all_blocks, args = blocks(model, plan, job), (model, plan, cluster)
    sums = Sums(
        prices=passes_table(all_blocks, *args) | sharding_table(all_blocks, *args) | sizes_table(all_blocks),
        kinds=tuple(all_blocks),
        stages=stage_blocks(model, plan, job),
        hop_s=hop_s(model, plan, job, cluster),
        norm_s=op_s(NORM_OP, model, plan, cluster),
        optimize=optimizer_of(model, plan, job, cluster),
    )
    order = schedule(plan.schedule, plan.pp, plan.vpp, scenario.micro_batches, plan.table)
    return float(bound_s(plan, sums, scenario.micro_batches, order, _pairs(scenario, all_blocks, sums.stages) if order.pairs else None))


def _pairs(scenario: Scenario, all_blocks: Mapping[str, Block], stages: tuple[StageBlocks, ...]) -> PairSeconds:
    """Return what the pairs of one plan take by themselves."""
    prices = price_blocks(all_blocks, scenario.model, scenario.plan, scenario.cluster)

    @cache
    def pair_s(forward: StageBlocks, backward: StageBlocks) -> Number:
        of = ([prices[name] for name in names] for names in (forward, backward))
        return least_pair_s(*of, scenario.plan, scenario.cluster.accelerator, ())

    return lambda forward, backward: pair_s(stages[forward], stages[backward])
