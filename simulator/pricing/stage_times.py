"""Seconds of the blocks, stages and ends of a step, from the same prices as the simulation; for one plan or columns of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from simulator.engine.replay import Lap, Runs, entry_s
from simulator.pricing.beside import Beside
from simulator.pricing.operations import Known, longest, op_s, wait_s
from simulator.scenario.cluster import Accelerator, Cluster
from simulator.scenario.job import Job
from simulator.scenario.model import Model
from simulator.scenario.plan import Plan, PlanColumns, single
from simulator.schedules import Schedule, by_segments
from simulator.units import Number
from simulator.workload.blocks import Block, passes
from simulator.workload.ops import COMPUTE, HOST, Op, Segment, awaited, launched
from simulator.workload.stages import StageBlocks
from simulator.workload.step import NORM_OP, gathers, gradient_ops, optimizer_ops, parameter_ops, send_op


@dataclass(frozen=True, slots=True)
class PassTimes:
    """Seconds of the passes of a block or a stage for one micro-batch, and of its data-parallel collectives.

    Parameters
    ----------
    forward_s, backward_s, input_s, weight_s : Number
        The passes F, B, I and W; in I and W nothing of the other runs beside.
    gather_s, reduce_s : Number
        The data-parallel collectives.
    extra_s : dict of str to Number
        What F, B, I and W take longer by because collectives beside them take multiprocessors and memory bandwidth; slower
        kernels hide more of the launches.
    """

    forward_s: Number
    backward_s: Number
    input_s: Number
    weight_s: Number
    gather_s: Number
    reduce_s: Number
    extra_s: Mapping[str, Number]

    def pass_s(self, kind: str) -> Number:
        """Return the seconds of F, B, I or W with collectives beside it."""
        return getattr(self, PASSES[kind]) + self.extra_s[kind]


@dataclass(frozen=True, slots=True)
class BlockPrice(PassTimes):
    """Seconds of one block for one micro-batch, with what a pair interleaves.

    Parameters
    ----------
    forward_runs, backward_runs : tuple
        F and B as segments of (stream, seconds) at full speed, kernels in a row as one, at last how long the host launches;
        what a pair interleaves.
    paired : dict of str to Beside
        Kernels and communication of F and B, as a pair runs all of them beside each other.
    """

    forward_runs: Runs
    backward_runs: Runs
    paired: Mapping[str, Beside]


#: the field of each kind of pass
PASSES = {"F": "forward_s", "B": "backward_s", "I": "input_s", "W": "weight_s"}


#: block prices that add up over a stage
SUMS = ("forward_s", "backward_s", "input_s", "weight_s", "gather_s", "reduce_s")


#: marks a segment during which the host launches nothing
_AWAITED = "awaited"


def _runs(segments: list[list[tuple[Op, Number]]], waits: set[int], launched_s: Number | None) -> Runs:
    """Join kernels in a row and leave out what takes no time for any plan, as the step program does.

    What the host launches is last, `launched_s` long, None where it launches nothing. Segments at `waits` are marked.
    """
    runs: list[tuple[tuple[str, Number], ...]] = []
    for at, segment in enumerate(segments):
        parts = tuple((op.stream, seconds) for op, seconds in segment if np.any(seconds))
        if parts:
            _append(runs, (*parts, (_AWAITED, 0.0)) if at in waits else parts)
    return tuple(runs) if launched_s is None else (*runs, ((HOST, launched_s),))


def _append(runs: list[tuple[tuple[str, Number], ...]], parts: tuple[tuple[str, Number], ...]) -> None:
    """Append a segment, or prolong the last one where both are kernels alone."""
    streams = [stream for stream, _ in parts]
    if runs and streams in (["compute"], ["compute", _AWAITED]) and streams == [stream for stream, _ in runs[-1]]:
        runs[-1] = (("compute", runs[-1][0][1] + parts[0][1]), *parts[1:])
    else:
        runs.append(parts)


def slowed(runs: Runs, slow: Number = 1.0) -> tuple[Runs, Number | None]:
    """Return runs as they take their time beside communication, kernels `slow` times as long, and how long the host is busy with them.

    That is as long as it launches and waits for some (`simulator.workload.ops.awaited`); None where it launches nothing.
    """
    found: list[tuple[tuple[str, Number], ...]] = []
    launched: Number | None = None
    awaited_s: Number = 0.0
    for segment in runs:
        if segment[0][0] == HOST:
            launched = segment[0][1]
            continue
        parts = tuple((stream, seconds * slow if stream == "compute" else seconds) for stream, seconds in segment if stream != _AWAITED)
        if len(parts) < len(segment):
            awaited_s = awaited_s + longest([seconds for _, seconds in parts])
        _append(found, parts)
    return tuple(found), None if launched is None else launched + awaited_s


#: the blocks of an action, each with how long it keeps the host busy
_Timed = list[tuple[Runs, Number | None]]


def pair_runs(forward: Sequence[BlockPrice], backward: Sequence[BlockPrice], accelerator: Accelerator) -> tuple[_Timed, _Timed]:
    """Return the blocks of a pair's forward and of its backward, each in the order in which they run, slowed by what all of it shares."""
    shared = sum((*(p.paired["F"] for p in forward), *(p.paired["B"] for p in backward)), Beside())
    slow = shared.slowdown(accelerator)
    there, back = {id(p): slowed(p.forward_runs, slow) for p in forward}, {id(p): slowed(p.backward_runs, slow) for p in backward}
    return [there[id(p)] for p in forward], [back[id(p)] for p in reversed(backward)]


