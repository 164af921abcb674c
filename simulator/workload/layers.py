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

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from simulator.scenario.job import Job
from simulator.scenario.model import LayerKind, Model
from simulator.scenario.plan import ELEMENT_BYTES, Dtype, Plan, Precision
from simulator.units import Number
from simulator.workload.experts import rows_sorted
from simulator.workload.ops import BF16, FP32, Block, BlockBuilder, Op, Segment, gemm

#: bytes of the softmax that unfused attention saves per score: in 16 bits, or in fp32 and cast
SCORE_SAVED: dict[str, float] = {"unfused": BF16, "eager": FP32 + BF16}
#: bytes of one element of a dropout mask
MASK = 1.0
#: bytes per logit that wait for the backward, and at the fullest moment of the loss, for each kind of cross-entropy. In
#: place: the bf16 logits. Fused: their fp32 copy, which becomes the softmax; in steps, the copy less its maximum is another.
#: Eager: the fp32 log-softmax, and two gradients
#: beside it; when the logits are gathered, they stay as the output of the last stage, and their bf16 gradient is sliced
LOGIT_BYTES = {
    "in_place": (BF16, BF16),
    "fused": (FP32, BF16 + FP32),
    "vocab_parallel": (FP32, BF16 + 2 * FP32),
    "eager": (FP32, 3 * FP32),
    "gathered": (BF16 + FP32, 3 * FP32 + 2 * BF16),
}
#: backward over forward FLOP of fused attention: it computes the scores again and then four products instead of two
ATTENTION_BACKWARD_FLOP = 2.5
#: bytes per score that softmax moves, forward and backward: as one kernel in bf16 (read, write; read twice, write), or
#: scale, mask, cast, fp32 softmax and cast on their own, and their gradients
SCORE_BYTES: dict[str, tuple[float, float]] = {"unfused": (4.0, 6.0), "eager": (29.0, 35.0)}
#: kernels of that softmax and its gradient
SCORE_LAUNCHES = {"unfused": 1, "eager": 5}
#: the fused softmax takes this many products per block: another number of sequences times heads goes the eager way (Megatron-LM,
#: megatron/model/fused_softmax.py, is_kernel_available)
SOFTMAX_BLOCK = 4
#: bytes per element of an RMSNorm written in PyTorch: cast, square, mean, scale, cast back, weight; and their gradients
EAGER_NORM_BYTES = (36.0, 100.0)
#: times that eager rotary embedding reads or writes its rows, most of them in fp32
EAGER_ROTARY_PASSES = 14
#: kernels of scores, top-k, load counts and probabilities, and of their gradients; of moving rows to their experts' order, for
#: which a map of rows is made first; of moving whole chunks of rows
ROUTER_LAUNCHES, PERMUTE_LAUNCHES, SORT_LAUNCHES = (20, 15), (8, 8), (3, 2)
#: bytes per element that adding the last bias of experts moves, forward and backward, in separate operations of PyTorch: the bias
#: times the probability (write), the sum (read twice, write), one tensor of all experts (read, write); backward the tensor
#: again, and the gradient times the probability and times the bias (read, write each), summed up (read each). Megatron-Core,
#: megatron/core/transformer/moe/experts.py, ``TEGroupedMLP._apply_bias``
EXPERT_BIAS_BYTES = (12.0, 16.0)
#: kernels of that for every expert
EXPERT_BIAS_LAUNCHES = (3, 6)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one micro-batch on one rank, for one plan or a column of plans."""

    tokens: Number
    split_tokens: Number
    sequence: Number
    tp: Number
    cp: Number
    ep: Number
    etp: Number
    sequence_parallel: bool
    ulysses: bool
    pieces: bool

    @classmethod
    def of(cls, plan: Plan, job: Job) -> Shape:
        """Return the sizes that `plan` gives to one micro-batch of `job`."""
        tokens = plan.micro_batch * job.sequence_length / plan.cp
        split = tokens / plan.tp if plan.sequence_parallel else tokens
        ulysses = plan.context_parallel == "all_to_all"
        return cls(
            tokens,
            split,
            job.sequence_length,
            plan.tp,
            plan.cp,
            plan.ep,
            plan.etp,
            plan.sequence_parallel,
            ulysses,
            plan.overlap.tp == "pieces",
        )


def attended(sequence: Number, window: int | None, causal: bool = True) -> Number:
    """Return the mean number of keys that a query sees.

    Notes
    -----
    Causal: ``(s + 1) / 2``; within a window w < s: ``w (s - (w - 1) / 2) / s``; not causal: s. Flash kernels skip what
    the mask hides in tiles, so the small surplus at the diagonal is part of their efficiency.
    """
    if not causal:
        return sequence * 1.0
    if window is None:
        return (sequence + 1) / 2
    w = np.minimum(window, sequence)
    return w * (sequence - (w - 1) / 2) / sequence


def _builder(plan: Plan, load: Number = 1.0) -> BlockBuilder:
    gemm = plan.precision.gemm
    return BlockBuilder(
        gemm,
        ELEMENT_BYTES[gemm],
        plan.recompute,
        plan.recomputed,
        bool(plan.overlap.tp),
        ELEMENT_BYTES[plan.precision.gradients],
        plan.kernels,
        load,
    )


def _norm(
    b: BlockBuilder, name: str, tokens: Number, width: int, model: Model, saved: Number, modules: tuple[str, ...] = ("layernorm",)
) -> None:
    """Read and write the row forward; read it, its gradient, write the input's gradient backward.

    An eager RMSNorm is seven operations in fp32, with twice as many behind them, and keeps an fp32 copy of the row and the
    normalised row beside the row and the result; LayerNorm is one kernel in PyTorch too.
    """
    eager = b.kernels.norm == "eager" and not model.layer_norm
    there, back = EAGER_NORM_BYTES if eager else (2 * BF16, 3 * BF16)
    if eager:
        saved = saved + tokens * width * (FP32 + BF16)
    b.memory(name, there * tokens * width, back * tokens * width, saved, modules, launches=(7, 14) if eager else (1, 2))
    b.dense_parameters = b.dense_parameters + width * (2 if model.layer_norm else 1)


def _residual(b: BlockBuilder, x: Shape, model: Model) -> None:
    """Add a branch to the residual stream; dropout writes a mask and reads it back."""
    size, mask = x.split_tokens * model.hidden * BF16, x.split_tokens * model.hidden * MASK if b.kernels.dropout else 0.0
    b.memory("residual", 3 * size + mask, 3 * size + mask, mask)


def _enter_tp(b: BlockBuilder, name: str, x: Shape, width: Number, modules: tuple[str, ...] = ()) -> tuple[Op | None, Op | None]:
    """Gather the sequence-parallel rows for a column-parallel layer.

    Returns the collectives that Megatron hides behind the layer's gradients: the rows are gathered again beside the
    input gradient and their gradient is reduce-scattered (without sequence parallel: all-reduced) beside the weight's.
    """
    size = x.tokens * width * BF16
    if not x.sequence_parallel:
        return None, Op(f"{name}.grad", "all_reduce", bytes=size, axis="tp", grad="input")
    b.add([(Op(f"{name}.gather", "all_gather", bytes=size, axis="tp"),)], [], modules=(*modules, "tp_gather"))
    again = Op(f"{name}.gather", "all_gather", bytes=size, axis="tp", grad="weight")
    return again, Op(f"{name}.scatter", "reduce_scatter", bytes=size, axis="tp", grad="input")


def _leave_tp(b: BlockBuilder, name: str, x: Shape, width: int, modules: tuple[str, ...] = ()) -> None:
    """Sum the partial rows of a row-parallel layer."""
    size = x.tokens * width * BF16
    if x.sequence_parallel:
        scatter, gather = (Op(f"{name}.{kind.split('_')[-1]}", kind, bytes=size, axis="tp") for kind in ("reduce_scatter", "all_gather"))
        b.collective(scatter, gather, modules)
    else:
        b.add([(Op(f"{name}.reduce", "all_reduce", bytes=size, axis="tp"),)], [], modules=modules)


def _column_parallel(
    b: BlockBuilder, part: str, name: str, x: Shape, width: int, n: Number, modules: tuple[str, ...] = (), saved: Number = 0.0
) -> None:
    """Append a column-parallel linear layer with the collectives of its rows, as the plan overlaps them.

    In pieces, rows are gathered in the datatype of the product, as Transformer Engine's buffers are (``fp8_buf``), by copy
    engines (``use_ce``).
    """
    if not x.pieces:
        beside = _enter_tp(b, part, x, width, modules)
        b.linear(name, x.tokens, width, n, saved=saved, modules=modules, beside=beside)
        return
    gather = Op(f"{part}.gather", "all_gather", bytes=x.tokens * width * min(b.element, BF16), axis="tp", dtype=b.dtype)
    scatter = Op(f"{part}.scatter", "reduce_scatter", bytes=x.tokens * width * BF16, axis="tp", grad="input")
    beside = replace(gather, grad="weight"), scatter
    b.linear(name, x.tokens, width, n, saved, modules, beside, gather=replace(gather, apart=True), pieces=x.tp)


def _row_parallel(
    b: BlockBuilder, part: str, name: str, x: Shape, k: Number, width: int, modules: tuple[str, ...] = (), saved: Number = 0.0
) -> None:
    """Append a row-parallel linear layer and the sum of its partial rows, as the plan overlaps them."""
    if not x.pieces:
        b.linear(name, x.tokens, k, width, saved=saved, modules=modules)
        _leave_tp(b, part, x, width, tuple(m for m in modules if m != "attn_out"))  # by operation, what is reduce-scattered is kept
        return
    scatter = Op(f"{part}.scatter", "reduce_scatter", bytes=x.tokens * width * BF16, axis="tp")
    gather = Op(f"{part}.gather", "all_gather", bytes=x.tokens * width * min(b.element, BF16), axis="tp", dtype=b.dtype, grad="input")
    b.linear(name, x.tokens, k, width, saved, modules, scatter=(replace(scatter, apart=True), replace(gather, apart=True)), pieces=x.tp)


def _core_attention(
    b: BlockBuilder, x: Shape, model: Model, heads: Number, qk_dim: int, v_dim: int, kv_width: Number, window: int | None
) -> None:
    """Scores and weighted values, fused; with context parallelism the keys and values pass around a ring beside it.

    Notes
    -----
    FLOP = 2 T keys heads (qk_dim + v_dim), ring attention balanced over the ranks (zig-zag). One log-sum-exp per
    head is saved; the output is saved as the input of the projection. Unfused, the softmax of every score is saved
    (`SCORE_SAVED`), with dropout also its mask and its result (Korthikanti et al., 2022, section 4.1); backward, the
    gradients of both pass. Fused, the query's gradient is summed up in fp32.
    """
    ring = x.tokens * x.cp * kv_width * BF16
    passed = (Op("attn.ring", "all_gather", bytes=size * ring, axis="cp", grad=grad) for size, grad in ((1, ""), (2, "input")))
    fused = b.kernels.attention not in SCORE_BYTES
    cores = _fused_core(x, heads, qk_dim, v_dim, kv_width, window) if fused else _unfused_core(b, x, heads, qk_dim, v_dim)
    forward, backward = ([(segments[0][0], beside), *segments[1:]] for segments, beside in zip(cores, passed, strict=True))
    scores = x.tokens * x.sequence * heads
    if b.kernels.attention in SCORE_SAVED:
        saved = scores * (_of_softmax(b, x, heads, SCORE_SAVED) + (MASK + BF16 if b.kernels.dropout else 0.0))
        works = scores * 2 * BF16
    else:
        saved = x.tokens * heads * FP32
        works = x.tokens * (heads * (qk_dim * (BF16 + FP32) + 2 * v_dim * BF16) + kv_width * BF16)
    if x.ulysses:
        saved = saved + np.where(np.asarray(x.cp) > 1, x.tokens * heads * v_dim * BF16, 0.0)
    b.add(forward, backward, saved, ("core_attn",))
    b.works(works)


def _of_softmax(b: BlockBuilder, x: Shape, heads: Number, what: dict[str, Any]) -> Number:
    """Return what the softmax costs as the stack runs it: eagerly also where the fused kernel does not take the shape."""
    ragged = np.mod(x.tokens * x.cp / x.sequence * heads, SOFTMAX_BLOCK) > 0
    return np.where(ragged, what["eager"], what[b.kernels.attention])


def _fused_core(
    x: Shape, heads: Number, qk_dim: int, v_dim: int, kv_width: Number, window: int | None
) -> tuple[list[Segment], list[Segment]]:
    flop = 2 * x.tokens * attended(x.sequence, window) * heads * (qk_dim + v_dim)
    traffic = x.tokens * (heads * (qk_dim + v_dim) + kv_width) * BF16
    there = Op("attn.core", "attention", flop=flop, bytes=traffic, m=x.tokens, k=qk_dim, n=v_dim, groups=heads)
    back = replace(there, flop=ATTENTION_BACKWARD_FLOP * flop, bytes=2.5 * traffic, grad="input")
    return [(there,)], [(back,)]


def _unfused_core(b: BlockBuilder, x: Shape, heads: Number, qk_dim: int, v_dim: int) -> tuple[list[Segment], list[Segment]]:
    """Return scores, softmax and weighted values as kernels of their own; nothing that the mask hides is left out.

    Notes
    -----
    With S = T s heads scores: two products of 2 S d FLOP forward, four backward. Softmax and dropout read and write S
    elements, see `SCORE_BYTES`.
    """
    scores, products, rows = x.tokens * x.sequence * heads, x.tokens / x.sequence * x.cp * heads, x.sequence / x.cp
    there, back = (_of_softmax(b, x, heads, {name: both[i] for name, both in SCORE_BYTES.items()}) for i in (0, 1))
    drop = 2 * BF16 + MASK if b.kernels.dropout else 0.0
    launches = _of_softmax(b, x, heads, SCORE_LAUNCHES) + 1  # scaling the scores or, with dropout, dropping them out

    def product(name: str, k: Number, n: Number, grad: str = "") -> Segment:
        op = gemm(f"attn.core.{name}", rows, k, n, "bf16", BF16, grad, groups=products)
        return (replace(op, kind="gemm", launches=1.0),)  # one batch without weights: as fast as a single product

    softmax = Op("attn.core.softmax", "memory", bytes=scores * (there + drop), launches=launches)
    values, keys = product("values", v_dim, x.sequence, "input"), product("scores", x.sequence, qk_dim, "input")
    forward = [product("scores", qk_dim, x.sequence), (softmax,), product("values", x.sequence, v_dim)]
    gradient = replace(softmax, bytes=scores * (back + drop), grad="input")
    return forward, [values, product("values", x.sequence, v_dim, "input"), (gradient,), keys, keys]


def _attention(b: BlockBuilder, model: Model, kind: LayerKind, x: Shape) -> None:
    h, dim, heads, kv = model.hidden, model.head_dim, model.heads, model.kv_heads
    _norm(b, "attn.norm", x.split_tokens, h, model, x.split_tokens * h * b.element)
    local_heads, local_kv = heads / x.tp, np.maximum(kv / x.tp, 1.0)
    width = (local_heads + 2 * local_kv) * dim
    _column_parallel(b, "attn", "attn.qkv", x, h, width)
    rotated = x.tokens * (local_heads + local_kv) * dim * BF16
    if model.qk_norm:
        b.memory("attn.qk_norm", 2 * rotated, 3 * rotated, rotated, launches=(2, 4))
    _rotary(b, rotated, x.tokens * width * BF16)
    _core_attention(b, x, model, local_heads, dim, dim, 2 * local_kv * dim, kind.window)
    b.add([], [], _twice(b, x.tokens * local_heads * dim))  # attention's output, the projection's input
    _row_parallel(b, "attn", "attn.out", x, local_heads * dim, h, ("attn_out",))
    b.dense_parameters = b.dense_parameters + h * width + local_heads * dim * h
    b.dense_parameters = b.dense_parameters + (width if model.attention_bias else 0) + (h if model.output_bias else 0)
    b.dense_parameters = b.dense_parameters + (2 * dim if model.qk_norm else 0) + (local_heads if model.sinks else 0)


def _twice(b: BlockBuilder, elements: Number) -> Number:
    """Bytes of a tensor that attention keeps in bf16 and a low-precision linear layer in its own datatype."""
    return elements * (BF16 + (b.element if b.element < BF16 else 0.0))


def _rotary(b: BlockBuilder, rotated: Number, saved: Number, modules: tuple[str, ...] = ()) -> None:
    """Turn queries and keys in one kernel, or eagerly: to fp32, four products and two sums, and back."""
    eager = b.kernels.pointwise == "eager"
    passes = EAGER_ROTARY_PASSES if eager else 2
    b.memory("attn.rotary", passes * rotated, passes * rotated, saved, modules, launches=(8, 8) if eager else (1, 1))


def _activation(
    b: BlockBuilder, name: str, mats: int, size: Number, kept: Number, saved: Number, modules: tuple[str, ...], routed: bool = False
) -> None:
    """Activate the up-projection, gated or not; eagerly the gate's activation is a kernel of its own, whose output is kept."""
    if mats == 2 and b.kernels.pointwise == "eager":
        b.add([], [], size * (b.load if routed else 1.0), modules)
    eager = (2, 4) if b.kernels.pointwise == "eager" else (0, 0)
    there, back = mats + 1 + eager[0], 2 * mats + 1 + eager[1]
    launches = (2, 3) if b.kernels.pointwise == "eager" else (1, 1)
    b.memory(f"{name}.activation", there * size + kept, back * size - kept, saved, modules, routed, launches)


