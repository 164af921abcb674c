"""FLOP, bytes and parameters of every layer, on one rank, for one micro-batch.

Shapes: T tokens of a micro-batch on this rank (micro_batch * sequence / cp); Ts = T / tp, the tokens of the
sequence-parallel parts; h hidden, f MLP width, V vocabulary, a heads, d head width. Every size may be a numpy array with
one entry per plan.

References
----------
Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022 (activations, sequence parallel).
DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024 (MLA, fine-grained experts, FP8 linear layers).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from simulator.scenario.job import Job
from simulator.scenario.model import LayerKind, Model
from simulator.scenario.plan import ELEMENT_BYTES, NARROW, Dtype, Plan
from simulator.units import Number
from simulator.workload.attention import attention, latent_attention
from simulator.workload.blocks import Block, BlockBuilder
from simulator.workload.experts import rows_sorted
from simulator.workload.ops import BF16, FP32, Op
from simulator.workload.parts import MASK, Shape, bias_gradients, builder, column_parallel, enter_tp, leave_tp, norm, residual, row_parallel

#: bytes per logit that wait for the backward, and at the fullest moment of the loss, for each kind of cross-entropy. In
#: place: the bf16 logits. Compiled: the same, and their gradient. Fused: their fp32 copy, which becomes the softmax; in steps, the
#: copy less its maximum is another. Eager: the fp32 log-softmax, and two gradients beside it; when the logits are gathered, they
#: stay as the output of the last stage, and their bf16 gradient is sliced. Parallel, PyTorch's eager loss over a vocabulary that is
#: divided: the log-softmax, the picked ones' gradient, the softmax or its sum with that, and the result
#: (torch/distributed/tensor/parallel/loss.py, ``_nll_loss_and_log_softmax_backward``)
LOGIT_BYTES = {
    "in_place": (BF16, BF16),
    "compiled": (BF16, 2 * BF16),
    "fused": (FP32, BF16 + FP32),
    "vocab_parallel": (FP32, BF16 + 2 * FP32),
    "eager": (FP32, 3 * FP32),
    "half": (BF16, 3 * BF16),
    "gathered": (BF16 + FP32, 3 * FP32 + 2 * BF16),
    "parallel": (FP32, 4 * FP32),
}
#: bytes per logit that each kind moves, forward and backward. In place: read for maximum and sum, read again and overwritten by
#: the gradient; that times the loss's gradient (transformer_engine/common/triton/cross_entropy.py). Compiled: read once for maximum
#: and sum together (inductor's ``online_softmax``); read again, the gradient written. Fused: the fp32 copy and its
#: maximum, exponentials in place, their sum, the softmax in place; that times the loss's gradient, and its cast to bf16
#: (megatron/core/fusions/fused_cross_entropy.py). In steps, the maximum and the difference are passes of their own
#: (megatron/core/tensor_parallel/cross_entropy.py). Eager: the fp32 copy, the log-softmax (maximum, sum, result); the gradient of
#: the picked ones (written), that of the log-softmax (read twice for the sum and the result, written), the cast. Half: these in
#: 16 bits, without copy and cast. Parallel: the copy, maximum, difference, exponentials, their sum, the result; the picked ones'
#: gradient, softmax, sum and product of those, the cast
LOSS_BYTES = {
    "in_place": (3 * BF16, 2 * BF16),
    "compiled": (BF16, 2 * BF16),
    "fused": (BF16 + 6 * FP32, 3 * FP32 + BF16),
    "vocab_parallel": (BF16 + 9 * FP32, 3 * FP32 + BF16),
    "eager": (BF16 + 5 * FP32, 7 * FP32 + BF16),
    "half": (4 * BF16, 6 * BF16),
    "gathered": (BF16 + 5 * FP32, 7 * FP32 + BF16),
    "parallel": (BF16 + 9 * FP32, 9 * FP32 + BF16),
}
#: bytes per logit of a loss for the log: the eager one forward, whose log-softmax reads a row for the second and third time from the cache
METRIC_BYTES = LOSS_BYTES["eager"][0] - 2 * FP32
#: kernels of each kind of loss, forward and backward, from the same files
LOSS_LAUNCHES = {
    "in_place": (2, 1),
    "compiled": (1, 1),
    "fused": (14, 4),
    "vocab_parallel": (16, 5),
    "eager": (3, 4),
    "half": (2, 3),
    "gathered": (3, 4),
    "parallel": (9, 6),
}
#: kernels that find, replace and set to zero what the vocabulary of another rank holds (megatron/core/tensor_parallel/layers.py,
#: ``VocabParallelEmbedding``); that look up learned positions, add them and drop out
MASKED_LAUNCHES, POSITION_LAUNCHES = 7, 3
#: kernels of scores, top-k, load counts, probabilities and the balancing loss, and of their gradients. Fused: top-k with its scores,
#: scores of the loss, the loss; around them the random logits of forced balance, counts of tokens per expert, and the loss put aside
#: (megatron/core/transformer/moe/router.py, transformer_engine/pytorch/router.py). Those three are bare functions without quantizers or
#: workspaces, and cost the host what an operation of PyTorch does
ROUTER_LAUNCHES = {"eager": (20, 15), "fused": (9, 5)}
#: kernels of moving rows to their experts' order, for which a map of rows is made first; of moving whole chunks of rows
PERMUTE_LAUNCHES, SORT_LAUNCHES = (8, 8), (3, 2)
#: bytes per element that adding the last bias of experts moves, forward and backward, in separate operations of PyTorch: the bias
#: times the probability (write), the sum (read twice, write), one tensor of all experts (read, write); backward the tensor
#: again, and the gradient times the probability and times the bias (read, write each), summed up (read each). Megatron-Core,
#: megatron/core/transformer/moe/experts.py, ``TEGroupedMLP._apply_bias``
EXPERT_BIAS_BYTES = (12.0, 16.0)
#: kernels of that for every expert
EXPERT_BIAS_LAUNCHES = (3, 6)
#: bytes per element that experts' gated activation moves backward beyond that of a dense MLP: the probabilities that it multiplies in have
#: a gradient, a sum over the row in a kernel of its own (read up-projection, gate and gradient), and the other kernel reads the gate and
#: the gradient for both of its halves (Megatron-Core, megatron/core/fusions/fused_bias_swiglu.py, ``weighted_swiglu_back``). Measured
#: with PyTorch 2.11 on one H100: 10.5 times what moving one of the tensors takes where copies need 1.1 times, so 9.5 instead of 5
PROBABILITY_BYTES = 4.5 * BF16
#: elements, per one of up-projection and gate, that kernels of clamping address one by one, because halves of rows lie apart, forward and
#: backward: each half clamped; the gate compared and the up-projection twice, and a gradient selected for each. Bytes that the others
#: move: both halves joined (read, write); two comparisons joined (read a byte each, write one), both gradients joined. Megatron-Core,
#: megatron/core/fusions/fused_bias_geglu.py, ``weighted_bias_quick_geglu_impl``; PyTorch's ``clamp_backward``
CLAMP_ADDRESSED, CLAMP_BYTES, CLAMP_LAUNCHES = (1.0, 2.5), (4.0, 5.5), (3, 7)
#: memory of experts in a CUDA graph of the whole step, whose sizes cannot follow the tokens that come, over what even loads need: the
#: pages that hold what their gradients read, and the buffers that they run in (``moe_paged_stash_buffer_size_factor_cuda``,
#: ``moe_expert_rank_capacity_factor`` of NVIDIA-NeMo/Megatron-Bridge's recipes with such graphs, ``_enable_full_iteration_cuda_graph``
#: and ``set_full_iter_cg_configs``; what they multiply: NVIDIA/Megatron-LM pull requests 2690 and 4247). Only tensors that the fused
#: products of low precision mark are paged (``on_save_for_backward``, NVIDIA/Megatron-LM @02f11f6 megatron/core/transformer/moe/
#: paged_stash.py; NVIDIA/TransformerEngine @010de66 marks none in pytorch/ops/basic/grouped_linear.py): in 16 bits the buffers stay
STASHED, CAPACITY = 1.2, 1.5


def _activation(
    b: BlockBuilder, name: str, mats: int, size: Number, kept: Number, saved: Number, modules: tuple[str, ...], routed: bool = False
) -> None:
    """Activate the up-projection, gated or not; eagerly the gate's activation is a kernel of its own, whose output is kept."""
    if mats == 2 and b.kernels.pointwise == "eager":
        b.add([], [], size * (b.load if routed else 1.0), modules)
    eager = (2, 4) if b.kernels.pointwise == "eager" else (0, 0)
    there, back = mats + 1 + eager[0], 2 * mats + 1 + eager[1]
    launches = (2, 3) if b.kernels.pointwise == "eager" else (1, 1)
    if routed and mats == 2 and b.kernels.experts == "grouped" and b.kernels.glue:
        back, launches = back + PROBABILITY_BYTES / BF16, (launches[0], launches[1] + 1)
    b.memory(f"{name}.activation", there * size + kept, back * size - kept, saved, modules, routed, launches)


