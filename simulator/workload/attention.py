"""FLOP and bytes of attention, grouped-query or latent, fused or with its scores in memory, on one rank for one micro-batch.

Shapes as in `simulator.workload.layers`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from simulator.scenario.model import LatentAttention, LayerKind, Model
from simulator.units import Number
from simulator.workload.blocks import BlockBuilder
from simulator.workload.ops import BF16, FP32, Op, Segment, gemm
from simulator.workload.parts import MASK, Shape, bias_gradients, column_parallel, enter_tp, norm, row_parallel, twice

#: bytes of the softmax that unfused attention saves per score: in 16 bits, or in fp32 and cast
SCORE_SAVED: dict[str, float] = {"unfused": BF16, "eager": FP32 + BF16}
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
#: what a rank does between the kernels of ring attention, times the bytes of its output or of its query's gradient: forward, an
#: output is set to zero (write) and corrected by each kernel's own (read both, write); backward, the first kernel's gradient is
#: copied (read, write) and each further one's added (read both, write). NVIDIA/TransformerEngine,
#: transformer_engine/pytorch/attention/dot_product_attention/context_parallel.py, ``AttnFuncWithCPAndKVP2P``
RING_PASSES: dict[str, tuple[float, float, float]] = {"forward": (1.0, 3.0, 3.0), "backward": (2.0, 0.0, 3.0)}
#: share of the rows that a further kernel of balanced causal ring attention takes: all of them and half of the keys, or half of
#: them and all keys, each as often as the other (the same)
RING_ROWS = 0.75
#: times that a tensor is copied, read and written, when sequence is traded for heads: into an order by rank before it is sent, and by
#: its halves of the sequence where it comes; before the scores the other way round. NVIDIA/TransformerEngine @9c61cd7, the same file,
#: ``flash_attn_a2a_communicate`` (sequence first, as Megatron lays it out)
EXCHANGE_COPIES = 2
#: times that eager rotary embedding reads or writes its rows, most of them in fp32
EAGER_ROTARY_PASSES = 14
#: the same, forward and backward, of Megatron's own in 16 bits where Transformer Engine's kernel does not scale (megatron/core/models/
#: common/embeddings/rope_utils.py, ``mscale``): a sum and a copy; two sums and zeros. Beside them it addresses one by one the elements
#: of two products with a row, of the half that changes its sign, and those of joining halves of heads, 1.4 times as slow. Measured with
#: PyTorch 2.11 on one H100: 24 and 26 times what moving the rows takes
SCALED_ROTARY_PASSES, SCALED_ROTARY_ADDRESSED = (5, 7), 3.9
#: elements that are addressed one by one for each that PyTorch joins from parts of rows, as for halves of heads above
JOINED = 1.4


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


def _core_attention(
    b: BlockBuilder, x: Shape, model: Model, heads: Number, qk_dim: int, v_dim: int, kv_width: Number, window: int | None
) -> None:
    """Scores and weighted values, fused; with context parallelism the keys and values pass around a ring beside it.

    Notes
    -----
    FLOP = 2 T keys heads (qk_dim + v_dim), ring attention balanced over the ranks (zig-zag): a kernel for the rank's own keys and
    one for those of every other rank, which see fewer keys each (`_ring_turns`) and whose results are put together
    (`RING_PASSES`). One log-sum-exp per head is saved; the output is saved as the input of the projection. Unfused, the softmax
    of every score is saved (`SCORE_SAVED`), with dropout also its mask and its result (Korthikanti et al., 2022, section 4.1);
    backward, the gradients of both pass. Fused, the query's gradient is summed up in fp32.
    """
    fused = b.kernels.attention not in SCORE_BYTES
    cores = _fused_core(b, x, heads, qk_dim, v_dim, kv_width, window) if fused else _unfused_core(b, x, heads, qk_dim, v_dim)
    if x.context_parallel == "all_to_all":
        forward, backward = _exchanged(x, *cores, x.tokens * (heads * qk_dim + kv_width) * BF16, x.tokens * heads * v_dim * BF16)
    else:
        forward, backward = _across(x, *cores, x.tokens * x.cp * kv_width * BF16)
    if fused and x.context_parallel == "ring":
        merged = x.tokens * heads * BF16
        forward, backward = forward + [_merge(x, merged * v_dim, "forward")], backward + [_merge(x, merged * qk_dim, "backward")]
    scores = x.tokens * x.sequence * heads
    if b.kernels.attention in SCORE_SAVED:
        saved = scores * (_of_softmax(b, x, heads, SCORE_SAVED) + (MASK + BF16 if b.kernels.dropout else 0.0))
        works = scores * 2 * BF16
    else:
        saved = x.tokens * heads * FP32
        seen = x.cp if x.context_parallel == "all_gather" else 1.0
        works = x.tokens * (heads * (qk_dim * (BF16 + FP32) + 2 * v_dim * BF16) + seen * kv_width * BF16)
    if x.context_parallel == "all_to_all":
        saved = saved + np.where(np.asarray(x.cp) > 1, x.tokens * heads * v_dim * BF16, 0.0)
    b.add(forward, backward, saved, ("core_attn",))
    b.works(works)


def _across(x: Shape, forward: list[Segment], backward: list[Segment], keys: Number) -> tuple[list[Segment], list[Segment]]:
    """Return attention with what brings the other ranks' keys and values, `keys` bytes of them, and their gradients back."""
    if x.context_parallel == "all_gather":
        gather, again = (Op("attn.keys", "all_gather", bytes=keys, axis="cp", grad=grad) for grad in ("", "input"))
        return [(gather,), *forward], [(again,), *backward, (replace(again, kind="reduce_scatter"),)]
    ring = Op("attn.ring", "all_gather", bytes=keys, axis="cp")
    back = replace(ring, bytes=2 * keys, grad="input")
    return [(forward[0][0], ring), *forward[1:]], [(backward[0][0], back), *backward[1:]]