def _latent_attention(b: BlockBuilder, model: Model, kind: LayerKind, x: Shape) -> None:
    """Multi-head latent attention: down-projections on every tp rank, up-projections split by heads."""
    h, mla, heads = model.hidden, model.latent, model.heads / x.tp
    assert mla is not None
    qk = mla.nope_dim + mla.rope_dim
    _norm(b, "attn.norm", x.split_tokens, h, model, x.split_tokens * h * b.element)
    latent = mla.kv_rank + mla.rope_dim
    up = ("mla_up_proj",)
    if mla.q_rank:
        b.linear("attn.q_down", x.split_tokens, h, mla.q_rank, saved=x.split_tokens * mla.q_rank * BF16)
        _norm(b, "attn.q_norm", x.split_tokens, mla.q_rank, model, x.split_tokens * mla.q_rank * b.element)
    b.linear("attn.kv_down", x.split_tokens, h, latent, saved=x.split_tokens * latent * BF16)
    _norm(b, "attn.kv_norm", x.split_tokens, mla.kv_rank, model, x.split_tokens * mla.kv_rank * b.element)
    q_input = mla.q_rank or h
    beside = _enter_tp(b, "attn", x, q_input + latent)
    b.linear("attn.q_up", x.tokens, q_input, heads * qk, saved=x.tokens * heads * qk * BF16, modules=up, beside=beside)
    keys_values = heads * (mla.nope_dim + mla.v_dim)
    b.linear("attn.kv_up", x.tokens, mla.kv_rank, keys_values, saved=x.tokens * heads * (qk + mla.v_dim) * BF16, modules=up)
    _rotary(b, x.tokens * heads * 2 * qk * BF16, 0.0, up)
    _core_attention(b, x, model, heads, qk, mla.v_dim, heads * (qk + mla.v_dim), kind.window)
    _row_parallel(b, "attn", "attn.out", x, heads * mla.v_dim, h, saved=_twice(b, x.tokens * heads * mla.v_dim))
    q_down = h * mla.q_rank if mla.q_rank else 0
    b.dense_parameters = b.dense_parameters + q_down + q_input * heads * qk + h * latent + mla.kv_rank * keys_values + heads * mla.v_dim * h