def _mlp(b: BlockBuilder, model: Model, x: Shape, name: str, ffn: int, modules: tuple[str, ...], kept: Dtype) -> None:
    """Dense MLP, column- then row-parallel: up (and gate), activation, down; the up-projection is `kept` for the backward."""
    h, local, mats = model.hidden, ffn / x.tp, 2 if model.gated else 1
    saved, cast = _kept(x.tokens * mats * local, kept)
    if mats == 2 and b.kernels.gate == "separate":
        own, gate = (name, name) if x.keeps_rows else (f"{name}.up", f"{name}.gate")
        if b.kernels.accumulation == "separate" or b.kernels.pointwise == "eager":
            # the engine sums the gradients of what both read; a compiler does so where they are read next
            b.memory(f"{name}.input", 0.0, 3 * x.tokens * h * BF16, launches=(0, 1))
        column_parallel(b, gate, f"{name}.gate", x, h, local, (*modules, "mlp_gate"), saved / 2)
        column_parallel(b, own, f"{name}.up", x, h, local, modules, saved / 2, gathers=not x.keeps_rows)
    else:
        column_parallel(b, name, f"{name}.up", x, h, mats * local, modules, saved)
    bias_gradients(b, f"{name}.up", x.tokens * mats * local * model.mlp_bias)
    size = x.tokens * local * BF16
    _activation(b, name, mats, size, cast, x.tokens * local * b.kept, (*modules, f"{name}_act"))
    b.works(mats * size + x.tokens * h * BF16)  # gradients of the up-projection's output and of the layer's
    row_parallel(b, name, f"{name}.down", x, local, h, modules)
    bias_gradients(b, f"{name}.down", x.split_tokens * h * model.mlp_bias)
    if "mlp_gate" in b.recomputed and b.kernels.pointwise == "eager":
        b.add([], [], x.tokens * h * BF16)  # told to keep this product, eager checkpointing does, although no gradient reads it
    bias = (mats * local + h) if model.mlp_bias else 0
    b.dense_parameters = b.dense_parameters + (mats + 1) * h * local + bias