def _exchanged(
    x: Shape, forward: list[Segment], backward: list[Segment], inputs: Number, output: Number
) -> tuple[list[Segment], list[Segment]]:
    """Return attention over all keys for some heads, which the ranks trade their rows for: `inputs` bytes before it, `output` after it.

    The gradients go the same way back. Copies of one tensor run beside the messages of the next, but queries are most of the bytes.
    """
    several = 1.0 * (np.asarray(x.cp) > 1)

    def trade(name: str, size: Number, tensors: int, grad: str = "") -> list[Segment]:
        copies = {"bytes": several * 2 * EXCHANGE_COPIES * size, "launches": several * EXCHANGE_COPIES * tensors}
        talk = Op(f"attn.{name}.exchange", "all_to_all", bytes=size, axis="cp", grad=grad)
        return [(Op(f"attn.{name}.copy", "memory", grad=grad, **copies),), (talk,)]

    there = [*trade("inputs", inputs, 3), *forward, *trade("output", output, 1)]
    return there, [*trade("output", output, 1, "input"), *backward, *trade("inputs", inputs, 3, "input")]


def _of_softmax(b: BlockBuilder, x: Shape, heads: Number, what: dict[str, Any]) -> Number:
    """Return what the softmax costs as the stack runs it: eagerly also where the fused kernel does not take the shape."""
    ragged = np.mod(x.tokens * x.cp / x.sequence * heads, SOFTMAX_BLOCK) > 0
    return np.where(ragged, what["eager"], what[b.kernels.attention])


