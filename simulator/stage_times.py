"""Seconds of the blocks, stages and ends of a step, from the same prices as the simulation; for one plan or columns of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from simulator.beside import Beside
from simulator.compute import host_wait_s
from simulator.engine.replay import Runs
from simulator.pricing import Known, op_s, segments_s
from simulator.scenario.cluster import Accelerator, Cluster
from simulator.scenario.job import Job
from simulator.scenario.model import Model
from simulator.scenario.plan import Plan, PlanColumns, single
from simulator.schedules import Schedule
from simulator.units import Number
from simulator.workload.ops import COMPUTE, HOST, Block, Op, Segment, hides_launches, host_wait, passes
from simulator.workload.stages import StageBlocks
from simulator.workload.step import NORM_OP, gradient_ops, optimizer_ops, parameter_ops, send_op


@dataclass(frozen=True, slots=True)
class BlockPrice:
    """Seconds of one block for one micro-batch.

    Parameters
    ----------
    forward_s, backward_s, input_s, weight_s : Number
        The passes F, B, I and W; in I and W nothing of the other runs beside.
    gather_s, reduce_s : Number
        The data-parallel collectives.
    forward_runs, backward_runs : tuple
        F and B as segments of (stream, seconds), kernels in a row as one; what a pair interleaves.
    extra_s : dict of str to Number
        What F, B, I and W take longer by because collectives beside them take multiprocessors and memory bandwidth.
    paired : dict of str to Beside
        Kernels and communication of F and B, as a pair runs all of them beside each other.
    """

    forward_s: Number
    backward_s: Number
    input_s: Number
    weight_s: Number
    gather_s: Number
    reduce_s: Number
    forward_runs: Runs
    backward_runs: Runs
    extra_s: Mapping[str, Number]
    paired: Mapping[str, Beside]

    def pass_s(self, kind: str) -> Number:
        """Return the seconds of F, B, I or W with collectives beside it."""
        return getattr(self, PASSES[kind]) + self.extra_s[kind]


#: the field of each kind of pass
PASSES = {"F": "forward_s", "B": "backward_s", "I": "input_s", "W": "weight_s"}


#: block prices that add up over a stage
SUMS = ("forward_s", "backward_s", "input_s", "weight_s", "gather_s", "reduce_s")


def _runs(segments: list[list[tuple[Op, Number]]], wait: Number | None) -> Runs:
    """Join kernels in a row and leave out what takes no time for any plan, as the step program does.

    `wait` for the host is last, None where it launches nothing; it is a segment of its own also where it takes no time, and has
    its turn in a pair.
    """
    runs: list[tuple[tuple[str, Number], ...]] = []
    for segment in segments:
        parts = tuple((op.stream, seconds) for op, seconds in segment if np.any(seconds))
        if len(parts) == 1 and parts[0][0] == "compute" and runs and len(runs[-1]) == 1 and runs[-1][0][0] == "compute":
            runs[-1] = (("compute", runs[-1][0][1] + parts[0][1]),)
        elif parts:
            runs.append(parts)
    return tuple(runs) if wait is None else (*runs, ((HOST, wait),))


def _longest(parts: list[Number]) -> Number:
    return parts[0] if len(parts) == 1 else np.maximum.reduce(np.broadcast_arrays(*parts))


def beside(block: Block, kind: str, plan: Plan | PlanColumns, paired: bool = False) -> tuple[Op, ...]:
    """Return the kernels of a pass of `block` and the collectives that run beside them.

    Parameters
    ----------
    paired : bool
        In a pair all collectives do; else those that share a segment with a kernel, and what ZeRO-2 and ZeRO-3 gather and
        reduce for every pass.
    """
    segments = passes(block, kind)
    own = (op for segment in segments for op in segment if op.kind in COMPUTE or paired or len(segment) > 1)
    gathers = parameter_ops(block, plan) if plan.zero >= 3 and kind != "W" else ()
    reduces = gradient_ops(block, plan) if plan.zero >= 2 and kind in "BW" else ()
    return (*own, *gathers, *reduces)


def pass_beside(block: Block, kind: str, model: Model, plan: Plan | PlanColumns, cluster: Cluster, paired: bool = False) -> Beside:
    """Return what runs beside what in a pass of `block`, priced."""
    return Beside.of(((op, op_s(op, model, plan, cluster)) for op in beside(block, kind, plan, paired)), model, plan, cluster)


def price_blocks(
    all_blocks: Mapping[str, Block],
    model: Model,
    plan: Plan | PlanColumns,
    cluster: Cluster,
    sharing: bool = True,
    known: Known | None = None,
) -> dict[str, BlockPrice]:
    """Return the price of every block.

    Parameters
    ----------
    sharing : bool
        Whether to price the data-parallel collectives, too, and find what collectives slow; `simulator.lower_bound` does without.
    known : Known, optional
        Prices of the same model, cluster and degrees.
    """
    known = known or Known(model, plan, cluster)

    def priced(segments: Iterable[Segment]) -> list[list[tuple[Op, Number]]]:
        return [[(op, known.op_s(op)) for op in segment] for segment in segments]

    def chain(segments: list[list[tuple[Op, Number]]], keep: Callable[[Op], bool] = lambda op: True) -> Number:
        kept = [[seconds for op, seconds in segment if keep(op)] for segment in segments]
        return sum((_longest(parts) for parts in kept if parts), 0.0)

    def launched(segments: list[list[tuple[Op, Number]]], keep: Callable[[Op], bool] = lambda op: True) -> Number:
        """Return how long the host still launches when the kernels of a pass are through."""
        if cluster.host.dispatch_s is None:
            return 0.0
        kept = tuple(tuple(op for op, _ in segment if keep(op)) for segment in segments)
        beside = chain(segments, lambda op: keep(op) and hides_launches(op))
        return host_wait_s(host_wait(kept, plan.kernels).launches, beside, cluster.host.dispatch_s)

    def launches(segments: tuple[Segment, ...]) -> bool:
        return bool(np.any(host_wait(segments, plan.kernels).launches))

    def extra(block: Block, kind: str, segments: list[list[tuple[Op, Number]]]) -> Number:
        slow = pass_beside(block, kind, model, plan, cluster).slowdown(cluster.accelerator) if sharing else 1.0
        if not np.any(np.asarray(slow) != 1.0):
            return 0.0
        slowed = [[(op, seconds * (slow if op.kind in COMPUTE else 1.0)) for op, seconds in segment] for segment in segments]
        return chain(slowed, keeps[kind]) - chain(segments, keeps[kind])

    keeps: dict[str, Callable[[Op], bool]] = {
        "F": lambda op: True,
        "B": lambda op: True,
        "I": lambda op: op.grad != "weight",
        "W": lambda op: op.grad == "weight",
    }

    def one(block: Block) -> BlockPrice:
        forward, backward = priced(block.forward), priced(block.backward)
        waits = launched(forward), launched(backward)
        return BlockPrice(
            forward_s=chain(forward) + waits[0],
            backward_s=chain(backward) + waits[1],
            input_s=chain(backward, keeps["I"]) + launched(backward, keeps["I"]),
            weight_s=chain(backward, keeps["W"]) + launched(backward, keeps["W"]),
            gather_s=segments_s(((op,) for op in parameter_ops(block, plan)), model, plan, cluster) if sharing else 0.0,
            reduce_s=segments_s(((op,) for op in gradient_ops(block, plan)), model, plan, cluster) if sharing else 0.0,
            forward_runs=_runs(forward, waits[0] if launches(block.forward) else None),
            backward_runs=_runs(backward, waits[1] if launches(block.backward) else None),
            extra_s={kind: extra(block, kind, forward if kind == "F" else backward) for kind in "FBIW"},
            paired={kind: pass_beside(block, kind, model, plan, cluster, paired=True) for kind in "FB"} if sharing else {},
        )

    return {name: one(block) for name, block in all_blocks.items()}


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of one step's parts, on every stage (..., stages) or rank (..., pp).

    Parameters
    ----------
    forward_s ... weight_s, gather_s, reduce_s : ndarray (..., stages)
        As in `BlockPrice`, summed over the blocks of a stage.
    optimizer_s : ndarray (..., pp)
        Optimizer kernels.
    hop_s, norm_s, first_gather_s : ndarray (...)
        A message between ranks, the all-reduce of the gradient norm, the gather of the first block, which nothing can hide.
    extra_s : dict of str to ndarray (..., stages)
        As in `BlockPrice`, summed over the blocks of a stage.
    stage_blocks : tuple
        Prices of the blocks of each stage, in order.
    accelerator : Accelerator
    """

    forward_s: Number
    backward_s: Number
    input_s: Number
    weight_s: Number
    gather_s: Number
    reduce_s: Number
    optimizer_s: Number
    hop_s: Number
    norm_s: Number
    first_gather_s: Number
    extra_s: Mapping[str, Number]
    stage_blocks: tuple[tuple[BlockPrice, ...], ...]
    accelerator: Accelerator

    def pass_s(self, kind: str) -> Number:
        """Return the seconds of F, B, I or W on every stage, with collectives beside it."""
        return getattr(self, PASSES[kind]) + self.extra_s[kind]