def _mlp(b: BlockBuilder, model: Model, x: Shape, name: str, ffn: int, modules: tuple[str, ...], kept: Dtype) -> None:
    """Dense MLP, column- then row-parallel: up (and gate), activation, down; the up-projection is `kept` for the backward."""
    h, local, mats = model.hidden, ffn / x.tp, 2 if model.gated else 1
    saved, cast = _kept(x.tokens * mats * local, kept)
    if mats == 2 and b.kernels.gate == "separate":
        _column_parallel(b, f"{name}.gate", f"{name}.gate", x, h, local, (*modules, "mlp_gate"), saved / 2)
        _column_parallel(b, f"{name}.up", f"{name}.up", x, h, local, modules, saved / 2)
    else:
        _column_parallel(b, name, f"{name}.up", x, h, mats * local, modules, saved)
    size = x.tokens * local * BF16
    _activation(b, name, mats, size, cast, x.tokens * local * b.element, (*modules, f"{name}_act"))
    b.works(mats * size + x.tokens * h * BF16)  # gradients of the up-projection's output and of the layer's
    _row_parallel(b, name, f"{name}.down", x, local, h, modules)
    bias = (mats * local + h) if model.mlp_bias else 0
    b.dense_parameters = b.dense_parameters + (mats + 1) * h * local + bias