def _fused_core(
    b: BlockBuilder, x: Shape, heads: Number, qk_dim: int, v_dim: int, kv_width: Number, window: int | None
) -> tuple[list[Segment], list[Segment]]:
    """Return fused attention; its backward in 8 bits multiplies with all keys before a query, whatever the window.

    Published: cuDNN's backward in FP8 and MXFP8 with a window of 128 takes four times as long for twice the sequence on GB200 and GB300,
    its forward and 16 bits twice (NVIDIA/cudnn-frontend @60e572b benchmark/sdpa_benchmark_training/results/gpt_oss).
    """
    each = 2 * x.tokens * heads * (qk_dim + v_dim)
    flop, skipping = each * attended(x.sequence, window), None if b.kernels.attention == "flash_fp8" else window
    traffic = x.tokens * (heads * (qk_dim + v_dim) + kv_width) * BF16
    turns = _ring_turns(x.cp) if x.context_parallel == "ring" else 1.0
    there = Op("attn.core", "attention", flop=flop, bytes=traffic, m=x.tokens, k=qk_dim, n=v_dim, groups=heads, turns=turns)
    again = ATTENTION_BACKWARD_FLOP * each * attended(x.sequence, skipping)
    back = replace(there, flop=again, bytes=2.5 * traffic, grad="input")
    return [(there,)], [(back,)]


def _ring_turns(cp: Number) -> Number:
    """Return how many kernels over all its rows a rank's ring attention amounts to, by the keys that they see.

    Notes
    -----
    Of ``t = s / cp`` rows, the first kernel sees ``t / 2`` keys in the mean, of the others half see ``t / 2`` and half, with half of
    the rows, ``t``; all cost the same FLOP. What a kernel loses for few keys grows with ``1 / keys``, whose mean is that of
    ``keys / (1 + RING_ROWS (cp - 1))``, with the keys that a query sees in all.
    """
    return 1.0 + RING_ROWS * (np.asarray(cp) - 1.0)


def _merge(x: Shape, size: Number, direction: str) -> Segment:
    """Return the kernels between those of ring attention; none without a ring."""
    once, first, further = RING_PASSES[direction]
    others = np.asarray(x.cp) - 1.0
    moved, launches = (np.where(others > 0, n, 0.0) for n in ((once + first + further * RING_ROWS * others) * size, 1.0 + others))
    return (Op("attn.ring.merge", "memory", bytes=moved, grad="" if direction == "forward" else "input", launches=launches),)


def _unfused_core(b: BlockBuilder, x: Shape, heads: Number, qk_dim: int, v_dim: int) -> tuple[list[Segment], list[Segment]]:
    """Return scores, softmax and weighted values as kernels of their own; nothing that the mask hides is left out.

    Notes
    -----
    With S = T s heads scores: two products of 2 S d FLOP forward, four backward. Softmax and dropout read and write S
    elements, see `SCORE_BYTES`. The result is copied into the order of the output projection's rows (Megatron-LM,
    megatron/model/transformer.py: ``permute(...).contiguous()``).
    """
    scores, products, rows = x.tokens * x.sequence * heads, x.tokens / x.sequence * x.cp * heads, x.sequence / x.cp
    there, back = (_of_softmax(b, x, heads, {name: both[i] for name, both in SCORE_BYTES.items()}) for i in (0, 1))
    drop = 2 * BF16 + MASK if b.kernels.dropout else 0.0
    launches = _of_softmax(b, x, heads, SCORE_LAUNCHES) + 1  # scaling the scores or, with dropout, dropping them out

    def product(name: str, k: Number, n: Number, grad: str = "") -> Segment:
        op = gemm(f"attn.core.{name}", rows, k, n, "bf16", BF16, grad, groups=products)
        return (replace(op, kind="gemm", launches=1.0),)  # one batch without weights: as fast as a single product

    softmax = Op("attn.core.softmax", "memory", bytes=scores * (there + drop), launches=launches)
    context = Op("attn.context", "memory", bytes=2 * BF16 * x.tokens * heads * v_dim)
    values, keys = product("values", v_dim, x.sequence, "input"), product("scores", x.sequence, qk_dim, "input")
    forward = [product("scores", qk_dim, x.sequence), (softmax,), product("values", x.sequence, v_dim), (context,)]
    gradient = replace(softmax, bytes=scores * (back + drop), grad="input")
    return forward, [values, product("values", x.sequence, v_dim, "input"), (gradient,), keys, keys]