def _kept(elements: Number, dtype: Dtype) -> tuple[Number, Number]:
    """Return the bytes of a tensor saved in `dtype`, and those that its cast writes: none when it stays what it is."""
    saved = elements * ELEMENT_BYTES[dtype]
    return saved, (saved if dtype in NARROW else 0.0)


def _experts(b: BlockBuilder, model: Model, x: Shape, plan: Plan) -> None:
    """Router, dispatch, grouped experts, combine; shared experts beside them as a dense MLP.

    Notes
    -----
    Balanced, a rank receives as many copies as it sends: R = Ts top_k. With expert-tensor parallelism the copies are
    gathered over etp and every rank computes a slice of width f / etp. Fused, the activation and its gradient, and the
    casts of their results, are epilogues of the products: no traffic of their own.
    """
    e, h, precision = model.experts, model.hidden, plan.precision
    assert e is not None
    mats = 2 if model.gated else 1
    received = x.split_tokens * e.top_k
    rows, local, ffn = received * x.etp, e.count / x.ep, e.ffn / x.etp
    moe = ("moe",)
    scores = x.split_tokens * e.count * FP32
    # backward, the gradients of what the router, the experts and shared experts read are summed up
    if b.kernels.glue:
        b.memory("moe.input", 0.0, 3 * x.split_tokens * h * BF16 * (2 if e.shared_ffn else 1), launches=(0, 2 if e.shared_ffn else 1))
    b.linear("router", x.split_tokens, h, e.count, saved=scores, dtype="bf16", modules=moe)
    b.memory("router.topk", 4 * scores, 4 * scores, modules=moe, launches=ROUTER_LAUNCHES[b.kernels.router], plain=True)
    copies = received * h
    # cast before dispatch, as DeepSeek-V3 does: an eighth of the rows, and the copies come as the experts take them
    cast = precision.dispatch == b.dtype and b.dtype in NARROW
    sent, arrived = (x.split_tokens * h * rows for rows in rows_sorted(e, plan.fans_out, x.ep))
    element = ELEMENT_BYTES[precision.dispatch if cast else "bf16"]
    sort = tuple(n * (arrived > 0) for n in (PERMUTE_LAUNCHES if plan.fans_out else SORT_LAUNCHES))
    if cast:
        b.memory("moe.dispatch.cast", x.split_tokens * h * (BF16 + b.element), 0.0, modules=moe)
    b.memory("moe.permute", sent * element, sent * BF16, modules=moe, launches=PERMUTE_LAUNCHES)
    out, back = (x.split_tokens * h * ELEMENT_BYTES[p] for p in (precision.dispatch, precision.combine))
    b.exchange("moe.dispatch", out, back, moe, holds=plan.dispatcher == "hybridep")
    b.memory("moe.arrived.permute", arrived * element, arrived * BF16, modules=moe, routed=True, launches=sort)
    gather, scatter = (
        Op("moe.etp", kind, bytes=copies * x.etp * BF16, axis="etp", routed=True) for kind in ("all_gather", "reduce_scatter")
    )
    b.collective(gather, scatter, moe)
    per_expert, (saved, kept) = rows / local, _kept(rows * mats * ffn, precision.activations)
    # what stays in memory is of the tokens that really come, or in a graph of everything has room for more than come evenly
    whole = "full" in b.kernels.graphs
    pages = STASHED if b.dtype in NARROW else CAPACITY
    held = np.maximum(b.load, pages) if whole else b.load
    taken, room = rows * held, rows * (np.maximum(b.load, CAPACITY) if whole else b.load)
    fused = b.kernels.experts == "fused"
    b.linear(
        "moe.up",
        per_expert,
        h,
        mats * ffn,
        saved=(copies * x.etp * b.kept + saved) * held,
        modules=moe,
        groups=local,
        routed=True,
        arrives=(1 * cast, 2 * fused),
    )
    if fused:
        b.add([], [], taken * ffn * b.kept, ("moe", "moe_act"))
    else:
        if model.clamped:
            size = rows * mats * ffn
            moved, addressed = (tuple(size * each for each in of) for of in (CLAMP_BYTES, CLAMP_ADDRESSED))
            own = {"modules": ("moe", "moe_act"), "routed": True, "launches": CLAMP_LAUNCHES, "plain": True}
            b.memory("moe.clamp", *moved, saved=size * held * BF16, addressed=addressed, **own)
        _activation(b, "moe", mats, rows * ffn * BF16, kept, taken * ffn * b.kept, ("moe", "moe_act"), routed=True)
    b.works(room * np.maximum(mats * ffn, 2 * h) * BF16 + x.split_tokens * h * BF16)  # of the up-projection, or of the copies
    b.linear("moe.down", per_expert, ffn, h, modules=moe, groups=local, routed=True, arrives=(2 * fused, 1 * cast))
    if model.mlp_bias and not fused and "full" not in b.kernels.graphs:  # a graph of everything cannot split by the experts' loads
        launches = tuple(1 + each * local for each in EXPERT_BIAS_LAUNCHES)
        b.memory("moe.bias", *(rows * h * each for each in EXPERT_BIAS_BYTES), modules=moe, routed=True, launches=launches, plain=True)
    b.collective(scatter, gather, moe)
    b.memory("moe.arrived.unpermute", arrived * BF16, arrived * element, modules=moe, routed=True, launches=sort)
    b.exchange("moe.combine", back, out, moe)  # its gradient is dispatched
    b.memory("moe.unpermute", sent * BF16, sent * element, modules=moe, launches=PERMUTE_LAUNCHES)
    if cast:
        b.memory("moe.combine.cast", 0.0, x.split_tokens * h * (BF16 + b.element), modules=moe)
    expert = (mats + 1) * h * ffn + ((mats * ffn + h) if model.mlp_bias else 0)
    b.expert_parameters = b.expert_parameters + local * expert
    b.dense_parameters = b.dense_parameters + e.count * h + (e.count if model.mlp_bias else 0)
    if e.shared_ffn:
        _mlp(b, model, x, "shared", e.shared_ffn, moe, precision.activations)
        b.dense_parameters = b.dense_parameters + (h if e.shared_gate else 0)


