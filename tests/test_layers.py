"""Oracle: FLOP and bytes of every operation of small layers, worked out by hand; columns of plans against plans one by one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import H100

from simulator.errors import ProfileError
from simulator.pricing.beside import Beside
from simulator.pricing.compute import memory_s
from simulator.pricing.operations import Known, op_s
from simulator.pricing.stage_times import price_blocks
from simulator.scenario.job import Job
from simulator.scenario.kernels import Kernels
from simulator.scenario.model import Experts, LatentAttention, Model
from simulator.scenario.overlap import Overlap
from simulator.scenario.plan import COLUMNS, ELEMENT_BYTES, EVERY_OTHER_PRODUCT, Plan, PlanColumns, Precision
from simulator.scenario.profiles import ACCELERATORS, MODELS
from simulator.workload.attention import ATTENTION_BACKWARD_FLOP, attended
from simulator.workload.blocks import Block, passes
from simulator.workload.layers import embedding, head, transformer_layer
from simulator.workload.memory import memory_per_stage
from simulator.workload.ops import Op, Segment, arriving, gemm, launched, leaving, total
from simulator.workload.stages import blocks, stage_blocks

S, H = 64, 32
DENSE = Model(name="dense", source="made up", layers=4, hidden=H, vocab=128, heads=4, kv_heads=2, head_dim=16, ffn=96)
EXPERTS = Experts(count=8, top_k=2, ffn=24, shared_ffn=40)
MOE = DENSE.model_copy(update={"name": "moe", "experts": EXPERTS, "moe_layers": (False, False, True, True)})
LATENT = LatentAttention(q_rank=24, kv_rank=16, nope_dim=8, rope_dim=4, v_dim=12)
MLA = MOE.model_copy(update={"name": "mla", "latent": LATENT, "kv_heads": 4})
JOB = Job(tokens=S * 64, global_batch=64, sequence_length=S)


def layer(model: Model, moe: bool, **changes) -> Block:
    kind = next(k for k in model.kinds if k.moe == moe)
    return transformer_layer(model, kind, Plan(**({"dp_shard": 1} | changes)), JOB)


def only(segments: tuple[Segment, ...], name: str, kind: str = "", grad: str | None = None) -> Op:
    """Return the one operation of that name."""
    (found,) = [op for s in segments for op in s if op.name == name and kind in ("", op.kind) and grad in (None, op.grad)]
    return found


def collectives(segments: tuple[Segment, ...], axis: str) -> list[tuple[str, float]]:
    return [(op.kind, float(op.bytes)) for s in segments for op in s if op.axis == axis]


# --- keys that a query sees ---


@given(sequence=st.integers(1, 60), window=st.one_of(st.none(), st.integers(1, 80)))
def test_attended_keys_are_counted_one_by_one(sequence, window):
    seen = [min(q + 1, window or q + 1) for q in range(sequence)]
    assert float(attended(sequence, window)) == pytest.approx(sum(seen) / sequence, rel=1e-12)
    assert attended(sequence, window, causal=False) == sequence


# --- a dense layer ---


def test_products_of_a_dense_layer():
    """(m, k) x (k, n): 2 m k n FLOP and the bytes of three bf16 matrices; backward one product for each operand.

    The weight gradient is added to the fp32 main gradient: read and written, 8 bytes an element.
    """
    block = layer(DENSE, False)
    shapes = {"attn.qkv": (S, H, 8 * 16), "attn.out": (S, 64, H), "mlp.up": (S, H, 2 * 96), "mlp.down": (S, 96, H)}
    for name, (m, k, n) in shapes.items():
        there, dgrad, wgrad = only(block.forward, name), only(block.backward, name, grad="input"), only(block.backward, name, grad="weight")
        assert (there.m, there.k, there.n) == (m, k, n)
        assert (dgrad.m, dgrad.k, dgrad.n) == (m, n, k)
        assert (wgrad.m, wgrad.k, wgrad.n) == (k, m, n)
        assert there.flop == dgrad.flop == wgrad.flop == 2 * m * k * n
        assert there.bytes == dgrad.bytes == 2 * (m * k + k * n + m * n)
        assert wgrad.bytes == 2 * (m * k + m * n) + 8 * k * n


def test_core_attention():
    """Scores and values over the (S + 1)/2 keys of the mask; q, k, v and the output pass through memory once."""
    block = layer(DENSE, False)
    there, back = only(block.forward, "attn.core"), only(block.backward, "attn.core")
    assert there.flop == 2 * S * (S + 1) / 2 * 4 * (16 + 16)
    assert there.bytes == 2 * S * (4 * (16 + 16) + 2 * 2 * 16)
    assert (back.flop, back.bytes) == (2.5 * there.flop, 2.5 * there.bytes)
    assert ATTENTION_BACKWARD_FLOP == 2.5


def test_backward_in_8_bits_skips_no_keys_of_a_window():
    model = DENSE.model_copy(update={"windows": (8,) * DENSE.layers})
    (there, back), (low, low_back) = (
        (only(block.forward, "attn.core"), only(block.backward, "attn.core"))
        for block in (layer(model, False, kernels=Kernels(attention=kind)) for kind in ("flash", "flash_fp8"))
    )
    assert low.flop == there.flop
    assert back.flop == ATTENTION_BACKWARD_FLOP * there.flop
    assert low_back.flop == ATTENTION_BACKWARD_FLOP * there.flop * attended(S, None) / attended(S, 8)


def test_streaming_kernels():
    """Rows read and written: a norm 1 + 1 and 2 + 1, a residual 2 + 1 each way, SwiGLU 2 + 1 and 3 + 2, rotary q and k."""
    block, row = layer(DENSE, False), 2 * S * H
    for name in ("attn.norm", "mlp.norm"):
        assert (only(block.forward, name).bytes, only(block.backward, name).bytes) == (2 * row, 3 * row)
    assert [op.bytes for s in block.forward + block.backward for op in s if op.name.endswith("residual")] == [3 * row] * 4
    act = 2 * S * 96
    assert (only(block.forward, "mlp.activation").bytes, only(block.backward, "mlp.activation").bytes) == (3 * act, 5 * act)
    assert only(block.forward, "attn.rotary").bytes == 2 * 2 * S * (4 + 2) * 16


def test_tensor_parallel_collectives():
    """Sequence parallel: gather before and scatter after attention and MLP, mirrored backward, and the inputs gathered again."""
    block, size = layer(DENSE, False, tp=2), 2.0 * S * H
    assert collectives(block.forward, "tp") == [("all_gather", size), ("reduce_scatter", size)] * 2
    mirrored = [
        ("all_gather", size),
        ("all_gather", size),
        ("reduce_scatter", size),
    ]  # of the output; of the input, for its weights; of its gradient
    assert collectives(block.backward, "tp") == mirrored * 2
    assert only(block.forward, "attn.qkv").n == 4 * 16
    assert only(block.forward, "attn.norm").bytes == 2 * 2 * S * H / 2


def test_tensor_parallel_without_sequence_parallel():
    block, size = layer(DENSE, False, tp=2, sequence_parallel=False), 2.0 * S * H
    assert collectives(block.forward, "tp") == [("all_reduce", size)] * 2
    assert collectives(block.backward, "tp") == [("all_reduce", size)] * 2
    assert only(block.forward, "attn.norm").bytes == 2 * 2 * S * H


def test_tensor_parallel_beside_gradients_or_not():
    """The same operations; beside the gradients of the column-parallel products, or one after the other."""
    together, apart = (layer(DENSE, False, tp=2, overlap=Overlap(tp=tp)) for tp in (True, False))
    assert together.forward == apart.forward
    assert sum(len(s) > 1 and any(op.axis == "tp" for op in s) for s in together.backward) == 4
    assert not any(len(s) > 1 and any(op.axis == "tp" for op in s) for s in apart.backward)
    assert [replace(op, behind=()) for s in together.backward for op in s] == [op for s in apart.backward for op in s]


@pytest.mark.parametrize("size", [64, 8192])  # of the products: the collective is longer, or shorter
def test_a_product_whose_blocks_a_collective_displaces(size):
    """On H100 it takes as much longer as the collective talks, at most twice as long; on Blackwell other blocks take over."""
    plan = Plan(tp=4, dp_shard=1)
    gather = Op("talk", "all_gather", bytes=8192.0 * 8192, axis="tp", ahead=True)
    product = gemm("up", 8192.0, 4096.0, float(size), "bf16", 2.0, "input")
    behind = replace(product, behind=(gather,))
    alone, talk, both = (float(op_s(op, DENSE, plan, H100)) for op in (product, gather, behind))
    assert (talk < alone) == (size == 8192)
    assert both == pytest.approx(alone + min(alone, talk), rel=1e-12)
    unplaced = H100.model_copy(update={"accelerator": H100.accelerator.model_copy(update={"displaced_product": None})})
    assert float(op_s(behind, DENSE, plan, unplaced)) == alone


def test_products_stand_behind_the_collectives_beside_them():
    """Both gradients of the two column-parallel products do; torn apart, and where recipes tune both together, none does."""

    def behind(block, kind):
        return [(op.name, op.grad, *(o.kind for o in op.behind)) for s in passes(block, kind) for op in s if op.behind]

    together, pieces = (layer(DENSE, False, tp=2, overlap=Overlap(tp=tp)) for tp in (True, "pieces"))
    expected = [(name, *how) for name in ("mlp.up", "attn.qkv") for how in (("input", "all_gather"), ("weight", "reduce_scatter"))]
    assert behind(together, "B") == expected
    assert not behind(together, "F") + behind(together, "I") + behind(together, "W") + behind(pieces, "B")


def test_gathered_parameters_halve_the_speed_of_products_that_they_displace():
    """All the time beside them: twice as long on H100, 1 + 16 / 132 elsewhere."""
    h100 = H100.accelerator
    talks = {"dp": (10.0, 10.0 * 16 / 132, 0.0)}
    assert float(Beside(displaced_s=1.0, talks=talks).slowdown(h100)) == pytest.approx(2.0, rel=1e-12)
    assert float(Beside(products_s=1.0, talks=talks).slowdown(h100)) == pytest.approx(1 / (1 - 16 / 132), rel=1e-12)
    assert float(Beside(displaced_s=1.0, talks={"tp": talks["dp"]}).slowdown(h100)) == pytest.approx(1 / (1 - 16 / 132), rel=1e-12)


def test_tensor_parallel_in_pieces():
    """The same FLOP and bytes on the wire; rows come and go beside the products, whose pieces read their weights anew."""
    whole, pieces = (layer(DENSE, False, tp=4, overlap=Overlap(tp=tp)) for tp in (True, "pieces"))
    for direction in ("forward", "backward"):
        segments, before = (getattr(block, direction) for block in (pieces, whole))
        flop = [sum(op.flop for s in own for op in s) for own in (segments, before)]
        assert flop[0] == pytest.approx(flop[1], rel=1e-12)
        sent = [sum(op.bytes for s in own for op in s if op.axis == "tp") for own in (segments, before)]
        assert sent[0] == pytest.approx(sent[1], rel=1e-12)
    alone = [op for s in pieces.forward for op in s if op.axis == "tp" and len(s) == 1]
    assert [(op.name, op.kind, op.bytes) for op in alone] == [  # of the sums the last of four pieces
        ("attn.scatter", "reduce_scatter", 2.0 * S * H / 4), ("mlp.scatter", "reduce_scatter", 2.0 * S * H / 4)
    ]  # fmt: skip
    assert not [op for s in pieces.backward for op in s if op.axis == "tp" and len(s) == 1]
    rest, last = (op for s in pieces.forward for op in s if op.name == "attn.qkv")
    weights = 2.0 * H * last.n
    assert (rest.m, rest.turns, last.m, last.turns) == (S / 4, 3, S / 4, 1)
    assert rest.bytes == 3 * last.bytes == 3 * (weights + 2.0 * S / 4 * (H + last.n))


def test_blocks_with_scales_of_their_own_are_gathered_for_each_product():
    """MXFP8: gradients of outputs go by rows and by columns; in pieces, scales of a byte per 32 elements go ahead of every gather."""

    def gathers(how, block, way):
        precision = Precision(gemm="fp8", block=block)
        segments = getattr(layer(DENSE, False, tp=4, overlap=Overlap(tp=how), precision=precision), way)
        return [(op.name, float(op.bytes), len(s)) for s in segments for op in s if op.kind == "all_gather" and op.axis == "tp"]

    rows = S * H * ELEMENT_BYTES["fp8"]
    assert gathers(True, 32, "forward") == gathers(True, 0, "forward")
    assert [size for _, size, _ in gathers(True, 0, "backward")] == [rows] * 4
    assert [size for _, size, _ in gathers(True, 32, "backward")] == [2 * rows, rows] * 2
    assert [found for found in gathers("pieces", 32, "forward") if "scales" not in found[0]] == gathers("pieces", 0, "forward")
    scales = [found for way in ("forward", "backward") for found in gathers("pieces", 32, way) if "scales" in found[0]]
    assert scales == [(f"{part}.scales", S * H / 32, 1) for part in ("attn", "mlp", *["mlp"] * 3, *["attn"] * 3)]
    assert not any("scales" in name for name, _, _ in gathers("pieces", 0, "backward"))


@pytest.mark.parametrize("size", [64, 8192])  # of the products: the collective is longer, or shorter
def test_pieces_take_as_long_as_their_formulas(size):
    """Arriving: max(p g, (p - 1) c + g); leaving: g + (p - 1) max(g, c) + c, where p pieces side by side take p g."""
    plan, rows = Plan(tp=4, dp_shard=1, overlap=Overlap(tp="pieces", collective_multiprocessors=0.0)), 8192.0

    def seconds(op):
        return float(op_s(op, DENSE, plan, H100))

    def product(part):
        return gemm("up", part, 4096.0, float(size), "bf16", 2.0)

    gather, scatter = (Op("talk", kind, bytes=rows * 8192, axis="tp") for kind in ("all_gather", "reduce_scatter"))
    g, whole = seconds(replace(product(rows / 4), streams=4.0)), seconds(gather)
    assert (g * 3 > whole) == (size == 8192)
    arrives = float(Known(DENSE, plan, H100).segments_s(arriving(product, rows, gather, 4.0)))
    assert arrives == pytest.approx(max(4 * g, whole + g), rel=1e-12)
    others, last = (seconds(replace(scatter, bytes=scatter.bytes * share)) for share in (3 / 4, 1 / 4))
    leaves = float(Known(DENSE, plan, H100).segments_s(leaving(product, rows, scatter, 4.0)))
    assert leaves == pytest.approx(g + max(3 * g, others) + last, rel=1e-12)


def test_tensor_parallel_of_pytorch():
    """One gather for all products of an input, none again: 4 collectives forward and backward, 2 gathers more when they are not kept.

    As torchtitan issue 1369 counts them on a layer with embedding and head: 12.
    """
    plan = {"tp": 4, "kernels": Kernels(gate="separate")}

    def talks(how, direction, **more):
        block = layer(DENSE, False, overlap=Overlap(tp=how), **plan, **more)
        return [op for segment in getattr(block, direction) for op in segment if op.axis == "tp"]

    assert [len(talks("torch", way)) for way in ("forward", "backward")] == [4, 4]
    by_operation = {"recompute": "selective", "recompute_modules": EVERY_OTHER_PRODUCT}
    assert [op.kind for op in talks("torch", "backward", **by_operation) if op.grad == "again"] == ["all_gather"] * 2
    kept, again = (layer(DENSE, False, overlap=Overlap(tp=how), **plan).saved_bytes for how in ("torch", False))
    assert kept - again == pytest.approx(2 * 2.0 * S * H, rel=1e-12)  # the gathered rows of both parts
    for way in ("forward", "backward"):
        sent = {how: sum(float(op.bytes) for op in talks(how, way)) for how in ("torch", "torch_async")}
        assert sent["torch_async"] == pytest.approx(sent["torch"], rel=1e-12)
    ops = [op for segment in layer(DENSE, False, overlap=Overlap(tp="torch"), **plan).forward for op in segment]
    assert [float(op.bytes) for op in ops if op.name.endswith(".copy")] == [2 * 2.0 * S * H] * 4
    laid_out = layer(DENSE, False, overlap=Overlap(tp="kept"), **plan)  # the same without these copies
    assert [op.name for segment in laid_out.forward for op in segment] == [op.name for op in ops if not op.name.endswith(".copy")]
    assert laid_out.saved_bytes == kept
    together = layer(DENSE, False, overlap=Overlap(tp="torch_async"), **plan)
    beside = [op.kind for s in (*together.forward, *together.backward) for op in s if op.axis == "tp" and len(s) > 1]
    assert beside == ["all_gather", "reduce_scatter"] * 2 + ["all_gather"] * 2  # no sum of gradients


def test_streams_fill_the_tails_of_each_other():
    """Tiles of pieces side by side share their waves: together as fast as the whole, where one after the other is slower."""
    plan, whole = Plan(tp=8, dp_shard=1), gemm("up", 4096.0, 18432.0, 3072.0, "bf16", 2.0)
    one = gemm("up", 512.0, 18432.0, 3072.0, "bf16", 2.0)  # 48 tiles for 132 multiprocessors
    alone, beside, together = (float(op_s(op, DENSE, plan, H100)) for op in (one, replace(one, streams=8.0), whole))
    assert 8 * beside == pytest.approx(together, rel=1e-12)
    assert 8 * alone > 1.2 * together


def test_pieces_of_one_rank_are_the_whole():
    whole, pieces = (layer(DENSE, False, overlap=Overlap(tp=tp)) for tp in (True, "pieces"))
    known = Known(DENSE, Plan(dp_shard=1), H100)
    for direction in ("forward", "backward"):
        cut, uncut = (float(known.segments_s(getattr(block, direction))) for block in (pieces, whole))
        assert cut == pytest.approx(uncut)


@pytest.mark.parametrize("tp", [True, "pieces"])
def test_narrow_rows_are_cast_before_they_are_gathered(tp):
    """Gathers carry what is multiplied, sums 16 bits; each rank casts its own rows; behind the gather they are laid out by columns."""
    wide, narrow, late = (
        layer(DENSE, False, tp=4, overlap=Overlap(tp=tp), precision=precision)
        for precision in (Precision(), Precision(gemm="fp8"), Precision(gemm="fp8", gather="bf16"))
    )

    def moved(block, kind):
        return sum(op.bytes for s in (*block.forward, *block.backward) for op in s if (op.kind, op.axis) == (kind, "tp"))

    def cast(block):
        return [sum(op.bytes for s in p for op in s if (op.name, op.grad) == ("attn.qkv.cast", grad)) for p, grad in passes(block)]

    def passes(block):
        return (block.forward, ""), (block.backward, "weight")

    assert moved(narrow, "all_gather") == pytest.approx(moved(wide, "all_gather") * ELEMENT_BYTES["fp8"] / 2, rel=1e-12)
    assert moved(late, "all_gather") == moved(wide, "all_gather")
    assert moved(narrow, "reduce_scatter") == moved(late, "reduce_scatter") == moved(wide, "reduce_scatter")
    e = ELEMENT_BYTES["fp8"]
    assert cast(narrow) == [S / 4 * H * (2 + e), S * H * 2 * e]
    assert cast(late) == [S * H * (2 + 2 * e), 0]


def test_rows_that_other_ranks_gather_are_laid_out_where_they_arrive():
    """Gradients of a row-parallel output, as inputs of a column-parallel product; scales of blocks come with both layouts instead."""
    scaled, blocked = (layer(DENSE, False, tp=4, precision=Precision(gemm="fp8", block=block)) for block in (0, 32))
    e = ELEMENT_BYTES["fp8"]

    def cast(block, grad):
        return sum(op.bytes for s in block.backward for op in s if (op.name, op.grad) == ("attn.out.cast", grad))

    assert [cast(scaled, grad) for grad in ("input", "weight")] == [S / 4 * H * (2 + e), S * H * 2 * e]
    assert [cast(blocked, grad) for grad in ("input", "weight")] == [S / 4 * H * (2 + 2 * e), 0]


def test_pieces_need_rows_of_their_own():
    with pytest.raises(ProfileError, match="write sequence_parallel: true"):
        Plan(tp=2, sequence_parallel=False, overlap=Overlap(tp="pieces"))


def test_context_parallel_ring():
    """Each rank keeps half of the tokens, works on half of the scores, and sees all keys and values pass by beside it."""
    whole, half = layer(DENSE, False), layer(DENSE, False, cp=2)
    assert only(half.forward, "attn.core").flop == only(whole.forward, "attn.core").flop / 2
    assert collectives(half.forward, "cp") == [("all_gather", 2.0 * S * 2 * 2 * 16)]
    assert collectives(half.backward, "cp") == [("all_gather", 2 * 2.0 * S * 2 * 2 * 16)]
    (segment,) = [s for s in half.forward if any(op.axis == "cp" for op in s)]
    assert {op.kind for op in segment} == {"attention", "all_gather"}


def test_context_parallel_all_gather():
    """Keys and values are gathered before attention, whose one kernel sees them all; their gradients are reduced after it."""
    half = layer(DENSE, False, cp=2, context_parallel="all_gather")
    keys = 2.0 * S * 2 * 2 * 16
    assert collectives(half.forward, "cp") == [("all_gather", keys)]
    assert collectives(half.backward, "cp") == [("all_gather", keys), ("reduce_scatter", keys)]
    assert all(len(segment) == 1 for segment in half.forward + half.backward if any(op.axis == "cp" for op in segment))
    assert only(half.forward, "attn.core").turns == 1
    assert "attn.ring.merge" not in {op.name for segment in half.forward for op in segment}


def test_context_parallel_all_to_all():
    """Rows are traded for heads before attention, whose one kernel sees all keys, and heads for rows after it; so are gradients."""
    whole, half = layer(DENSE, False), layer(DENSE, False, cp=2, context_parallel="all_to_all")
    rows = S / 2
    inputs, output = 2.0 * rows * (4 + 2 * 2) * 16, 2.0 * rows * 4 * 16
    assert collectives(half.forward, "cp") == [("all_to_all", inputs), ("all_to_all", output)]
    assert collectives(half.backward, "cp") == [("all_to_all", output), ("all_to_all", inputs)]
    assert all(len(segment) == 1 for segment in half.forward + half.backward if any(op.axis == "cp" for op in segment))
    assert (only(half.forward, "attn.core").turns, only(half.forward, "attn.core").flop) == (1, only(whole.forward, "attn.core").flop / 2)
    assert only(half.forward, "attn.inputs.copy").bytes == 2 * 2 * inputs
    same = layer(DENSE, False, context_parallel="all_to_all")
    assert only(same.forward, "attn.inputs.copy").bytes == 0


# --- a mixture of experts ---


def test_products_of_a_moe_layer():
    block = layer(MOE, True)
    rows = S * 2 / 8  # per expert
    for name, (k, n) in {"moe.up": (H, 2 * 24), "moe.down": (24, H)}.items():
        op = only(block.forward, name)
        assert (op.kind, op.m, op.k, op.n, op.groups) == ("grouped_gemm", rows, k, n, 8)
        assert op.flop == 2 * S * 2 * k * n
        assert op.bytes == 8 * 2 * (rows * k + k * n + rows * n)
    assert (only(block.forward, "router").n, only(block.forward, "shared.up").n) == (8, 2 * 40)
    assert block.expert_parameters == 8 * 3 * H * 24


@pytest.mark.parametrize(("ep", "etp"), [(2, 1), (1, 2), (4, 2)])
def test_expert_and_expert_tensor_parallel(ep, etp):
    """ep divides the experts and sends each rank the tokens of ep ranks; etp divides the width and gathers the tokens of etp ranks."""
    block = layer(MOE, True, ep=ep, etp=etp)
    op = only(block.forward, "moe.up")
    assert (op.groups, op.n) == (8 / ep, 2 * 24 / etp)
    assert op.m == S * 2 * etp / (8 / ep)
    assert block.expert_parameters == 8 / ep * 3 * H * 24 / etp
    copies = 2.0 * S * 2 * H
    assert collectives(block.forward, "etp") == [("all_gather", etp * copies), ("reduce_scatter", etp * copies)]
    assert collectives(block.backward, "etp") == [("all_gather", etp * copies), ("reduce_scatter", etp * copies)]


def test_dispatch_and_combine_precision():
    """To the experts go activations forward and gradients backward, in dispatch precision; back from them, in combine precision.

    DeepSeek-V3 technical report, section 3.3.3: both dispatches FP8 (with a scale per 128), both combines BF16.
    """
    block = layer(MOE, True, ep=2, precision=Precision(dispatch="fp8", combine="bf16"))
    fp8, bf16 = S * H * (1 + 4 / 128), S * H * 2.0
    assert collectives(block.forward, "ep") == [("all_to_all", fp8), ("all_to_all", bf16)]
    assert collectives(block.backward, "ep") == [("all_to_all", fp8), ("all_to_all", bf16)]
    assert [op.name for s in block.backward for op in s if op.axis == "ep"] == ["moe.combine", "moe.dispatch"]


def test_moe_with_tensor_parallel_routes_its_part_of_the_sequence():
    block = layer(MOE, True, tp=2, ep=2)
    assert only(block.forward, "router").m == S / 2
    assert collectives(block.forward, "ep") == [("all_to_all", 2.0 * S / 2 * H)] * 2
    assert only(block.forward, "moe.up").m == S / 2 * 2 / 4
    assert only(block.forward, "shared.up").n == 2 * 40 / 2


# --- latent attention ---


def test_products_of_latent_attention():
    """Down-projections on the split sequence, up-projections on all of it and a part of the heads."""
    block = layer(MLA, False, tp=2)
    shapes = {
        "attn.q_down": (S / 2, H, 24),
        "attn.kv_down": (S / 2, H, 16 + 4),
        "attn.q_up": (S, 24, 2 * 12),
        "attn.kv_up": (S, 16, 2 * (8 + 12)),
        "attn.out": (S, 2 * 12, H),
    }
    for name, (m, k, n) in shapes.items():
        op = only(block.forward, name)
        assert (op.m, op.k, op.n, op.flop) == (m, k, n, 2 * m * k * n)
    assert only(block.forward, "attn.core").flop == 2 * S * (S + 1) / 2 * 2 * (12 + 12)
    assert collectives(block.forward, "tp")[0] == ("all_gather", 2.0 * S * (24 + 16 + 4))


# --- embedding, head, low precision ---


def test_embedding_and_head():
    plan = Plan(tp=2, dp_shard=1)
    first, last = embedding(DENSE, plan, JOB), head(DENSE, plan, JOB)
    assert (first.dense_parameters, last.dense_parameters) == (128 * H / 2, 128 * H / 2 + H)
    assert collectives(first.forward, "tp") == [("reduce_scatter", 2.0 * S * H)]
    assert only(last.forward, "head.logits").flop == 2 * S * H * 64
    assert last.saved_bytes == 2 * S / 2 * H * 2 + S * 64 * 4


def test_tied_head_has_no_matrix_of_its_own():
    tied = DENSE.model_copy(update={"tied_embeddings": True})
    assert head(tied, Plan(dp_shard=1), JOB).dense_parameters == H


def test_fp8_layers():
    """Inputs and gradients are read once and written along both axes; nothing is left for the weights' gradient, which launches nothing.

    Each element carries a scale per 128; head and router stay bf16.
    """
    plan = Plan(dp_shard=1, precision=Precision(gemm="fp8"))
    block, e = transformer_layer(MOE, MOE.kinds[1], plan, JOB), 1 + 4 / 128
    op = only(block.forward, "attn.qkv")
    assert (op.dtype, op.bytes) == ("fp8", e * (S * H + H * 128) + 2 * S * 128)
    assert only(block.forward, "attn.qkv.cast").bytes == S * H * (2 + 2 * e)
    assert only(block.backward, "attn.qkv.cast", grad="input").bytes == S * 128 * (2 + 2 * e)
    again = only(block.backward, "attn.qkv.cast", grad="weight")
    assert (again.bytes, again.launches) == (0, 0)
    assert only(block.forward, "router").dtype == only(head(MOE, plan, JOB).forward, "head.logits").dtype == "bf16"


def test_output_projection_in_8_bits():
    """Its input and the gradient of its logits are cast as a layer's are, by rows and along columns."""
    block, e, vocab = head(DENSE, Plan(dp_shard=1, precision=Precision(gemm="fp8", head="fp8")), JOB), 1 + 4 / 128, 128
    assert only(block.forward, "head.logits").dtype == "fp8"
    assert only(block.forward, "head.logits.cast").bytes == S * H * (2 + 2 * e)
    assert only(block.backward, "head.logits.cast", grad="input").bytes == S * vocab * (2 + 2 * e)
    plain = head(DENSE, Plan(dp_shard=1, precision=Precision(gemm="fp8")), JOB)
    assert only(block.forward, "head.loss").bytes == only(plain.forward, "head.loss").bytes  # logits stay in 16 bits