def attention(b: BlockBuilder, model: Model, kind: LayerKind, x: Shape) -> None:
    """Append grouped-query attention: norm, one projection to queries, keys and values, rotary, scores and values, output."""
    h, dim, heads, kv = model.hidden, model.head_dim, model.heads, model.kv_heads
    norm(b, "attn.norm", x.split_tokens, h, model, x.split_tokens * h * b.kept)
    local_heads, local_kv = heads / x.tp, np.maximum(kv / x.tp, 1.0)
    width = (local_heads + 2 * local_kv) * dim
    column_parallel(b, "attn", "attn.qkv", x, h, width)
    if b.kernels.glue and not x.of_torch and b.kernels.joins_queries:
        _split(b, x.tokens, local_heads * dim, width, (local_kv > 1) & (local_heads > local_kv))
    rotated = x.tokens * (local_heads + local_kv) * dim * BF16
    if model.qk_norm:
        b.memory("attn.qk_norm", 2 * rotated, 3 * rotated, rotated, launches=(2, 4))
    if model.positions:  # learned ones were added to the embedding
        b.add([], [], x.tokens * width * BF16)
    else:
        _rotary(b, rotated, x.tokens * width * BF16, scaled=model.scaled_rotary)
    _core_attention(b, x, model, local_heads, dim, dim, 2 * local_kv * dim, kind.window)
    dropped = ("core_attn",) if {"core_attn", "attn_out"} <= b.recomputed else ()  # with its own product and its only reader
    b.add([], [], twice(b, x.tokens * local_heads * dim), dropped)  # attention's output, the projection's input
    bias_gradients(b, "attn.qkv", x.tokens * width * model.attention_bias)
    row_parallel(b, "attn", "attn.out", x, local_heads * dim, h, ("attn_out",))
    bias_gradients(b, "attn.out", x.split_tokens * h * model.output_bias)
    b.dense_parameters = b.dense_parameters + h * width + local_heads * dim * h
    b.dense_parameters = b.dense_parameters + (width if model.attention_bias else 0) + (h if model.output_bias else 0)
    b.dense_parameters = b.dense_parameters + (2 * dim if model.qk_norm else 0) + (local_heads if model.sinks else 0)


def _split(b: BlockBuilder, tokens: Number, queries: Number, width: Number, grouped: Number) -> None:
    """Split the rows of the joint projection into queries, keys and values.

    Where rows hold groups of several queries, a key and a value, the queries are copied out, element by element; backward, the three
    gradients are joined (megatron/core/transformer/attention.py, ``get_query_key_value_tensors``; Transformer Engine's
    ``SplitAlongDim``). Measured with PyTorch 2.11 on one H100: 4.2 and 2.9 times what moving the queries takes, with 8 of them to a key.
    """
    copies = np.where(grouped, 1.0, 0.0)
    b.memory("attn.split", 0.0, 2 * tokens * width * BF16, launches=(copies, 1), addressed=(tokens * queries * copies, 0.0))


def _rotary(b: BlockBuilder, rotated: Number, saved: Number, modules: tuple[str, ...] = (), scaled: bool = False) -> None:
    """Turn queries and keys in one kernel each, or eagerly: to fp32, four products and two sums, and back; `scaled`, see above."""
    eager = b.kernels.pointwise == "eager"
    if scaled and not eager:
        moved, elements = (rotated * each for each in SCALED_ROTARY_PASSES), rotated / BF16 * SCALED_ROTARY_ADDRESSED
        b.memory("attn.rotary", *moved, saved, modules, launches=(12, 14), addressed=(elements, elements), plain=True)
        return
    passes = EAGER_ROTARY_PASSES if eager else 2
    b.memory("attn.rotary", passes * rotated, passes * rotated, saved, modules, launches=(8, 8) if eager else (1, 1))