def _kept(elements: Number, dtype: Dtype) -> tuple[Number, Number]:
    """Return the bytes of a tensor saved in `dtype`, and those that its cast writes: none when it stays what it is."""
    saved = elements * ELEMENT_BYTES[dtype]
    return saved, (saved if dtype != "bf16" else 0.0)


def _experts(b: BlockBuilder, model: Model, x: Shape, precision: Precision, dispatcher: str) -> None:
    """Router, dispatch, grouped experts, combine; shared experts beside them as a dense MLP.

    Notes
    -----
    Balanced, a rank receives as many copies as it sends: R = Ts top_k. With expert-tensor parallelism the copies are
    gathered over etp and every rank computes a slice of width f / etp. Fused, the activation and its gradient, and the
    casts of their results, are epilogues of the products: no traffic of their own.
    """
    e, h = model.experts, model.hidden
    assert e is not None
    mats = 2 if model.gated else 1
    received = x.split_tokens * e.top_k
    rows, local, ffn = received * x.etp, e.count / x.ep, e.ffn / x.etp
    moe = ("moe",)
    scores = x.split_tokens * e.count * FP32
    b.linear("router", x.split_tokens, h, e.count, saved=scores, dtype="bf16", modules=moe)
    b.memory("router.topk", 4 * scores, 4 * scores, modules=moe, launches=ROUTER_LAUNCHES)
    copies = received * h
    # cast before dispatch, as DeepSeek-V3 does: an eighth of the rows, and the copies come as the experts take them
    cast = precision.dispatch == b.dtype != "bf16"
    sent, arrived = (x.split_tokens * h * rows for rows in rows_sorted(e, dispatcher, x.ep))
    element = ELEMENT_BYTES[precision.dispatch if cast else "bf16"]
    sort = tuple(n * (arrived > 0) for n in (PERMUTE_LAUNCHES if dispatcher == "deepep" else SORT_LAUNCHES))
    if cast:
        b.memory("moe.dispatch.cast", x.split_tokens * h * (BF16 + b.element), 0.0, modules=moe)
    b.memory("moe.permute", sent * element, sent * BF16, modules=moe, launches=PERMUTE_LAUNCHES)
    out, back = (x.split_tokens * h * ELEMENT_BYTES[p] for p in (precision.dispatch, precision.combine))
    b.exchange("moe.dispatch", out, back, moe)
    b.memory("moe.arrived.permute", arrived * element, arrived * BF16, modules=moe, routed=True, launches=sort)
    gather, scatter = (
        Op("moe.etp", kind, bytes=copies * x.etp * BF16, axis="etp", routed=True) for kind in ("all_gather", "reduce_scatter")
    )
    b.collective(gather, scatter, moe)
    per_expert, (saved, kept) = rows / local, _kept(rows * mats * ffn, precision.activations)
    taken = rows * b.load  # what stays in memory is of the tokens that really come
    fused = b.kernels.experts == "fused"
    b.linear(
        "moe.up",
        per_expert,
        h,
        mats * ffn,
        saved=(copies * x.etp * b.element + saved) * b.load,
        modules=moe,
        groups=local,
        routed=True,
        arrives=(cast, fused),
    )
    if fused:
        b.add([], [], taken * ffn * b.element, ("moe", "moe_act"))
    else:
        _activation(b, "moe", mats, rows * ffn * BF16, kept, taken * ffn * b.element, ("moe", "moe_act"), routed=True)
    b.works(taken * np.maximum(mats * ffn, 2 * h) * BF16 + x.split_tokens * h * BF16)  # of the up-projection, or of the copies
    b.linear("moe.down", per_expert, ffn, h, modules=moe, groups=local, routed=True, arrives=(fused, cast))
    if model.mlp_bias and not fused and "full" not in b.kernels.graphs:  # a graph of everything cannot split by the experts' loads
        launches = tuple(1 + each * local for each in EXPERT_BIAS_LAUNCHES)
        b.memory("moe.bias", *(rows * h * each for each in EXPERT_BIAS_BYTES), modules=moe, routed=True, launches=launches)
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
    x, b, h = Shape.of(plan, job), _builder(plan, load), model.hidden
    layer_input = x.split_tokens * h * BF16
    b.add([], [], layer_input)
    (_latent_attention if model.latent else _attention)(b, model, kind, x)
    _residual(b, x, model)
    b.add([], [], layer_input, ("attn_out",))  # of the second norm
    _norm(b, "mlp.norm", x.split_tokens, h, model, x.split_tokens * h * b.element)
    if kind.moe:
        _experts(b, model, x, plan.precision, plan.dispatcher)
    else:
        _mlp(b, model, x, "mlp", model.ffn, ("mlp",), plan.precision.activations)
    _residual(b, x, model)
    return b.build(layer_input)