def transformer_layer(model: Model, kind: LayerKind, plan: Plan, job: Job, load: Number = 1.0) -> Block:
    """Return the block of one transformer layer of `kind`; its experts keep `load` times the mean of the tokens."""
    x, b, h = Shape.of(plan, job), builder(plan, load), model.hidden
    layer_input = x.split_tokens * h * BF16
    b.add([], [], layer_input)
    (latent_attention if model.latent else attention)(b, model, kind, x)
    residual(b, x, model, "attn.residual")
    b.add([], [], layer_input, ("attn_out",))  # of the second norm
    norm(b, "moe.norm" if kind.moe else "mlp.norm", x.split_tokens, h, model, x.split_tokens * h * b.kept)
    if kind.moe:
        _experts(b, model, x, plan)
    else:
        _mlp(b, model, x, "mlp", model.ffn, ("mlp",), plan.precision.activations)
    residual(b, x, model)
    return b.build(layer_input)


def embedding(model: Model, plan: Plan, job: Job) -> Block:
    """Return the block of the input embedding, vocabulary split over tp."""
    x, b = Shape.of(plan, job), BlockBuilder("bf16", BF16, kernels=plan.kernels)
    size = x.tokens * model.hidden * BF16
    masked = MASKED_LAUNCHES * (np.asarray(plan.tp) > 1)
    learned = POSITION_LAUNCHES * (model.positions > 0)
    b.memory("embedding", 2 * size, 2 * size, launches=(1 + learned + masked, 1 + learned))
    leave_tp(b, "embedding", x, model.hidden)
    b.dense_parameters = model.vocab * model.hidden / x.tp + model.positions * model.hidden
    b.works(b.dense_parameters * BF16)  # its gradient is written out before it is added
    dropped = x.split_tokens * model.hidden * MASK if b.kernels.dropout else 0.0
    b.add([], [], dropped)
    return b.build(dropped)


