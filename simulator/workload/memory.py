"""Bytes of device memory per pipeline stage: weights, gradients, optimizer, activations, buffers.

References
----------
Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020 (what each stage shards).
Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022 (activations).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

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
#: what the framework's tensors take, then what the allocator loses between them, then what lies outside of it
PARTS = ("weights", "gradients", "optimizer", "activations", "buffers", "fragmentation", "communication", "context")
#: how a framework counts its memory -> the parts that it counts
METRICS = {"allocated": PARTS[:5], "reserved": PARTS[:6], "device": PARTS}
#: blocks whose matrix products stay in 16 bits
_ENDS = ("embedding", "head")
#: bytes of the 16-bit gradients that autograd itself hands over
AUTOGRAD = 2.0


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
    gradients, ZeRO-3 also the parameters. Gradients that are kept in 16 bits beside the main ones are never sharded.
    """
    p, sharded = plan.precision, dense / plan.shard + expert / plan.expert_shard
    whole = dense + expert
    master = ELEMENT_BYTES[p.master] if p.master else 0.0
    per_parameter = master + MOMENTS[job.optimizer] * ELEMENT_BYTES[p.moments]
    beside = AUTOGRAD * whole if plan.framework.weight_gradients == "kept" else 0.0
    return {
        "weights": ELEMENT_BYTES[p.parameters] * (sharded if plan.zero >= 3 else whole),
        "gradients": ELEMENT_BYTES[p.gradients] * (sharded if plan.zero >= 2 else whole) + beside,
        "optimizer": per_parameter * (sharded / plan.copies if plan.zero >= 1 else whole),
    }


def _per_stage(stages: tuple[StageBlocks, ...], blocks: Mapping[str, Block], field: str, but: tuple[str, ...] = ()) -> Number:
    """Return the sum of a block's field over every virtual stage, as a trailing axis, without the blocks named in `but`."""
    values = [sum((getattr(blocks[name], field) for name in stage if name not in but), 0.0) for stage in stages]
    return np.stack(np.broadcast_arrays(*values), axis=-1)


def low_precision_copies(plan: Plan) -> float:
    """Return bytes per parameter of the layers for what matrix products in low precision read instead of the weight itself.

    Notes
    -----
    Scaled along rows for one product and along columns for the other, two copies stay from micro-batch to micro-batch
    (Transformer Engine's weight cache); weights that are kept in low precision are one of the two. ZeRO-3 casts what it
    gathers anew.
    """
    p, low = plan.precision, ("fp8", "fp4")
    if plan.zero >= 3:
        return 0.0
    if p.parameters in low:
        return ELEMENT_BYTES[p.parameters]
    return 2 * ELEMENT_BYTES[p.gemm] if p.gemm in low else 0.0


def _gathered(stages: tuple[StageBlocks, ...], blocks: Mapping[str, Block], plan: Plan) -> Number:
    """Whole weights (ZeRO-3) and whole gradients (ZeRO-2, ZeRO-3) of the two largest blocks in turn on each stage."""
    weights = min(ELEMENT_BYTES[plan.precision.parameters], AUTOGRAD)  # cast before they are gathered
    element = weights * (plan.zero >= 3) + ELEMENT_BYTES[plan.precision.gradients] * (plan.zero >= 2)
    return 2 * element * _largest(stages, blocks, lambda block: block.dense_parameters + block.expert_parameters)


def _largest(stages: tuple[StageBlocks, ...], blocks: Mapping[str, Block], size: Callable[[Block], Number]) -> Number:
    """Return the size of the largest block of each stage, as a trailing axis."""
    sizes = [[size(blocks[name]) for name in dict.fromkeys(stage)] or [0.0] for stage in stages]
    return np.stack(np.broadcast_arrays(*(np.maximum.reduce(np.broadcast_arrays(*one)) for one in sizes)), axis=-1)


def _placeholders(held: tuple[StageBlocks, ...], blocks: Mapping[str, Block]) -> Number:
    """Return bytes of one 16-bit tensor for each shape of weight matrix on a rank.

    Notes
    -----
    Transformer Engine adds a weight's gradient to Megatron's main gradients itself, and hands autograd a tensor of the
    weight's shape instead, kept for the next weight of that shape (``get_dummy_wgrad``). Matrices of equal name are taken
    to be of equal shape.
    """
    shapes: dict[str, Number] = {}
    for name in dict.fromkeys(name for stage in held for name in stage):
        shapes |= dict(blocks[name].matrices)
    return AUTOGRAD * sum(shapes.values(), 0.0)


def _working(stage: StageBlocks, blocks: Mapping[str, Block]) -> Number:
    """Return what the backward of a stage needs beside the saved activations, at its fullest moment.

    Notes
    -----
    A block brings back what recompute dropped and makes its own temporaries, when the blocks behind it have given back
    what they saved. Of equal blocks the last one decides.
    """
    most, given_back, seen = np.float64(0.0), 0.0, set()
    for name in reversed(stage):
        block = blocks[name]
        if name not in seen:
            most = np.maximum(most, block.recompute_bytes + block.working_bytes - given_back)
            seen.add(name)
        given_back = given_back + block.saved_bytes
    return most