def embedding(model: Model, plan: Plan, job: Job) -> Block:
    """Return the block of the input embedding, vocabulary split over tp."""
    x, b = Shape.of(plan, job), BlockBuilder("bf16", BF16, kernels=plan.kernels)
    size = x.tokens * model.hidden * BF16
    b.memory("embedding", 2 * size, 2 * size)
    _leave_tp(b, "embedding", x, model.hidden)
    b.dense_parameters = model.vocab * model.hidden / x.tp + model.positions * model.hidden
    b.works(b.dense_parameters * BF16)  # its gradient is written out before it is added
    dropped = x.split_tokens * model.hidden * MASK if b.kernels.dropout else 0.0
    b.add([], [], dropped)
    return b.build(dropped)


def head(model: Model, plan: Plan, job: Job) -> Block:
    """Return the block of the final norm, the output projection (in bf16) and the cross-entropy.

    Notes
    -----
    The loss reads the logits for the maximum, the sum and the gradient, those of all tp ranks where it gathers them. How many
    bytes of each are kept, and live at its fullest moment, is `LOGIT_BYTES`; then the projection's backward holds their bf16
    gradient, the rows it gathers again, their gradient and, unless it is added in place, the gradient of its matrix.
    """
    x, b = Shape.of(plan, job), BlockBuilder("bf16", BF16, overlap=bool(plan.overlap.tp), kernels=plan.kernels)
    vocab = model.vocab / x.tp
    _norm(b, "head.norm", x.split_tokens, model.hidden, model, 2 * x.split_tokens * model.hidden * BF16)
    beside = _enter_tp(b, "head", x, model.hidden)
    logits, gathered = x.tokens * vocab, plan.framework.cross_entropy == "gathered"
    seen = logits * (x.tp if gathered else 1.0)  # by the loss of this rank
    kept, most = (size * seen for size in LOGIT_BYTES[plan.framework.cross_entropy])
    b.linear("head.logits", x.tokens, model.hidden, vocab, saved=kept, beside=beside)
    written = 0.0 if plan.framework.weight_gradients == "fused" else model.hidden * vocab * BF16
    b.works(most - kept)
    b.works(logits * BF16 - kept + 2 * x.tokens * model.hidden * BF16 + written)
    b.matrices.clear()  # never a placeholder: its gradient is written out, used and dropped
    if gathered:
        b.add([(Op("head.gather", "all_gather", bytes=seen * BF16, axis="tp"),)], [])
    eager = 3 * FP32 if plan.kernels.pointwise == "eager" else 0.0  # log-softmax writes, its gradient reads and writes
    b.memory("head.loss", seen * (BF16 + 3 * FP32), seen * (FP32 + BF16 + eager))
    if not model.tied_embeddings:
        b.dense_parameters = b.dense_parameters + model.vocab * model.hidden / x.tp
    return b.build(x.split_tokens * model.hidden * BF16)


def mtp_layer(model: Model, plan: Plan, job: Job, load: Number = 1.0) -> Block:
    """Return the block of one multi-token-prediction layer: two norms, a 2h -> h projection, a layer and its loss.

    Embedding and output projection are shared with the main model; the projection and loss are computed again.
    """
    x, b, h = Shape.of(plan, job), _builder(plan), model.hidden
    for name in ("mtp.norm_hidden", "mtp.norm_embedding"):
        _norm(b, name, x.split_tokens, h, model, x.split_tokens * h * BF16, ())
    b.linear("mtp.project", x.split_tokens, 2 * h, h, saved=x.split_tokens * 2 * h * b.element)
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