def head(model: Model, plan: Plan, job: Job) -> Block:
    """Return the block of the final norm, the output projection and the cross-entropy.

    Notes
    -----
    How many bytes per logit the loss reads and writes is `LOSS_BYTES`, of the logits of all tp ranks where it gathers them. How
    many are kept, and live at its fullest moment, is `LOGIT_BYTES`; then the projection's backward holds their bf16
    gradient, the rows it gathers again, their gradient and, unless it is added in place, the gradient of its matrix.
    """
    x, precision = Shape.of(plan, job), plan.precision
    b = BlockBuilder(
        precision.head,
        ELEMENT_BYTES[precision.head],
        overlap=plan.overlap.beside_gradients,
        kernels=plan.kernels,
        cast_weights=precision.casts_weights,
        layouts=precision.layouts,
        block=precision.block,
    )
    vocab = model.vocab / x.tp
    norm(b, "head.norm", x.split_tokens, model.hidden, model, 2 * x.split_tokens * model.hidden * BF16)
    beside = enter_tp(b, "head", x, model.hidden)
    logits, gathered = x.tokens * vocab, plan.framework.cross_entropy == "gathered"
    seen = logits * (x.tp if gathered else 1.0)  # by the loss of this rank
    kept, most = _of_loss(LOGIT_BYTES, plan, x, seen)
    b.linear("head.logits", x.tokens, model.hidden, vocab, saved=kept, beside=beside)
    written = 0.0 if plan.framework.weight_gradients == "fused" else model.hidden * vocab * BF16
    b.works(most - kept)
    b.works(logits * BF16 - kept + 2 * x.tokens * model.hidden * BF16 + written)
    b.matrices.clear()  # never a placeholder: its gradient is written out, used and dropped
    if gathered:
        # into a list of one tensor per rank, which are joined; backward, a rank copies its own part out of the gradient
        b.add([(Op("head.gather", "all_gather", bytes=x.several * seen * BF16, axis="tp", launches=x.several, listed=True),)], [])
        b.memory("head.join", *(2 * BF16 * x.several * size for size in (seen, logits)), launches=(x.several, x.several))
    b.memory("head.loss", *_of_loss(LOSS_BYTES, plan, x, seen), launches=_of_loss(LOSS_LAUNCHES, plan, x, 1.0))
    if plan.framework.metrics:
        logged = plan.framework.metrics * seen * METRIC_BYTES
        b.memory("head.metrics", logged, 0.0, launches=(plan.framework.metrics * LOSS_LAUNCHES["eager"][0], 0.0))
    if not model.tied_embeddings:
        b.dense_parameters = b.dense_parameters + model.vocab * model.hidden / x.tp
    return b.build(x.split_tokens * model.hidden * BF16)