def _buffers(stages: tuple[StageBlocks, ...], blocks: Mapping[str, Block], plan: Plan, places: np.ndarray, layerwise: bool) -> Number:
    """Return what a rank holds beside states and saved activations: temporaries, gathered state, placeholders, scratch.

    In a pair that goes layer by layer, the forward has saved a block before the backward gives one back.
    """
    working = np.stack(np.broadcast_arrays(*(_working(stage, blocks) for stage in stages)), axis=-1)
    found = working[..., places].max(axis=-2) + _gathered(stages, blocks, plan)[..., places].max(axis=-2)
    if layerwise:
        found = found + _largest(stages, blocks, lambda block: block.saved_bytes)[..., places].max(axis=-2)
    if plan.framework.weight_gradients == "placeholders" and plan.zero < 2:
        held = [_placeholders(tuple(stages[i] for i in places[:, rank]), blocks) for rank in range(places.shape[1])]
        found = found + np.stack(np.broadcast_arrays(*held), axis=-1)
    return found + plan.reserve.workspace + plan.framework.bucket_elements * ELEMENT_BYTES[plan.precision.gradients]


def communicators(plan: Plan) -> Number:
    """Return how many groups of ranks communicate: one for each axis of more than one rank, and the world."""
    axes = (plan.tp, plan.cp, plan.pp, plan.dp, plan.ep, plan.etp)
    return 1.0 + sum(np.asarray(degree) > 1 for degree in axes)


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
    largest moment counts. Buffers: what the backward of one block needs beside them, whole weights and gradients that
    ZeRO gathers, placeholders, workspace. The allocator loses `fragmentation` of what
    it reserves; communicators and context lie outside of it. ``total`` is what the device shows as used.
    """
    order = schedule(plan.schedule, single(plan.pp), single(plan.vpp), micro_batches_kept(plan, micro_batches), plan.table)
    # the report of DualPipe counts both parts of a pair whole (DeepSeek-V3, table 2: pp + 1); Megatron goes layer by layer
    layerwise = order.pairs and plan.schedule not in ("dualpipe", "dualpipev")
    counts = order.resident if layerwise else order.in_flight
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
    layers = sum(on_ranks(_per_stage(stages, blocks, f, _ENDS)).sum(axis=-2) for f in ("dense_parameters", "expert_parameters"))
    parts["weights"] = parts["weights"] + low_precision_copies(plan) * layers
    kept = [on_ranks(_per_stage(stages, blocks, f)) for f in ("saved_bytes", "weight_bytes")]
    if plan.framework.keeps_outputs:
        sent = plan.micro_batch * job.sequence_length / plan.cp / (plan.tp if plan.sequence_parallel else 1) * model.hidden * AUTOGRAD
        kept[0] = kept[0] + np.asarray(sent)[..., None, None] * (places < len(stages) - 1)
    kept[0] = kept[0] * (1 - min(plan.framework.offloaded_layers / model.layers, 1))
    kept[1] = np.minimum(*np.broadcast_arrays(*kept))  # what recompute dropped is not there for the weight gradient either
    saved = np.stack(np.broadcast_arrays(*kept), axis=-3)  # (..., 2, vpp, pp)
    peaks = np.einsum("rtkc,...kcr->...rt", counts, saved)
    parts["activations"] = peaks.max(axis=-1)
    parts["buffers"] = _buffers(stages, blocks, plan, places, layerwise)
    reserve = plan.reserve
    parts["fragmentation"] = sum(parts.values()) * (reserve.fragmentation / (1 - reserve.fragmentation))
    if plan.framework.weight_gradients == "copied":
        copied = ELEMENT_BYTES["fp32"] * (dense / columns.shard + expert / columns.expert_shard)
        parts["fragmentation"] = parts["fragmentation"] + copied
    parts["communication"] = np.asarray(communicators(plan) * reserve.communicator)[..., None]
    parts["context"] = np.float64(reserve.context)
    shape = np.shape(sum(parts.values()))
    parts = {name: np.broadcast_to(parts[name], shape) for name in PARTS}
    return parts | {"total": sum(parts.values())}


def micro_batches_kept(plan: Plan, micro_batches: int) -> int:
    """Return how many micro-batches of the schedule tell its memory: a few rounds where it repeats itself."""
    return micro_batches if plan.table else int(repeating(plan.schedule, single(plan.pp), micro_batches))


class _WithStageAxis:
    """A plan whose shard counts have a trailing axis for the stages."""

    def __init__(self, plan: Plan):
        self.precision, self.zero, self.copies, self.framework = plan.precision, plan.zero, plan.copies, plan.framework
        self.shard, self.expert_shard = np.asarray(plan.shard)[..., None], np.asarray(plan.expert_shard)[..., None]
