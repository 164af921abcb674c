"""Bytes of device memory per pipeline stage: weights, gradients, optimizer, activations, buffers.

References
----------
Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", 2020 (what each stage shards).
Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022 (activations).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from simulator.scenario.job import Job
from simulator.scenario.model import Model
from simulator.scenario.plan import ELEMENT_BYTES, NARROW, Plan, single
from simulator.schedules import Schedule, repeating, schedule
from simulator.units import Number
from simulator.workload.blocks import Block
from simulator.workload.stages import StageBlocks

#: moments kept per parameter by each optimizer; Muon keeps one momentum
MOMENTS = {"adam": 2, "muon": 1, "sgd": 0}
#: what the framework's tensors take, then what the allocator loses between them, then what lies outside of it
PARTS = ("weights", "gradients", "optimizer", "activations", "buffers", "fragmentation", "communication", "context")
#: how a framework counts its memory -> the parts that it counts
METRICS = {"allocated": PARTS[:5], "reserved": PARTS[:6], "device": PARTS}
#: blocks that are no layers: their matrix products stay in 16 bits, but for the output projection where `Precision.head` is narrow
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


def low_precision_copies(plan: Plan, dtype: str) -> float:
    """Return bytes per parameter for what matrix products in `dtype` read instead of the weight itself.

    Notes
    -----
    Scaled along rows for one product and along columns for the other, two copies (`Precision.layouts`) stay from micro-batch to
    micro-batch (Transformer Engine's weight cache); weights that are kept in low precision are one of them. ZeRO-3 casts what
    it gathers anew.
    """
    p = plan.precision
    if plan.zero >= 3:
        return 0.0
    if p.parameters in NARROW:
        return (p.layouts - 1) * ELEMENT_BYTES[p.parameters]
    return p.layouts * ELEMENT_BYTES[dtype] if dtype in NARROW else 0.0


def _gathered(stages: tuple[StageBlocks, ...], blocks: Mapping[str, Block], plan: Plan) -> Number:
    """Whole weights (ZeRO-3) and whole gradients (ZeRO-2, ZeRO-3) of the largest blocks in turn on each stage.

    Weights of the block that runs and of those gathered ahead of it, gradients of two; of matrices where those go one by one.
    """
    weights = min(ELEMENT_BYTES[plan.precision.parameters], AUTOGRAD)  # cast before they are gathered
    ahead = np.array([min(plan.overlap.prefetch, max(len(stage) - 1, 1)) for stage in stages])
    element = (1 + ahead) * weights * (plan.zero >= 3) + 2 * ELEMENT_BYTES[plan.precision.gradients] * (plan.zero >= 2)
    return element * _largest(stages, blocks, _largest_matrix if plan.overlap.by_tensor else _parameters)


def _parameters(block: Block) -> Number:
    return block.dense_parameters + block.expert_parameters


def _largest_matrix(block: Block) -> Number:
    """Return the size of the largest weight matrix, of the whole block where it is one (the embedding)."""
    return np.maximum.reduce(np.broadcast_arrays(*(size for _, size in block.matrices))) if block.matrices else _parameters(block)


def _largest(stages: tuple[StageBlocks, ...], blocks: Mapping[str, Block], size: Callable[[Block], Number]) -> Number:
    """Return the size of the largest block of each stage, as a trailing axis."""
    return _of_stages(stages, lambda stage: np.maximum.reduce(np.broadcast_arrays(0.0, *(size(blocks[name]) for name in set(stage)))))


def _of_stages(stages: tuple[StageBlocks, ...], of: Callable[[StageBlocks], Number]) -> Number:
    """Return ``of(blocks)`` of every stage as a trailing axis, evaluated once for each distinct make-up."""
    known = {stage: of(stage) for stage in dict.fromkeys(stages)}
    return np.stack(np.broadcast_arrays(*(known[stage] for stage in stages)), axis=-1)


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


def _whole_rows(plan: Plan, job: Job, hidden: int) -> Number:
    """Return the buffers from which tensor-parallel collectives in pieces send and into which they receive.

    Notes
    -----
    Transformer Engine keeps one of the whole rows for every product that a collective runs beside
    (``initialize_ub``, transformer_engine/pytorch/module/base.py): six that gather, in the datatype of the product, and four
    that reduce-scatter.
    """
    rows = plan.micro_batch * job.sequence_length / plan.cp * hidden
    return np.where(np.asarray(plan.tp) > 1, rows * (6 * min(ELEMENT_BYTES[plan.precision.gemm], AUTOGRAD) + 4 * AUTOGRAD), 0.0)


def _buffers(
    stages: tuple[StageBlocks, ...],
    blocks: Mapping[str, Block],
    plan: Plan,
    job: Job,
    hidden: int,
    places: np.ndarray,
    layerwise: bool,
) -> Number:
    """Return what a rank holds beside states and saved activations: temporaries, gathered state, placeholders, scratch.

    In a pair that goes layer by layer, the forward has saved a block before the backward gives one back.
    """
    working = _of_stages(stages, lambda stage: _working(stage, blocks))
    found = working[..., places].max(axis=-2) + _gathered(stages, blocks, plan)[..., places].max(axis=-2)
    if layerwise:
        found = found + _largest(stages, blocks, lambda block: block.saved_bytes)[..., places].max(axis=-2)
    if plan.framework.weight_gradients == "placeholders" and plan.zero < 2:
        held = [_placeholders(tuple(stages[i] for i in places[:, rank]), blocks) for rank in range(places.shape[1])]
        found = found + np.stack(np.broadcast_arrays(*held), axis=-1)
    if plan.overlap.tp == "pieces":
        found = found + np.asarray(_whole_rows(plan, job, hidden))[..., None]
    return found + plan.reserve.workspace + plan.framework.bucket_elements * ELEMENT_BYTES[plan.precision.gradients]


def communicators(plan: Plan) -> Number:
    """Return how many groups of ranks communicate: one for each axis of more than one rank, and the world."""
    axes = (plan.tp, plan.cp, plan.pp, plan.dp, plan.ep, plan.etp)
    return 1.0 + sum(np.asarray(degree) > 1 for degree in axes)


def _gradients_of_update(dense: Number, expert: Number, plan: Plan) -> Number:
    """Return fp32 copies of the optimizer's part of 16-bit gradients where they find the activations' memory still taken, bytes.

    Notes
    -----
    Megatron's distributed optimizer makes them for its step, except with moments below fp32, which it updates from the gradients as
    they are (``_copy_model_grads_to_main_grads``, megatron/core/optimizer/distrib_optimizer.py). They fit where activations were, but
    a CUDA graph of the whole step keeps what it ever used in a pool of its own (NVIDIA/Megatron-LM pull request 4698).
    """
    p = plan.precision
    if "full" not in plan.kernels.graphs or ELEMENT_BYTES[p.gradients] > AUTOGRAD or p.master != "fp32" or p.moments != "fp32":
        return 0.0
    return ELEMENT_BYTES["fp32"] * (dense / plan.shard + expert / plan.expert_shard)


def dispatch_buffers(model: Model, plan: Plan, job: Job) -> Number:
    """Return what HybridEP keeps on every rank to receive the tokens of a group of experts, bytes, outside the allocator.

    Notes
    -----
    Room for all tokens of all ranks of the group, as if every one came here, with a probability in fp32 for each expert and a scale for
    128 elements; dispatch and combine share it (``allocate_combine_buffers``, deepseek-ai/DeepEP @2540b8a csrc/hybrid_ep/buffer/
    intranode.cu; ``use_shared_buffer`` of its deep_ep/hybrid_ep_buffer.py). One for all layers (``_hybrid_ep_buffer``, Megatron-Core
    transformer/moe/fused_a2a.py). DeepEP's own, of chunks instead of tokens, are as small as a communicator's.
    """
    if model.experts is None or plan.dispatcher != "hybridep":
        return 0.0
    tokens = plan.micro_batch * job.sequence_length / plan.cp / (plan.tp if plan.sequence_parallel else 1) * plan.ep
    size = AUTOGRAD * model.hidden + ELEMENT_BYTES["fp32"] * (model.experts.count + model.hidden / 128)
    return np.where(np.asarray(plan.ep) > 1, tokens * size, 0.0)


class _Held(NamedTuple):
    """What ranks hold: stages by rank and chunk, (ranks, vpp), and micro-batches, (ranks, moments, 2, vpp).

    `layerwise` says whether pairs go layer by layer.
    """

    stages: np.ndarray
    counts: np.ndarray
    layerwise: bool


def goes_layerwise(order: Schedule) -> bool:
    """Return whether the backward of a pair gives back what its forward takes, layer by layer, as in Megatron.

    The report of DualPipe counts both parts of a pair whole (DeepSeek-V3, table 2: pp + 1).
    """
    return order.pairs and order.name not in ("dualpipe", "dualpipev")


def _held(plan: Plan, micro_batches: int) -> _Held:
    """Return what every rank of a schedule holds."""
    order = schedule(plan.schedule, single(plan.pp), single(plan.vpp), micro_batches_kept(plan, micro_batches), plan.table)
    layerwise = goes_layerwise(order)
    counts = order.resident if layerwise else order.in_flight
    if plan.schedule == "gpipe":  # holds every micro-batch; no need to write them all down
        counts = np.array([micro_batches, 0.0]).reshape(1, 1, 2, 1).repeat(single(plan.pp), axis=0)
    return _Held(np.array(order.held), counts, layerwise)


@lru_cache(maxsize=8192)
def _decisive(plan: Plan, micro_batches: int, stages: tuple[StageBlocks, ...]) -> _Held:
    """Return what those ranks hold that may need the most memory; `plan` says schedule, pp and vpp.

    Notes
    -----
    Of ranks that hold the same blocks chunk by chunk, one counts for nothing when another holds at least as many
    micro-batches at some moment for each of its own.
    """
    held = _held(plan, micro_batches)
    counts = held.counts.reshape(len(held.stages), -1, 2 * held.stages.shape[1])
    kept: dict[tuple, list[int]] = {}
    for rank in np.argsort(-counts.sum(axis=-1).max(axis=-1), kind="stable").tolist():
        rivals = kept.setdefault(tuple(stages[stage] for stage in held.stages[rank]), [])
        if not any((counts[rank][:, None] <= counts[other]).all(axis=-1).any(axis=-1).all() for other in rivals):
            rivals.append(rank)
    ranks = sorted(rank for ranks in kept.values() for rank in ranks)
    return _Held(held.stages[ranks], held.counts[ranks], held.layerwise)


def kept_bytes(model: Model, plan: Plan, job: Job, stages: tuple[StageBlocks, ...], blocks: Mapping[str, Block]) -> tuple[Number, Number]:
    """Return what a micro-batch leaves on each stage, (..., stages): from the forward on, and for the weight gradient alone."""
    saved, rest = (_of_stages(stages, lambda s, f=f: sum((getattr(blocks[n], f) for n in s), 0.0)) for f in ("saved_bytes", "weight_bytes"))
    if plan.framework.keeps_outputs:
        sent = plan.micro_batch * job.sequence_length / plan.cp / (plan.tp if plan.sequence_parallel else 1) * model.hidden * AUTOGRAD
        saved = saved + np.asarray(sent)[..., None] * (np.arange(len(stages)) < len(stages) - 1)
    saved = saved * (1 - min(plan.framework.offloaded_layers / model.layers, 1))
    return saved, np.minimum(*np.broadcast_arrays(saved, rest))  # what recompute dropped is not there for the weight gradient either


def memory_per_stage(
    model: Model,
    plan: Plan,
    job: Job,
    stages: tuple[StageBlocks, ...],
    blocks: Mapping[str, Block],
    micro_batches: int,
    decisive: bool = False,
    activations: np.ndarray | None = None,
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
    decisive : bool
        Look only at ranks that may need the most, instead of all.
    activations : ndarray (ranks,), optional
        The peak of saved activations where it is known better, as of ranks whose experts are loaded unevenly.

    Returns
    -------
    dict of str to ndarray (..., ranks)
        The `PARTS` and ``total``.

    Notes
    -----
    Activations: for each moment of the schedule, micro-batches held per chunk times the bytes that the chunk saves; the
    largest moment counts. Buffers: what the backward of one block needs beside them, whole weights and gradients that
    ZeRO gathers, placeholders, workspace. The allocator loses `fragmentation` of what
    it reserves; communicators and context lie outside of it. ``total`` is what the device shows as used.
    """
    if decisive:
        bare = Plan.model_construct(schedule=plan.schedule, pp=single(plan.pp), vpp=single(plan.vpp), table=plan.table)
        order = _decisive(bare, micro_batches if plan.schedule == "gpipe" else micro_batches_kept(plan, micro_batches), stages)
    else:
        order = _held(plan, micro_batches)
    counts, places = order.counts, order.stages.T  # (vpp, ranks): the stage in each place
    kinds = tuple(blocks)
    numbers = np.array([[stage.count(kind) for stage in stages] for kind in kinds], dtype=float)[:, places]  # (kinds, vpp, ranks)

    def held(field: str, but: tuple[str, ...] = ()) -> Number:
        """Return the sum of a block's field over the stage in each place, without the blocks in `but`; (..., vpp, ranks)."""
        values = np.stack(np.broadcast_arrays(*(getattr(blocks[kind], field) for kind in kinds)), axis=-1)
        found = values @ (numbers * np.array([kind not in but for kind in kinds])[:, None, None]).reshape(len(kinds), -1)
        return found.reshape(*found.shape[:-1], *places.shape)

    dense, expert = (held(f).sum(axis=-2) for f in ("dense_parameters", "expert_parameters"))
    first, last = (np.any(places == stage, axis=0) for stage in (0, len(stages) - 1))
    projection = np.asarray(model.vocab * model.hidden / plan.tp)[..., None]
    if model.tied_embeddings:  # a rank that holds the head without the embedding has its own copy of the shared matrix
        dense = dense + (last & ~first) * projection
    columns = plan.with_rank_axis()
    parts = state_bytes(dense, expert, columns, job)
    layers = sum(held(f, _ENDS).sum(axis=-2) for f in ("dense_parameters", "expert_parameters"))
    parts["weights"] = parts["weights"] + low_precision_copies(plan, plan.precision.gemm) * layers
    if plan.precision.head in NARROW:
        parts["weights"] = parts["weights"] + low_precision_copies(plan, plan.precision.head) * last * projection
    kept = (of_stages[..., places] for of_stages in kept_bytes(model, plan, job, stages, blocks))
    saved = np.stack(np.broadcast_arrays(*kept), axis=-3)  # (..., 2, vpp, ranks)
    flat = np.moveaxis(saved.reshape(*saved.shape[:-3], -1, places.shape[1]), -1, 0)  # (ranks, ..., 2 vpp)
    by_rank = counts.reshape(*counts.shape[:2], -1).swapaxes(1, 2)  # (ranks, 2 vpp, moments)
    peaks = np.stack([of_rank @ moments for of_rank, moments in zip(flat, by_rank, strict=True)], axis=-2)  # (..., ranks, moments)
    parts["activations"] = peaks.max(axis=-1) if activations is None else activations
    parts["buffers"] = _buffers(stages, blocks, plan, job, model.hidden, places, order.layerwise)
    parts["buffers"] = parts["buffers"] + _gradients_of_update(dense, expert, columns)
    reserve = plan.reserve
    parts["fragmentation"] = sum(parts.values()) * (reserve.fragmentation / (1 - reserve.fragmentation))
    if plan.framework.weight_gradients == "copied":
        copied = ELEMENT_BYTES["fp32"] * (dense / columns.shard + expert / columns.expert_shard)
        parts["fragmentation"] = parts["fragmentation"] + copied
    parts["communication"] = np.asarray(communicators(plan) * reserve.communicator + dispatch_buffers(model, plan, job))[..., None]
    parts["context"] = np.float64(reserve.context)
    shape = np.shape(sum(parts.values()))
    parts = {name: np.broadcast_to(parts[name], shape) for name in PARTS}
    return parts | {"total": sum(parts.values())}


def micro_batches_kept(plan: Plan, micro_batches: int) -> int:
    """Return how many micro-batches of the schedule tell its memory: a few rounds where it repeats itself."""
    return micro_batches if plan.table else int(repeating(plan.schedule, single(plan.pp), micro_batches))