def test_one_layout_of_a_tensor_is_enough_where_the_matrix_units_take_either():
    e = ELEMENT_BYTES["fp8"]
    block = layer(DENSE, False, precision=Precision(gemm="fp8", layouts=1))
    assert only(block.forward, "attn.qkv.cast").bytes == S * H * (2 + e)
    assert only(block.backward, "attn.qkv.cast", grad="input").bytes == S * 128 * (2 + e)


def test_a_scale_for_the_tensor_as_it_is_costs_a_pass_for_its_maximum():
    """Four kernels: the maximum cleared and found, its scale, the cast. All but the first, and those of experts, are launched by C++."""
    e = ELEMENT_BYTES["fp8"]
    known, current = (layer(MOE, True, precision=Precision(gemm="fp8"), framework={"casts": c}) for c in ("transformer_engine", "current"))
    for name, groups, one in (("attn.qkv.cast", 1, 1.0), ("moe.up.cast", EXPERTS.count, 0.0)):
        before, after = only(known.forward, name), only(current.forward, name)
        assert after.bytes / before.bytes == pytest.approx((4 + 2 * e) / (2 + 2 * e))
        assert after.launches == pytest.approx(1 + (4 * groups - one) * 0.12)
        assert after.kernels == 4 * groups  # on the device, however they were launched
    assert only(known.forward, "attn.qkv.cast").launches == 1


