"""Bytes of device memory per pipeline stage: weights, gradients, optimizer, activations, buffers.

References
----------
Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020 (what each stage shards).
Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022 (activations).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from simulator.scenario.job import Job
from simulator.scenario.model import Model
from simulator.scenario.plan import ELEMENT_BYTES, Plan, single
from simulator.schedules import repeating, schedule
from simulator.units import Number
from simulator.workload.ops import Block
from simulator.workload.stages import StageBlocks

#: moments kept per parameter by each optimizer; Muon keeps one momentum
MOMENTS = {"adam": 2, "muon": 1, "sgd": 0}
PARTS = ("weights", "gradients", "optimizer", "activations", "buffers", "reserved")


def state_bytes(dense: Number, expert: Number, plan: Plan, job: Job) -> dict[str, Number]:
    """Return bytes of weights, gradients and optimizer state for parameters of one rank.

    Parameters
    ----------
    dense, expert : Number
        Parameters on the rank before sharding: dense ones shard over ``dp_shard * cp`` ranks, expert ones over
        ``dp_shard * cp * tp / (etp * ep)``.

    Notes
    -----
    ZeRO-1 shards the optimizer state, over the copies of the model in a DualPipe pipeline, too; ZeRO-2 also shards the
    gradients, ZeRO-3 also the parameters.
    """
    p, sharded = plan.precision, dense / plan.shard + expert / plan.expert_shard
    whole = dense + expert
    master = ELEMENT_BYTES[p.master] if p.master else 0.0
    per_parameter = master + MOMENTS[job.optimizer] * ELEMENT_BYTES[p.moments]
    return {
        "weights": ELEMENT_BYTES[p.parameters] * (sharded if plan.zero >= 3 else whole),
        "gradients": ELEMENT_BYTES[p.gradients] * (sharded if plan.zero >= 2 else whole),
        "optimizer": per_parameter * (sharded / plan.copies if plan.zero >= 1 else whole),
    }


def _per_stage(stages: tuple[StageBlocks, ...], blocks: Mapping[str, Block], field: str) -> Number:
    """Return the sum of a block's field over every virtual stage, as a trailing axis."""
    values = [sum((getattr(blocks[name], field) for name in stage), 0.0) for stage in stages]
    return np.stack(np.broadcast_arrays(*values), axis=-1)


def _gathered(stages: tuple[StageBlocks, ...], blocks: Mapping[str, Block], plan: Plan) -> Number:
    """Whole weights (ZeRO-3) and whole gradients (ZeRO-2, ZeRO-3) of the two largest blocks in turn on each stage."""
    element = ELEMENT_BYTES[plan.precision.parameters] * (plan.zero >= 3) + ELEMENT_BYTES[plan.precision.gradients] * (plan.zero >= 2)
    values = []
    for stage in stages:
        sizes = [blocks[name].dense_parameters + blocks[name].expert_parameters for name in dict.fromkeys(stage)]
        values.append(2 * element * np.maximum.reduce(np.broadcast_arrays(*sizes)) if sizes else 0.0)
    return np.stack(np.broadcast_arrays(*values), axis=-1)


def memory_per_stage(
    model: Model, plan: Plan, job: Job, stages: tuple[StageBlocks, ...], blocks: Mapping[str, Block], micro_batches: int
) -> dict[str, Number]:
    """Return the peak bytes of each pipeline rank, part by part.

    Parameters
    ----------
    stages : tuple
        Blocks of each virtual stage (`stage_blocks`).
    blocks : mapping
        Blocks by name, with scalar or per-plan sizes.
    micro_batches : int
        Micro-batches per step, the same for every plan here.

    Returns
    -------
    dict of str to ndarray (..., pp)
        The `PARTS` and ``total``.

    Notes
    -----
    Activations: for each moment of the schedule, micro-batches held per chunk times the bytes that the chunk saves; the
    largest moment counts. What recompute brings back lives for one block at a time. ``total`` includes the reserve:
    (everything + communication) / (1 - fragmentation) + context.
    """
    order = schedule(plan.schedule, single(plan.pp), single(plan.vpp), micro_batches_kept(plan, micro_batches), plan.table)
    counts = order.in_flight
    if plan.schedule == "gpipe":  # holds every micro-batch; no need to write them all down
        counts = np.array([micro_batches, 0.0]).reshape(1, 1, 2, 1).repeat(single(plan.pp), axis=0)
    places = np.array(order.held).T  # (vpp, pp): the stage in each place

    def on_ranks(per_stage: Number) -> Number:
        return per_stage[..., places]

    dense, expert = (on_ranks(_per_stage(stages, blocks, f)).sum(axis=-2) for f in ("dense_parameters", "expert_parameters"))
    if model.tied_embeddings:  # a rank that holds the head without the embedding has its own copy of the shared matrix
        first, last = (np.any(places == stage, axis=0) for stage in (0, len(stages) - 1))
        dense = dense + (last & ~first) * np.asarray(model.vocab * model.hidden / plan.tp)[..., None]
    columns = _WithStageAxis(plan)
    parts = state_bytes(dense, expert, columns, job)
    kept = [on_ranks(_per_stage(stages, blocks, f)) for f in ("saved_bytes", "weight_bytes")]
    kept[1] = np.minimum(*np.broadcast_arrays(*kept))  # what recompute dropped is not there for the weight gradient either
    saved = np.stack(np.broadcast_arrays(*kept), axis=-3)  # (..., 2, vpp, pp)
    peaks = np.einsum("rtkc,...kcr->...rt", counts, saved)
    again = [sum((blocks[name].recompute_bytes * 0.0 for name in stage), 0.0) for stage in stages]
    for i, stage in enumerate(stages):
        for name in dict.fromkeys(stage):
            again[i] = np.maximum(again[i], blocks[name].recompute_bytes)
    extra = on_ranks(np.stack(np.broadcast_arrays(*again), axis=-1)).max(axis=-2)
    parts["activations"] = peaks.max(axis=-1) + extra
    parts["buffers"] = on_ranks(_gathered(stages, blocks, plan)).max(axis=-2) + plan.reserve.communication
    used = sum(parts.values())
    parts["reserved"] = used * (plan.reserve.fragmentation / (1 - plan.reserve.fragmentation)) + plan.reserve.context
    parts = {name: np.broadcast_to(value, np.shape(used)) for name, value in parts.items()}
    return parts | {"total": sum(parts.values())}


def micro_batches_kept(plan: Plan, micro_batches: int) -> int:
    """Return how many micro-batches of the schedule tell its memory: a few rounds where it repeats itself."""
    return micro_batches if plan.table else int(repeating(plan.schedule, single(plan.pp), micro_batches))


class _WithStageAxis:
    """A plan whose shard counts have a trailing axis for the stages."""

    def __init__(self, plan: Plan):
        self.precision, self.zero, self.copies = plan.precision, plan.zero, plan.copies
        self.shard, self.expert_shard = np.asarray(plan.shard)[..., None], np.asarray(plan.expert_shard)[..., None]