def least_pair_s(
    forward: Sequence[BlockPrice], backward: Sequence[BlockPrice], plan: Plan, accelerator: Accelerator, shape: tuple[int, ...]
) -> Number:
    """Return the seconds of a pair of `plan` that waits for nothing: no message, no gather; `shape` is that of the prices."""
    how = plan.overlap.queued, by_segments(plan.schedule, plan.table)
    timed = pair_runs(forward, backward, accelerator)
    return entry_s([[Lap(runs, 0.0, None, *how, host) for runs, host in row] for row in timed], shape)


def beside(block: Block, kind: str, plan: Plan | PlanColumns, paired: bool = False) -> tuple[Op, ...]:
    """Return the kernels of a pass of `block` and the collectives that run beside them.

    Parameters
    ----------
    paired : bool
        In a pair all collectives do; else those that share a segment with a kernel, and what ZeRO-2 and ZeRO-3 gather ahead
        and reduce for every pass.
    """
    segments = passes(block, kind)
    own = (op for segment in segments for op in segment if op.kind in COMPUTE or paired or len(segment) > 1)
    gathered = parameter_ops(block, plan) * gathers(plan, kind) if plan.overlap.prefetch else ()
    reduces = gradient_ops(block, plan) if plan.zero >= 2 and kind in "BW" else ()
    return (*own, *gathered, *reduces)


def pass_beside(
    block: Block, kind: str, model: Model, plan: Plan | PlanColumns, cluster: Cluster, paired: bool = False, known: Known | None = None
) -> Beside:
    """Return what runs beside what in a pass of `block`, priced; `known` as for `price_blocks`."""
    known = known or Known(model, plan, cluster)
    return Beside.of(((op, known.op_s(op)) for op in beside(block, kind, plan, paired)), model, plan, cluster)


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

    def runs(segments: tuple[Segment, ...], priced: Mapping[int, Number]) -> Runs:
        launches = launched(segments, plan.kernels)
        dispatch_s = 0.0 if cluster.host.dispatch_s is None else cluster.host.dispatch_s
        launched_s = launches * dispatch_s if np.any(launches) else None
        waits = awaited(segments, plan.kernels)
        return _runs([[(op, priced[id(op)]) for op in segment] for segment in segments], waits, launched_s)

    def one(block: Block) -> BlockPrice:
        segments = {kind: passes(block, kind) for kind in PASSES}
        ops = {id(op): op for kind in PASSES for segment in segments[kind] for op in segment}  # passes share most of them
        priced = {number: known.op_s(op) for number, op in ops.items()}

        def pass_s(kind: str, slow: Number) -> Number:
            """Return the seconds of a pass whose kernels take `slow` times as long, the wait for the host included."""
            seconds = {number: priced[number] * (slow if op.kind in COMPUTE else 1.0) for number, op in ops.items()}
            device = sum((longest([seconds[id(op)] for op in segment]) for segment in segments[kind]), 0.0)
            return device + wait_s(segments[kind], lambda op: seconds[id(op)], plan.kernels, cluster.host.dispatch_s)

        alone = {kind: pass_s(kind, 1.0) for kind in PASSES}
        slow = {
            kind: pass_beside(block, kind, model, plan, cluster, known=known).slowdown(cluster.accelerator) if sharing else 1.0
            for kind in PASSES
        }
        return BlockPrice(
            **{field: alone[kind] for kind, field in PASSES.items()},
            gather_s=known.in_turn_s(parameter_ops(block, plan)) if sharing else 0.0,
            reduce_s=known.in_turn_s(gradient_ops(block, plan)) if sharing else 0.0,
            forward_runs=runs(segments["F"], priced),
            backward_runs=runs(segments["B"], priced),
            extra_s={kind: pass_s(kind, slow[kind]) - alone[kind] if np.any(slow[kind] != 1.0) else 0.0 for kind in PASSES},
            paired={kind: pass_beside(block, kind, model, plan, cluster, True, known) for kind in "FB"} if sharing else {},
        )

    return {name: one(block) for name, block in all_blocks.items()}


@dataclass(frozen=True, slots=True)
class StageTimes(PassTimes):
    """Seconds of one step's parts, on every stage (..., stages) or rank (..., pp); those of blocks summed over each stage.

    Parameters
    ----------
    optimizer_s : ndarray (..., pp)
        Optimizer kernels.
    hop_s, norm_s, first_gather_s : ndarray (...)
        A message between ranks, the all-reduce of the gradient norm, the gather of the first block, which nothing can hide.
    stage_blocks : tuple
        Prices of the blocks of each stage, in order.
    accelerator : Accelerator
    """

    optimizer_s: Number
    hop_s: Number
    norm_s: Number
    first_gather_s: Number
    stage_blocks: tuple[tuple[BlockPrice, ...], ...]
    accelerator: Accelerator


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
    plans = np.broadcast_shapes(np.shape(plan.tp), *(np.shape(price.forward_s) for price in prices.values()))

    def over_stages(of: Callable[[BlockPrice], Number]) -> Number:
        return np.stack([np.broadcast_to(of(prices[kind]), plans) for kind in kinds], axis=-1) @ counts

    def optimizer(names: tuple[str, ...]) -> Number:
        dense, expert = (
            sum(names.count(k) * getattr(all_blocks[k], f) for k in dict.fromkeys(names)) for f in ("dense_parameters", "expert_parameters")
        )
        return Known(model, plan, cluster).in_turn_s(optimizer_ops(dense, expert, model, plan, job))

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