def test_the_host_launches_tensor_parallel_collectives_too():
    """Forward two gathers and two reduce-scatters, backward as many and two gathers more; in pieces the products' calls start them."""
    for tp, how, expected in ((1, True, (0, 0)), (2, True, (4, 6)), (2, "pieces", (0, 0))):
        block = layer(DENSE, False, tp=tp, overlap=Overlap(tp=how))
        for segments, count in zip((block.forward, block.backward), expected, strict=True):
            kernels = tuple(tuple(op for op in segment if op.axis != "tp") for segment in segments)
            assert float(launched(segments, Kernels()) - launched(kernels, Kernels())) == pytest.approx(count)


def test_gradients_of_what_gate_and_up_projection_read_are_summed():
    """By PyTorch's engine, over all rows of the tensor-parallel group; a joint projection and a compiler have no such kernel."""
    eager = {"tp": 2, "overlap": Overlap(tp=False), "sequence_parallel": False}
    block = layer(DENSE, False, kernels=Kernels(gate="separate", accumulation="separate"), **eager)
    assert only(block.backward, "mlp.input").bytes == 3 * S * H * 2
    for kernels in (Kernels(accumulation="separate"), Kernels(gate="separate")):
        assert not [op for s in layer(DENSE, False, kernels=kernels, **eager).backward for op in s if op.name == "mlp.input"]