def _of_loss(table: Mapping[str, tuple[float, float]], plan: Plan, x: Shape, logits: Number) -> tuple[Number, Number]:
    """Return the two entries of `table` for the loss that the framework runs, times the `logits` that it sees.

    PyTorch's tensor parallelism leaves the logits divided over the vocabulary, so that its eager loss is the parallel one.
    """
    kind = plan.framework.cross_entropy
    several = np.asarray(x.tp) > 1 if kind == "eager" and x.of_torch else False
    there, back = (np.where(several, parallel, plain) * logits for parallel, plain in zip(table["parallel"], table[kind], strict=True))
    return there, back


def mtp_layer(model: Model, plan: Plan, job: Job, load: Number = 1.0) -> Block:
    """Return the block of one multi-token-prediction layer: two norms, a 2h -> h projection, a layer and its loss.

    Embedding and output projection are shared with the main model; the projection and loss are computed again.
    """
    x, b, h = Shape.of(plan, job), builder(plan), model.hidden
    for name in ("mtp.norm_hidden", "mtp.norm_embedding"):
        norm(b, name, x.split_tokens, h, model, x.split_tokens * h * BF16, ())
    b.linear("mtp.project", x.split_tokens, 2 * h, h, saved=x.split_tokens * 2 * h * b.kept)
    own = b.build(x.split_tokens * 2 * h * BF16)
    layer, loss = transformer_layer(model, model.layer_kinds[-1], plan, job, load), head(model, plan, job)
    shared = model.vocab * h / x.tp if not model.tied_embeddings else 0
    return Block(
        own.forward + layer.forward + loss.forward,
        loss.backward + layer.backward + own.backward,
        own.dense_parameters + 2 * h * h + layer.dense_parameters + loss.dense_parameters - shared,
        layer.expert_parameters,
        own.saved_bytes + layer.saved_bytes + loss.saved_bytes,
        own.recompute_bytes + layer.recompute_bytes + loss.recompute_bytes,
        own.weight_bytes + layer.weight_bytes + loss.weight_bytes,
        np.maximum(loss.working_bytes, layer.working_bytes - loss.saved_bytes),
        layer.matrices + own.matrices,
    )
