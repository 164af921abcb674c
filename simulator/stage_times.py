"""Seconds of the blocks, stages and ends of a step, from the same prices as the simulation; for one plan or columns of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from simulator.pricing import op_s, segments_s
from simulator.scenario.cluster import Cluster
from simulator.scenario.job import Job
from simulator.scenario.model import Model
from simulator.scenario.plan import Plan, PlanColumns
from simulator.scenario.scenario import Scenario
from simulator.units import Number
from simulator.workload.ops import Block, Op, Segment
from simulator.workload.stages import StageBlocks, blocks, stage_blocks
from simulator.workload.step import NORM_OP, gradient_ops, optimizer_ops, parameter_ops, send_op

#: segments of operations side by side, each a stream and its seconds
Runs = tuple[tuple[tuple[str, Number], ...], ...]


#: streams that the passes of a block keep busy
BUSY = ("compute", "tp", "cp", "ep")
#: block prices by what decides them. By tokens and the groups inside a stage: the passes F, B, I and W for one micro-batch (in I
#: and W nothing of the other runs beside), and how long F and B keep each stream busy
PASSES = ("forward_s", "backward_s", "input_s", "weight_s", *(f"{name}_{stream}_s" for name in ("forward", "backward") for stream in BUSY))
#: by the data-parallel groups: gathering parameters, summing gradients
SHARDING = ("gather_s", "reduce_s")


def _runs(segments: list[list[tuple[Op, Number]]]) -> Runs:
    """Join kernels in a row and leave out what takes no time for any plan, as the step program does."""
    runs: list[tuple[tuple[str, Number], ...]] = []
    for segment in segments:
        parts = tuple((op.stream, seconds) for op, seconds in segment if np.any(seconds))
        if len(parts) == 1 and parts[0][0] == "compute" and runs and len(runs[-1]) == 1 and runs[-1][0][0] == "compute":
            runs[-1] = (("compute", runs[-1][0][1] + parts[0][1]),)
        elif parts:
            runs.append(parts)
    return tuple(runs)


def _longest(parts: list[Number]) -> Number:
    return parts[0] if len(parts) == 1 else np.maximum.reduce(np.broadcast_arrays(*parts))


def price_passes(block: Block, model: Model, plan: Plan | PlanColumns, cluster: Cluster) -> dict[str, Any]:
    """Return the `PASSES` of a block, and F and B as `Runs`: segments of (stream, seconds), kernels in a row as one."""

    def priced(segments: Iterable[Segment]) -> list[list[tuple[Op, Number]]]:
        return [[(op, op_s(op, model, plan, cluster)) for op in segment] for segment in segments]

    def chain(segments: list[list[tuple[Op, Number]]], keep: Callable[[Op], bool] = lambda op: True) -> Number:
        kept = [[seconds for op, seconds in segment if keep(op)] for segment in segments]
        return sum((_longest(parts) for parts in kept if parts), 0.0)

    passes = {"forward": priced(block.forward), "backward": priced(block.backward)}
    backward = passes["backward"]
    whole: dict[str, Any] = {f"{name}_s": chain(segments) for name, segments in passes.items()}
    whole |= {f"{name}_runs": _runs(segments) for name, segments in passes.items()}
    whole |= {"input_s": chain(backward, lambda op: op.grad != "weight"), "weight_s": chain(backward, lambda op: op.grad == "weight")}
    for name, segments in passes.items():
        for stream in BUSY:
            whole[f"{name}_{stream}_s"] = sum((s for segment in segments for op, s in segment if op.stream == stream), 0.0)
    return whole


def price_sharding(block: Block, model: Model, plan: Plan | PlanColumns, cluster: Cluster) -> dict[str, Number]:
    """Return the `SHARDING` of a block: gathering its parameters, summing its gradients."""
    return {
        "gather_s": segments_s(((op,) for op in parameter_ops(block, plan)), model, plan, cluster),
        "reduce_s": segments_s(((op,) for op in gradient_ops(block, plan)), model, plan, cluster),
    }


def _summed(field: str) -> cached_property:
    return cached_property(lambda t: t.over(field, t.counts))


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one step's parts, summed over blocks when a form asks for them; all plans share the stages.

    Shapes: (...) plans, K kinds of blocks, S stages.

    Parameters
    ----------
    prices : mapping of str to ndarray (..., K)
        The `PASSES` and `SHARDING` of every kind of block, and its ``dense_parameters`` and ``expert_parameters``.
    runs : mapping of str to (Runs, Runs)
        Runs of a block forward and backward, by its name.
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
    runs: Mapping[str, tuple[Runs, Runs]]
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

    forward_s, backward_s, input_s, weight_s = map(_summed, PASSES[:4])
    gather_s, reduce_s = map(_summed, SHARDING)

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


def stacked(kinds: Iterable[str], of: Callable[[str], Mapping[str, Number]], fields: Iterable[str]) -> dict[str, np.ndarray]:
    """Return the fields of every kind of block side by side, each (..., K)."""
    rows = [of(kind) for kind in kinds]
    return {field: np.stack(np.broadcast_arrays(*(np.asarray(row[field], dtype=float) for row in rows)), axis=-1) for field in fields}


def parameters(block: Block) -> dict[str, Number]:
    """Return the parameters of a block under the names of `StageTimes.prices`."""
    return {"dense_parameters": block.dense_parameters, "expert_parameters": block.expert_parameters}


def optimizer_of(model: Model, plan: Plan | PlanColumns, job: Job, cluster: Cluster) -> Callable[[Number, Number], Number]:
    """Return a function from dense and expert parameters on ranks, (..., n), to the optimizer's seconds."""
    beside = plan.with_rank_axis()
    return lambda dense, expert: segments_s(((op,) for op in optimizer_ops(dense, expert, model, beside, job)), model, beside, cluster)


def stage_times(scenario: Scenario) -> StageTimes:
    """Return the parts of the step of one scenario."""
    model, plan, job, cluster = scenario.model, scenario.plan, scenario.job, scenario.cluster
    all_blocks = blocks(model, plan, job)
    priced = {name: price_passes(b, model, plan, cluster) | price_sharding(b, model, plan, cluster) for name, b in all_blocks.items()}
    kinds = tuple(all_blocks)
    return StageTimes(
        prices=stacked(kinds, lambda k: priced[k] | parameters(all_blocks[k]), (*PASSES, *SHARDING, *parameters(all_blocks[kinds[0]]))),
        runs={k: (p["forward_runs"], p["backward_runs"]) for k, p in priced.items()},
        kinds=kinds,
        stages=stage_blocks(model, plan, job),
        hop_s=hop_s(model, plan, job, cluster),
        norm_s=op_s(NORM_OP, model, plan, cluster),
        optimize=optimizer_of(model, plan, job, cluster),
    )


def hop_s(model: Model, plan: Plan | PlanColumns, job: Job, cluster: Cluster) -> Number:
    """Return the seconds of a message between neighbours of a pipeline; 0 where it has one rank."""
    return np.where(np.asarray(plan.pp) > 1, op_s(send_op(plan, model, job), model, plan, cluster), 0.0)