def test_grouped_queries_are_copied_out_of_the_joint_projection():
    """Four heads of 16, two keys: S x 64 elements copied; joined backward are S x 128. One key per query needs no copy."""
    split = only(layer(DENSE, False).forward, "attn.split"), only(layer(DENSE, False).backward, "attn.split")
    assert (split[0].addressed, split[0].launches, split[1].bytes) == (S * 64, 1, 2 * S * 128 * 2)
    alone = only(layer(DENSE.model_copy(update={"kv_heads": 4}), False).forward, "attn.split")
    assert (alone.addressed, alone.launches) == (0, 0)


def test_rotary_embedding_with_a_factor_is_not_fused():
    """Megatron's own: rows of 6 heads of 16; 5 and 7 passes, 3.9 times every element one by one."""
    scaled = layer(DENSE.model_copy(update={"scaled_rotary": True}), False)
    there, back = only(scaled.forward, "attn.rotary"), only(scaled.backward, "attn.rotary")
    assert (there.bytes, back.bytes) == (5 * S * 96 * 2, 7 * S * 96 * 2)
    assert there.addressed == back.addressed == pytest.approx(3.9 * S * 96)
    assert only(layer(DENSE, False).forward, "attn.rotary").addressed == 0


def test_latent_rotary_embedding_that_no_kernel_fuses():
    """4 heads: of 4 + 8 elements of a query 4 turn, at 5.3 places each; 2 x 12 are joined, 12 values copied; backward 12 + 20 joined."""
    block = layer(MLA, False, kernels=Kernels(latent_rotary="eager"))
    there, back, rows = only(block.forward, "attn.rotary"), only(block.backward, "attn.rotary"), S * 4
    assert (there.bytes, back.bytes) == (5 * rows * 4 * 2, 7 * rows * 4 * 2)
    assert there.addressed == pytest.approx(rows * (4 * 5.3 + 1.4 * 2 * 12 + 12))
    assert back.addressed == pytest.approx(rows * (4 * 5.3 + 1.4 * (12 + 20) + 4))
    assert only(layer(MLA, False).forward, "attn.rotary").addressed == 0