def stage_times(
    model: Model,
    plan: Plan | PlanColumns,
    job: Job,
    cluster: Cluster,
    stages: tuple[StageBlocks, ...],
    all_blocks: Mapping[str, Block],
    prices: Mapping[str, BlockPrice],
    order: Schedule,
) -> StageTimes:
    """Return the parts of one step; all plans share schedule, pp, vpp and layout.

    Parameters
    ----------
    stages : tuple
        Blocks of every stage.
    all_blocks, prices : mapping
        Blocks by name, and what they cost.
    order : Schedule
        Which rank holds which stages.
    """
    kinds = list(prices)
    counts = np.array([[stage.count(kind) for stage in stages] for kind in kinds], dtype=float)  # (kinds, stages)
    plans = np.broadcast_shapes(np.shape(plan.tp), np.shape(plan.dp_shard))

    def over_stages(of: Callable[[BlockPrice], Number]) -> Number:
        return np.stack([np.broadcast_to(of(prices[kind]), plans) for kind in kinds], axis=-1) @ counts

    def optimizer(names: tuple[str, ...]) -> Number:
        dense, expert = (
            sum(names.count(k) * getattr(all_blocks[k], f) for k in dict.fromkeys(names)) for f in ("dense_parameters", "expert_parameters")
        )
        return segments_s(((op,) for op in optimizer_ops(dense, expert, model, plan, job)), model, plan, cluster)

    own = [tuple(name for stage in held for name in stages[stage]) for held in order.held]
    known = {names: np.broadcast_to(optimizer(names), plans) for names in dict.fromkeys(own)}
    return StageTimes(
        **{field: over_stages(attrgetter(field)) for field in SUMS},
        extra_s={kind: over_stages(lambda price, kind=kind: price.extra_s[kind]) for kind in PASSES},
        optimizer_s=np.stack([known[names] for names in own], axis=-1),
        hop_s=op_s(send_op(plan, model, job), model, plan, cluster) if single(plan.pp) > 1 else np.zeros(()),
        norm_s=op_s(NORM_OP, model, plan, cluster),
        first_gather_s=prices[stages[0][0]].gather_s if stages[0] else np.zeros(()),
        stage_blocks=tuple(tuple(prices[name] for name in stage) for stage in stages),
        accelerator=cluster.accelerator,
    )