def _latent_rotary(b: BlockBuilder, rows: Number, mla: LatentAttention, modules: tuple[str, ...]) -> None:
    """Turn a part of every query by PyTorch's operations, and put queries, keys and values together; `rows` are tokens times heads.

    Notes
    -----
    The part that is turned is first sorted into even and odd elements, then as where the embedding is scaled; it is joined to the rest
    of the query, the keys' part, one for all heads, to each key; values are copied out of the joint projection. Backward, the gradients
    of queries, and of keys and values, are joined, and the keys' part is summed up over the heads (NVIDIA/Megatron-LM core_r0.12.0
    megatron/core/transformer/multi_latent_attention.py, ``get_query_key_value_tensors``; models/common/embeddings/rope_utils.py). The
    same in torchtitan, with a rotary embedding of its own, takes 19.2 and 15.6 ms for 8.4 million rows on GB300 (pytorch/torchtitan
    pull request 4134); this comes out at 21 and 22.
    """
    turned, qk = mla.rope_dim, mla.nope_dim + mla.rope_dim
    turning = turned * (SCALED_ROTARY_ADDRESSED + JOINED)
    forward = turning + JOINED * 2 * qk + mla.v_dim
    backward = turning + JOINED * (qk + mla.nope_dim + mla.v_dim) + turned
    moved = tuple(passes * rows * turned * BF16 for passes in SCALED_ROTARY_PASSES)
    b.memory("attn.rotary", *moved, 0.0, modules, launches=(20, 20), addressed=(rows * forward, rows * backward), plain=True)


def latent_attention(b: BlockBuilder, model: Model, kind: LayerKind, x: Shape) -> None:
    """Multi-head latent attention: down-projections on every tp rank, up-projections split by heads."""
    h, mla, heads = model.hidden, model.latent, model.heads / x.tp
    assert mla is not None
    qk = mla.nope_dim + mla.rope_dim
    norm(b, "attn.norm", x.split_tokens, h, model, x.split_tokens * h * b.kept)
    latent = mla.kv_rank + mla.rope_dim
    up = ("mla_up_proj",)
    if mla.q_rank:
        b.linear("attn.q_down", x.split_tokens, h, mla.q_rank, saved=x.split_tokens * mla.q_rank * BF16)
        norm(b, "attn.q_norm", x.split_tokens, mla.q_rank, model, x.split_tokens * mla.q_rank * b.kept)
    b.linear("attn.kv_down", x.split_tokens, h, latent, saved=x.split_tokens * latent * BF16)
    norm(b, "attn.kv_norm", x.split_tokens, mla.kv_rank, model, x.split_tokens * mla.kv_rank * b.kept)
    q_input = mla.q_rank or h
    beside = enter_tp(b, "attn", x, q_input + latent)
    b.linear("attn.q_up", x.tokens, q_input, heads * qk, saved=x.tokens * heads * qk * BF16, modules=up, beside=beside)
    keys_values = heads * (mla.nope_dim + mla.v_dim)
    b.linear("attn.kv_up", x.tokens, mla.kv_rank, keys_values, saved=x.tokens * heads * (qk + mla.v_dim) * BF16, modules=up)
    if b.kernels.latent_rotary == "eager":
        _latent_rotary(b, x.tokens * heads, mla, up)
    else:
        _rotary(b, x.tokens * heads * 2 * qk * BF16, 0.0, up)
    _core_attention(b, x, model, heads, qk, mla.v_dim, heads * (qk + mla.v_dim), kind.window)
    row_parallel(b, "attn", "attn.out", x, heads * mla.v_dim, h, saved=twice(b, x.tokens * heads * mla.v_dim))
    q_down = h * mla.q_rank if mla.q_rank else 0
    b.dense_parameters = b.dense_parameters + q_down + q_input * heads * qk + h * latent + mla.kv_rank * keys_values + heads * mla.v_dim * h