def test_experts_that_clamp_handle_halves_of_rows_element_by_element():
    """Up-projection and gate of every copy: two clamps and their join; three comparisons, two selections, the join of gradients."""
    clamped = MOE.model_copy(update={"clamped": True})
    there, back = (only(b, "moe.clamp") for b in (layer(clamped, True).forward, layer(clamped, True).backward))
    each = S * EXPERTS.top_k * 2 * EXPERTS.ffn
    assert (there.addressed, there.bytes, there.launches) == (each, 4 * each, 3)
    assert (back.addressed, back.bytes, back.launches) == (2.5 * each, 5.5 * each, 7)
    assert layer(clamped, True).saved_bytes - layer(MOE, True).saved_bytes == 2 * each  # what is joined
    for other in (layer(MOE, True), layer(clamped, True, kernels=Kernels(experts="fused"))):
        assert not any(op.name == "moe.clamp" for segment in other.forward for op in segment)


def test_latent_rotary_embedding_takes_about_what_is_published():
    """torchtitan's own, 16 sequences of 4,096, 128 heads, on GB300: 19.2 and 15.6 ms (its pull request 4134); 21 and 22 here."""
    model, plan = MODELS.load("deepseek-v3"), Plan(dp_shard=1, micro_batch=16, kernels=Kernels(latent_rotary="eager"))
    block = transformer_layer(model, model.kinds[0], plan, Job(tokens=65536, global_batch=16, sequence_length=4096))
    gb300 = ACCELERATORS.load("gb300-288")
    there, back = (only(segments, "attn.rotary") for segments in (block.forward, block.backward))
    times = [1e3 * float(memory_s(op.bytes, gb300, op.launches, addressed=op.addressed)) for op in (there, back)]
    assert times == pytest.approx([21.3, 22.3], abs=0.3)


def test_experts_probabilities_have_a_gradient_of_their_own():
    """Backward 9.5 instead of 5 times the output of the activation; fused, or sequential with the probabilities elsewhere, none."""
    rows = S * EXPERTS.top_k
    grouped, sequential = (
        only(layer(MOE, True, kernels=Kernels(experts=how)).backward, "moe.activation") for how in ("grouped", "sequential")
    )
    assert (grouped.bytes, grouped.launches) == (9.5 * rows * EXPERTS.ffn * 2, 2)
    assert (sequential.bytes, sequential.launches) == (5 * rows * EXPERTS.ffn * 2, 1)


@pytest.mark.parametrize(
    ("casts", "there", "ahead", "again"),
    [
        # the maximum and the cast of the input, of the gradient, of the weight; the last without its maximum; the input again
        ("tensorwise", (4, 4), (4, 2, 0), (2, 0)),
        # casts that find their own maximum; along the columns behind a transposed copy; gradients scaled by a kernel of their own
        ("rowwise", (2, 2), (6, 6, 4), (6, 4)),
    ],
)
def test_torchaos_casts(casts, there, ahead, again):
    """Weights are cast for every pass, unless ZeRO gathers them in FP8."""
    e, weight = ELEMENT_BYTES["fp8"], H * 128

    def moved(**precision) -> list[float]:
        block = layer(DENSE, False, zero=3, precision={"gemm": "fp8"} | precision, framework={"casts": casts})
        backward = (only(block.backward, "attn.qkv.cast", grad=grad).bytes for grad in ("input", "weight"))
        return [only(block.forward, "attn.qkv.cast").bytes, *backward]

    whole, gathered = moved(), moved(parameter_gather="fp8")
    assert gathered[0] == S * H * (there[0] + e)
    assert whole[0] - gathered[0] == weight * (there[1] + e)
    assert gathered[1] == S * 128 * (ahead[0] + 2 * e) + S * H * ahead[2]
    assert whole[1] - gathered[1] == weight * (ahead[1] + e)
    assert gathered[2] == S * H * (again[0] + e)
    assert whole[2] - gathered[2] == weight * again[1]


# --- columns of plans ---

DEGREES = st.fixed_dictionaries(
    {
        "tp": st.sampled_from([1, 2, 4]),
        "cp": st.sampled_from([1, 2]),
        "ep": st.sampled_from([1, 2, 4, 8]),
        "etp": st.sampled_from([1, 2]),
        "dp_replicate": st.sampled_from([1, 2]),
        "dp_shard": st.sampled_from([16, 32]),  # a multiple of etp * ep
        "micro_batch": st.sampled_from([1, 2, 3]),
    }
)
KINDS = st.fixed_dictionaries(
    {
        "zero": st.sampled_from([0, 1, 2, 3]),
        "recompute": st.sampled_from(["none", "selective", "full"]),
        "sequence_parallel": st.booleans(),
        "recompute_share": st.sampled_from([1.0, 0.5]),
        "dispatcher": st.sampled_from(["alltoall", "deepep", "hybridep"]),
        "precision": st.sampled_from([Precision(), Precision(gemm="fp8", dispatch="fp8")]),
        "overlap": st.builds(Overlap, tp=st.sampled_from([False, True, "pieces", "torch", "torch_async"]), by_tensor=st.booleans()),
    }
).filter(lambda kinds: kinds["sequence_parallel"] or isinstance(kinds["overlap"].tp, bool))


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(DEGREES, min_size=1, max_size=5), kinds=KINDS, model=st.sampled_from([DENSE, MOE, MLA]), pp=st.sampled_from([1, 2]))
def test_columns_give_what_plans_give(rows, kinds, model, pp):
    """Blocks, prices and memory of a column of plans are those of its plans, one by one."""
    plans = [Plan(pp=pp, **row, **kinds) for row in rows]
    columns = PlanColumns(**{name: np.array([getattr(p, name) for p in plans]) for name in COLUMNS}, like=plans[0])
    together, apart = blocks(model, columns, JOB), [blocks(model, p, JOB) for p in plans]

    def same(found, expected):
        assert np.broadcast_to(found, len(plans)) == pytest.approx(np.array(expected, dtype=float), rel=1e-12)

    for name, block in together.items():
        each = [b[name] for b in apart]
        for field in ("dense_parameters", "expert_parameters", "saved_bytes", "recompute_bytes"):
            same(getattr(block, field), [getattr(b, field) for b in each])
        for way in ("forward", "backward"):
            for field in ("flop", "bytes", "m", "n", "k", "groups"):
                ops = [[op for s in getattr(b, way) for op in s] for b in (block, *each)]
                assert len({len(o) for o in ops}) == 1
                for op, *alone in zip(*ops, strict=True):
                    same(getattr(op, field), [getattr(o, field) for o in alone])

    priced = price_blocks(together, model, columns, H100)
    for name, price in priced.items():
        alone = [price_blocks({name: b[name]}, model, p, H100)[name] for b, p in zip(apart, plans, strict=True)]
        for field in ("forward_s", "backward_s", "gather_s", "reduce_s"):
            same(getattr(price, field), [getattr(a, field) for a in alone])

    stages = stage_blocks(model, plans[0], JOB)
    held = memory_per_stage(model, columns, JOB, stages, together, 4)
    for i, p in enumerate(plans):
        for part, values in memory_per_stage(model, p, JOB, stages, apart[i], 4).items():
            assert np.broadcast_to(held[part], (len(plans), pp))[i] == pytest.approx(values, rel=1e-12)


@pytest.mark.parametrize("model", [DENSE, MOE, MLA], ids=lambda m: m.name)
def test_a_rank_of_many_never_does_more_than_one_alone(model):
    """Splitting a layer over tp, cp, ep or etp ranks does not add FLOP to any of them, nor bytes in memory."""
    for kind in model.kinds:
        alone = transformer_layer(model, kind, Plan(dp_shard=1), JOB)
        for changes in ({"tp": 2}, {"cp": 2}, {"tp": 2, "cp": 2}):
            part = transformer_layer(model, kind, Plan(dp_shard=1, **changes), JOB)
            for field in ("forward", "backward"):
                assert total(getattr(part, field), lambda op: op.flop) <= total(getattr(alone, field), lambda op: op.flop)
            assert part.saved_bytes < alone.saved_bytes


def test_recompute_that_stops_early_leaves_out_the_last_product_and_what_follows():
    """PyTorch's non-reentrant checkpoint repeats all up to the activation, whose result the down-projection's gradient needs."""
    whole, early = (layer(DENSE, False, tp=2, recompute="full", framework={"stops_early": stops}) for stops in (False, True))
    again = [[op.name for segment in block.backward for op in segment if op.grad == "again"] for block in (whole, early)]
    assert again[0][: len(again[1])] == again[1]
    assert again[0][len(again[1]) :] == ["mlp.down", "mlp.scatter", "residual"]
    assert early.saved_bytes == whole.saved_bytes


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_layer_of_which_a_share_is_computed_again_is_the_average(share):
    """In seconds and in bytes kept; what lives while one is computed again is that of a whole layer."""
    none, part, whole = (layer(MOE, True, recompute=how, recompute_share=s) for how, s in (("none", 1), ("full", share), ("full", 1)))
    seconds = [sum(op_s(op, MOE, Plan(dp_shard=1), H100) for segment in block.backward for op in segment) for block in (none, part, whole)]
    assert seconds[1] == pytest.approx((1 - share) * seconds[0] + share * seconds[2], rel=1e-9)
    assert part.saved_bytes == pytest.approx((1 - share) * none.saved_bytes + share * whole.saved_bytes, rel=1e-12)
    assert part.recompute_bytes == whole.recompute_bytes


def test_modules_that_are_computed_again_stop_early_too():
    """XLA computes no product again whose result no gradient reads: MaxText keeps query, key and value alone."""
    modules = ("layernorm", "core_attn", "attn_out", "mlp", "mlp_act")
    changes = {"recompute": "selective", "recompute_modules": modules}
    whole, early = (layer(DENSE, False, framework={"stops_early": stops}, **changes) for stops in (False, True))
    again = [[op.name for segment in block.backward for op in segment if op.grad == "again"] for block in (whole, early)]
    assert sorted(again[0]) == sorted([*again[1], "mlp.down", "mlp.scatter"])
    assert {"attn.out", "attn.core"} <= set(again[1])
    assert "attn.qkv" not in again[1]
    assert early.saved_bytes == whole.saved_bytes == S * (H + 128) * 2  # the layer's input, then query, key and value
