"""What the kernels of older training stacks cost: bytes and FLOP worked out by hand, and the host that launches them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from simulator.closed_forms import estimate
from simulator.lower_bound import bound
from simulator.pricing.compute import host_wait_s
from simulator.pricing.operations import Known, op_s, wait_s
from simulator.pricing.stage_times import price_blocks
from simulator.scenario.kernels import Kernels
from simulator.scenario.overlap import Overlap
from simulator.scenario.plan import EVERY_OTHER_PRODUCT, Plan, Precision
from simulator.simulate import simulate_step
from simulator.workload.ops import COMPUTE, PLAIN_LAUNCH, Op, awaited, host_wait, reads_back, total
from simulator.workload.stages import blocks
from simulator.workload.step import gradient_ops
from tests.small import dense, job, moe, scenario

MODEL = dense(2, 256)  # 8 heads of 32, 4 of them for keys and values
TOKENS, SEQUENCE, HEADS, WIDTH = 1024, 512, 8, 32


def layer(kernels: Kernels, model=MODEL, **plan):
    micro_batch = plan.pop("micro_batch", 2)
    return blocks(model, Plan(dp_shard=1, micro_batch=micro_batch, kernels=kernels, **plan), job())["layer0"]


def core(segments, what):
    return total(segments, lambda op: what(op) if op.name.startswith("attn.core") else 0.0)


# --- attention with the scores in memory ---


def test_unfused_attention_computes_what_the_mask_hides():
    block = layer(Kernels(attention="unfused"))
    product = 2.0 * TOKENS * SEQUENCE * HEADS * WIDTH
    assert core(block.forward, lambda op: op.flop) == 2 * product
    assert core(block.backward, lambda op: op.flop) == 4 * product


@pytest.mark.parametrize(
    ("attention", "dropout", "there", "back"),
    [("unfused", False, 4, 6), ("unfused", True, 9, 11), ("eager", False, 29, 35), ("eager", True, 34, 40)],
)
def test_softmax_and_dropout_pass_over_the_scores(attention, dropout, there, back):
    """Fused softmax reads and writes a bf16 score, dropout reads and writes it and a mask of one byte."""
    block = layer(Kernels(attention=attention, dropout=dropout))
    scores = TOKENS * SEQUENCE * HEADS
    softmax = lambda op: op.bytes if op.name == "attn.core.softmax" else 0.0  # noqa: E731
    assert (total(block.forward, softmax), total(block.backward, softmax)) == (there * scores, back * scores)


def test_the_fused_softmax_takes_products_by_four():
    """8 heads on four ranks are 2 products per sequence: of one sequence they go the eager way, of two the fused one."""
    softmax = lambda op: op.bytes if op.name == "attn.core.softmax" else 0.0  # noqa: E731
    found = {size: total(layer(Kernels(attention="unfused"), tp=4, micro_batch=size).forward, softmax) for size in (1, 2)}
    scores = SEQUENCE * SEQUENCE * HEADS / 4
    assert found == {1: 29 * scores, 2: 4 * 2 * scores}


def test_a_separate_accumulation_reads_and_adds_every_gradient():
    """It reads the bf16 gradient, reads and writes the fp32 main one; the product then writes 2 bytes instead of reading and writing 4."""
    fused, separate = (layer(Kernels(accumulation=how)) for how in ("fused", "separate"))
    matrices = sum(size for _, size in separate.matrices)
    added = total(separate.backward, lambda op: op.bytes if op.name.endswith(".accumulate") else 0.0)
    assert added == (2 + 4 + 4) * matrices
    assert total(separate.backward, lambda op: op.bytes) == total(fused.backward, lambda op: op.bytes) + (10 - 6) * matrices
    assert separate.forward == fused.forward


def test_a_gate_of_its_own_gathers_its_own_rows():
    """The same FLOP, parameters and saved bytes; of sequence parallelism one more gather forward, gather and reduce-scatter backward."""
    fused, separate = (layer(Kernels(gate=how), tp=4) for how in ("fused", "separate"))
    assert total(separate.forward, lambda op: op.flop) == total(fused.forward, lambda op: op.flop)
    assert (separate.dense_parameters, separate.saved_bytes) == (fused.dense_parameters, fused.saved_bytes)
    talks = lambda segments: sum(op.axis == "tp" for segment in segments for op in segment)  # noqa: E731
    assert (talks(separate.forward), talks(separate.backward)) == (talks(fused.forward) + 1, talks(fused.backward) + 2)


def test_every_other_product_is_computed_again():
    """Output projection and gate, a third of the MLP; the rows of both are gathered again, and attention is not."""
    plan = {"recompute": "selective", "recompute_modules": EVERY_OTHER_PRODUCT, "tp": 4, "overlap": Overlap(tp="torch")}
    block = layer(Kernels(gate="separate"), **plan)
    again = [op for segment in block.backward for op in segment if op.grad == "again"]
    h, products = MODEL.hidden, {op.name: op.flop for op in again if op.kind == "gemm"}
    assert products == {"attn.out": 2 * TOKENS * HEADS * WIDTH / 4 * h, "mlp.gate": 2 * TOKENS * h * MODEL.ffn / 4}
    assert not any(op.kind == "attention" for op in again)
    assert sum(op.kind == "all_gather" for op in again) == 2


def test_gathered_logits_are_seen_by_every_rank():
    model, loss = dense(2, 256), lambda op: op.bytes if op.name == "head.loss" else 0.0
    heads = {
        how: blocks(model, Plan(dp_shard=1, tp=4, framework={"cross_entropy": how}), job())["head"]
        for how in ("vocab_parallel", "gathered")
    }
    eager = blocks(model, Plan(dp_shard=1, framework={"cross_entropy": "eager"}), job())["head"]
    assert total(heads["gathered"].forward, loss) == total(eager.forward, loss)  # whatever tp is
    gathers = [
        op for segment in heads["gathered"].forward for op in segment if op.name == "head.gather" and op.bytes == SEQUENCE * model.vocab * 2
    ]
    assert any(op.kind == "all_gather" and op.listed for op in gathers)
    join = lambda op: op.bytes if op.name == "head.join" else 0.0  # noqa: E731
    moved = [total(segments, join) for segments in (heads["gathered"].forward, heads["gathered"].backward)]
    assert moved == [2 * 2 * SEQUENCE * model.vocab, 2 * 2 * SEQUENCE * model.vocab / 4]
    alone = blocks(model, Plan(dp_shard=1, framework={"cross_entropy": "gathered"}), job())["head"]
    assert total(alone.forward, join) == total(alone.forward, lambda op: op.bytes if op.listed else 0.0) == 0


def test_saved_scores_are_those_of_korthikanti():
    """Equation 1: attention saves 5 a s^2 b bytes more, and selective recompute drops them all."""
    scores = TOKENS * SEQUENCE * HEADS
    with_scores, flash = (layer(Kernels(attention=a, dropout=True)).saved_bytes for a in ("unfused", "flash"))
    assert with_scores - flash == 5 * scores - 4 * TOKENS * HEADS
    kept = [layer(Kernels(attention=a, dropout=True), recompute="selective").saved_bytes for a in ("unfused", "flash")]
    assert kept[0] == kept[1]


def test_older_attention_is_slower_by_its_share():
    s = scenario(MODEL, 4, Plan(micro_batch=64), 1)
    share = s.cluster.accelerator.older_attention
    times = {}
    for name in ("flash", "flash2", "flash1"):
        plan = s.plan.model_copy(update={"kernels": Kernels(attention=name)})
        op = next(op for segment in blocks(s.model, plan, s.job)["layer0"].forward for op in segment if op.kind == "attention")
        times[name] = op_s(op, s.model, plan, s.cluster)
    assert times["flash"] / times["flash2"] == pytest.approx(share["flash2"], rel=1e-12)
    assert times["flash"] / times["flash1"] == pytest.approx(share["flash1"], rel=1e-12)


# --- eager operations ---


def test_eager_operations_move_and_keep_more_bytes():
    eager, fused = (layer(Kernels(norm=k, pointwise=k)) for k in ("eager", "fused"))
    for one, other in ((eager.forward, fused.forward), (eager.backward, fused.backward)):
        assert total(one, lambda op: op.flop) == total(other, lambda op: op.flop)
        assert total(one, lambda op: op.bytes) > 1.5 * total(other, lambda op: op.bytes)
    assert eager.saved_bytes > fused.saved_bytes
    assert eager.dense_parameters == fused.dense_parameters


def test_layer_norm_is_one_kernel_in_pytorch_too():
    model = dense(2, 256, layer_norm=True)
    eager, fused = (layer(Kernels(norm=k), model) for k in ("eager", "fused"))
    assert total(eager.forward, lambda op: op.bytes) == total(fused.forward, lambda op: op.bytes)
    assert total(eager.backward, lambda op: op.bytes) == total(fused.backward, lambda op: op.bytes)


# --- the host ---


@pytest.mark.parametrize(("launches", "meanwhile", "wait"), [(100, 1e-3, 4e-3 - 1e-3), (100, 5e-3, 0.0), (0, 0.0, 0.0)])
def test_host_wait(launches, meanwhile, wait):
    assert host_wait_s(launches, meanwhile, 40e-6) == pytest.approx(wait, abs=1e-15)


def test_an_unknown_host_never_limits():
    assert host_wait_s(1e9, 0.0, None) == 0.0


def test_graphs_take_launches_from_the_host():
    block = layer(Kernels(), moe(2, 256, leading=0))
    launches = {graphs: host_wait(block.forward, Kernels(graphs=graphs)).launches for graphs in ((), ("attn",), ("moe_router",), ("full",))}
    assert launches["full",] == 0
    replay = 2  # the copy of what the graph is given, and itself
    attention = 1 + 2 + 1 + 1 + 1 + 2 + PLAIN_LAUNCH  # norm, two linear layers, split, rotary embedding, attention, residual
    assert launches[()] - launches["attn",] == pytest.approx(attention - replay)
    router = 1 + 2 + 20 * PLAIN_LAUNCH + 2 + 1 + 2  # the norm before it, its product, scores; shared experts: two linear layers, activation
    assert launches[()] - launches["moe_router",] == pytest.approx(router - replay)


def test_a_loop_over_experts_costs_the_host_an_eighth_of_a_launch_each():
    """Eight experts: two products forward, four backward, each 2 launches and 8 times 0.12."""
    block = layer(Kernels(), moe(2, 256, leading=0))
    grouped = lambda op: op.launches if op.kind == "grouped_gemm" else 0.0  # noqa: E731
    assert total(block.forward, grouped) == pytest.approx(2 * (2 + 8 * 0.12), rel=1e-14)
    assert total(block.backward, grouped) == pytest.approx(4 * (2 + 8 * 0.12), rel=1e-14)


# --- experts in one kernel ---


def test_fused_experts_activate_and_cast_in_the_epilogue():
    """In FP8, what remains are casts of the copies and of their gradients, all others arrive in both layouts; FLOP and saved bytes stay."""
    fp8 = Precision(gemm="fp8")
    apart, fused = (layer(Kernels(experts=e), moe(2, 256, leading=0), precision=fp8) for e in ("grouped", "fused"))
    flop = lambda op: op.flop  # noqa: E731
    assert total(fused.forward, flop) == total(apart.forward, flop)
    assert total(fused.backward, flop) == total(apart.backward, flop)
    assert fused.saved_bytes == apart.saved_bytes
    moves = [{op.name for s in b.forward for op in s if op.kind == "memory" and op.bytes} for b in (apart, fused)]
    assert moves[0] - moves[1] == {"moe.activation", "moe.down.cast"}
    left = {(op.name, op.grad) for s in fused.backward for op in s if op.name.startswith("moe") and op.name.endswith("cast") and op.bytes}
    assert left == {("moe.down.cast", "input")}
    assert not any(op.name == "moe.activation" for segment in fused.backward for op in segment)


def test_a_fused_router_launches_a_third_of_the_kernels():
    eager, fused = (layer(Kernels(router=how), moe(2, 256, leading=0)) for how in ("eager", "fused"))
    launches = lambda op: op.launches if op.name == "router.topk" else 0.0  # noqa: E731
    assert [total(b, launches) for b in (eager.forward, eager.backward)] == [20, 15]
    assert [total(b, launches) for b in (fused.forward, fused.backward)] == [9, 5]
    assert total(fused.forward, lambda op: op.bytes) == total(eager.forward, lambda op: op.bytes)


def test_one_product_over_all_experts_is_as_fast_as_a_dense_one():
    s = scenario(moe(2, 256, leading=0), 8, Plan(kernels=Kernels(experts="fused")), 4)
    apart = s.plan.model_copy(update={"kernels": Kernels()})
    op = next(op for segment in blocks(s.model, s.plan, s.job)["layer0"].forward for op in segment if op.kind == "grouped_gemm")
    large = replace(op, flop=1e15, bytes=1e6, m=8192.0, n=8192.0, k=8192.0)
    ratio = float(op_s(large, s.model, s.plan, s.cluster)) / float(op_s(large, s.model, apart, s.cluster))
    assert ratio == pytest.approx(s.cluster.accelerator.grouped_gemm_efficiency * s.cluster.accelerator.in_training["grouped"], rel=0.02)


def host_bound(dispatch_s, graphs=(), **plan):
    return scenario(moe(4, 256, leading=0), 8, Plan(kernels=Kernels(graphs=graphs), **plan), 4, dispatch_s=dispatch_s)


@pytest.mark.parametrize(("dispatcher", "held"), [("alltoall", []), ("deepep", []), ("hybridep", ["moe.dispatch"])])
def test_the_host_launches_beside_all_that_it_does_not_wait_for(dispatcher, held):
    """It reads what a rank gets before it launches the all-to-all, of HybridEP after; the backward repeats those counts."""
    block = blocks(moe(1, 256, leading=0), Plan(ep=4, dp_shard=4, dispatcher=dispatcher), job())["layer0"]
    for segments, apart in ((block.forward, held), (block.backward, [])):
        assert [op.name for at in awaited(segments, Kernels()) for op in segments[at]] == apart
    assert list(reads_back(block.forward, Kernels()).values()) == [bool(held)]
    assert not reads_back(block.backward, Kernels())
    assert not reads_back(block.forward, Kernels(graphs=("full",)))


@pytest.mark.parametrize(
    ("graphs", "replayed"),
    [
        ((), set()),
        (("attn",), set()),
        (("moe_router", "moe_preprocess"), {"moe.norm", "router", "router.topk"}),
        (("attn", "moe_router", "moe_preprocess"), {"attn.qkv", "attn.core", "attn.out", "attn.residual", "moe.norm", "router.topk"}),
        (("full",), set()),
    ],
)
def test_the_host_waits_for_the_graph_whose_counts_it_reads(graphs, replayed):
    """Before the dispatch it reads what the graph that it has just replayed writes; nothing before the last launch, nothing backward."""
    block = blocks(moe(1, 256, leading=0), Plan(ep=4, dp_shard=4, dispatcher="alltoall"), job())["layer0"]
    names = {op.name for at in awaited(block.forward, Kernels(graphs=graphs)) for op in block.forward[at] if op.bytes}
    assert names >= replayed
    assert bool(names) == bool(replayed)
    assert all(Kernels(graphs=graphs).captured(name) for name in names)
    assert not awaited(block.backward, Kernels(graphs=graphs))


def test_a_graph_before_the_dispatch_is_not_beside_the_launches():
    """A layer of a host that is slower than the device takes its launches, and beside none of them the graph of its router."""
    graphs = ("moe_router", "moe_preprocess")
    times = [simulate_step(host_bound(d, graphs, ep=8)).step_time_s for d in (1e-3, 2e-3)]
    s = host_bound(1e-3, graphs, ep=8)
    found = blocks(s.model, s.plan, s.job)
    passes = [p for name in ("embedding", *["layer0"] * 4, "head") for p in (found[name].forward, found[name].backward)]
    launches = sum(float(host_wait(p, s.plan.kernels).launches) for p in passes)
    forward = found["layer0"].forward
    waits = 4 * sum(float(op_s(op, s.model, s.plan, s.cluster)) for at in awaited(forward, s.plan.kernels) for op in forward[at])
    steps = s.job.global_batch // s.plan.dp
    assert times[1] - times[0] == pytest.approx(steps * launches * 1e-3, rel=1e-9)
    assert times[0] - steps * (launches * 1e-3 + waits) < 1e-3  # what remains is the end of the step
    assert times[0] > steps * (launches * 1e-3 + waits)


def test_a_dispatch_that_holds_the_host_is_not_beside_its_launches():
    """A layer of a host that is slower than the device takes its launches, and after them the dispatch."""
    waits, reads = (simulate_step(host_bound(1e-3, ep=8, dispatcher=d)) for d in ("hybridep", "deepep"))
    s = host_bound(1e-3, ep=8, dispatcher="hybridep")
    dispatch = next(op for segment in blocks(s.model, s.plan, s.job)["layer0"].forward for op in segment if op.name == "moe.dispatch")
    passes = 4 * s.job.global_batch // s.plan.dp  # forwards of four layers
    assert waits.step_time_s - reads.step_time_s == pytest.approx(passes * float(op_s(dispatch, s.model, s.plan, s.cluster)), rel=1e-6)


@pytest.mark.parametrize(
    ("holds", "dispatch_s", "wait"),
    [
        (False, 1.0, 0.0),  # 10, 4 and 5 s; it launches the last three kernels while the rows travel
        (True, 1.0, 1.0),  # it reads behind the dispatch: the device waits for the next launch
        (False, 100.0, 391.0),  # four launches, and the kernel that it reads behind: 410 instead of 19
        (True, 100.0, 395.0),  # the dispatch, too
        (True, None, 0.0),
    ],
)
def test_a_host_that_reads_back_has_nothing_launched_ahead(holds, dispatch_s, wait):
    ahead, experts = (Op(name, "gemm", bytes=1.0, launches=launches) for name, launches in (("router", 1.0), ("moe.up", 3.0)))
    dispatch = Op("moe.dispatch", "all_to_all", bytes=1.0, axis="ep", holds=holds)
    seconds = {"router": 10.0, "moe.dispatch": 4.0, "moe.up": 5.0}
    assert wait_s(((ahead,), (dispatch,), (experts,)), lambda op: seconds[op.name], Kernels(), dispatch_s) == wait


def test_a_slow_host_sets_the_pace():
    """A layer that computes in microseconds lasts as long as its launches, forward and backward."""
    s = host_bound(1e-3)
    times = [simulate_step(host_bound(d)).step_time_s for d in (1e-3, 2e-3)]
    found = blocks(s.model, s.plan, s.job)
    passes = [p for name in ("embedding", *["layer0"] * 4, "head") for p in (found[name].forward, found[name].backward)]
    launches = sum(float(host_wait(p, s.plan.kernels).launches) for p in passes)
    assert times[1] - times[0] == pytest.approx(4 * launches * 1e-3, rel=1e-9)


def test_a_pass_lasts_as_long_as_the_longer_of_device_and_host():
    s = host_bound(40e-6)
    forward = tuple(segment for segment in blocks(s.model, s.plan, s.job)["layer0"].forward if not segment[0].axis)
    wait = host_wait(forward, s.plan.kernels)
    both = Known(s.model, s.plan, s.cluster).segments_s((*forward, (wait,)))
    assert both == pytest.approx(max(float(Known(s.model, s.plan, s.cluster).segments_s(forward)), wait.launches * 40e-6), rel=1e-12)


@pytest.mark.parametrize("plan", [{}, {"pp": 2}, {"ep": 8}, {"pp": 2, "vpp": 2, "schedule": "interleaved"}, {"pp": 2, "schedule": "zb-h1"}])
def test_the_three_levels_agree_on_a_slow_host(plan):
    s = host_bound(40e-6, **plan)
    simulated = simulate_step(s).step_time_s
    assert bound(s) <= simulated * (1 + 1e-9)
    assert estimate(s) == pytest.approx(simulated, rel=0.02)


def test_graphs_of_the_whole_iteration_take_the_host_away():
    assert simulate_step(host_bound(1e-3, graphs=("full",))).step_time_s == pytest.approx(simulate_step(host_bound(None)).step_time_s)


def test_the_loss_moves_what_its_kernels_read_and_write():
    """Transformer Engine reads the bf16 logits twice and overwrites them; each step of Megatron's own is a pass over fp32."""
    model, loss = dense(2, 256), lambda op: op.bytes if op.name == "head.loss" else 0.0
    logits = SEQUENCE * model.vocab
    moved = {}
    for how in ("in_place", "fused", "vocab_parallel", "half"):
        head = blocks(model, Plan(dp_shard=1, framework={"cross_entropy": how}), job())["head"]
        moved[how] = tuple(total(segments, loss) / logits for segments in (head.forward, head.backward))
    assert moved == {"in_place": (6, 4), "fused": (26, 14), "vocab_parallel": (38, 14), "half": (8, 12)}


@pytest.mark.parametrize("cp", [1, 2, 8])
def test_ring_attention_puts_its_kernels_together(cp):
    """Kernels see the keys of one rank, and an output of two bytes is set to zero and corrected by every one of them."""
    block = layer(Kernels(), cp=cp)
    ops = {(op.name, op.grad): op for segments in (block.forward, block.backward) for segment in segments for op in segment}
    output = TOKENS / cp * HEADS * WIDTH * 2
    forward, backward = ops["attn.ring.merge", ""].bytes, ops["attn.ring.merge", "input"].bytes
    assert (forward, backward) == ((0, 0) if cp == 1 else ((4 + 2.25 * (cp - 1)) * output, (2 + 2.25 * (cp - 1)) * output))
    attend = ops["attn.core", ""]
    assert attend.turns == 1 + 0.75 * (cp - 1)
    assert attend.flop == 2 * TOKENS / cp * (SEQUENCE + 1) / 2 * HEADS * 2 * WIDTH


def test_pieces_of_a_ring_are_slower_where_few_keys_are():
    s = scenario(MODEL, 4, Plan(micro_batch=64, cp=4), 1)
    attend = next(op for segment in blocks(s.model, s.plan, s.job)["layer0"].forward for op in segment if op.kind == "attention")
    assert op_s(attend, s.model, s.plan, s.cluster) > op_s(replace(attend, turns=1.0), s.model, s.plan, s.cluster)


def test_learned_positions_turn_nothing():
    learned = MODEL.model_copy(update={"positions": SEQUENCE})
    names = [{op.name for segment in layer(Kernels(), model).forward for op in segment} for model in (MODEL, learned)]
    assert names[0] - names[1] == {"attn.rotary"}
    assert layer(Kernels(), learned).saved_bytes == layer(Kernels()).saved_bytes


def test_experts_one_after_the_other_are_dense_products():
    """Megatron's SequentialMLP: a product for each of four experts, launched by the framework; one alone is never grouped."""
    model = moe(2, 256)
    ups = {}
    for how in ("grouped", "sequential"):
        block = blocks(model, Plan(dp_shard=4, ep=2, kernels={"experts": how}), job())["layer1"]
        ups[how] = next(op for segment in block.forward for op in segment if op.name == "moe.up")
    grouped, single = ups["grouped"], ups["sequential"]
    assert (single.flop, single.turns, single.groups) == (grouped.flop, grouped.groups, 1)
    assert single.launches == 2 * grouped.groups
    s = scenario(model, 4, Plan(micro_batch=64, ep=2, kernels={"experts": "sequential"}), 1)
    alone = replace(single, flop=1e15, bytes=1e6, turns=1.0)
    dense_product = replace(alone, kind="gemm")
    assert op_s(alone, model, s.plan, s.cluster) == op_s(dense_product, model, s.plan, s.cluster)


def test_one_host_launches_both_actions_of_a_pair():
    """A pair of a slow host takes the launches of both; where neither action waits for the other, each is hidden beside the device once."""
    table = "0F0 0F1+0B0 0F2+0B1 0B2\n"
    slow, slower, hidden = (
        scenario(moe(4, 256, leading=0), 8, Plan(ep=8, schedule="table", table=table, micro_batch=2), 3, dispatch_s=d)
        for d in (1e-3, 2e-3, 1e-9)
    )
    found = blocks(slow.model, slow.plan, slow.job)
    passes = [p for name in ("embedding", *["layer0"] * 4, "head") for p in (found[name].forward, found[name].backward)]
    launches = sum(float(host_wait(p, Kernels()).launches) for p in passes)
    times = [simulate_step(s).step_time_s for s in (slow, slower, hidden)]
    assert times[1] - times[0] == pytest.approx(3 * launches * 1e-3, rel=1e-9)
    assert 0 < times[0] - 3 * launches * 1e-3 < times[2]  # what remains is the end of the step
    for s, step in zip((slow, slower, hidden), times, strict=True):
        assert estimate(s) == pytest.approx(step, rel=1e-9)
        assert bound(s) <= step * (1 + 1e-12)
    spent = simulate_step(slow).breakdown().set_index("part")["seconds"]
    assert spent["compute: host"] > 0.9 * times[0]  # in pairs as in the first forward and the last backward


@pytest.mark.parametrize("plan", [{"tp": 2}, {"tp": 2, "pp": 2}])
def test_a_host_that_waits_hides_no_launches_behind_collectives(plan):
    """Where launches take longer than all that runs, each pass gets longer by its collectives, which it does not launch."""
    model, alone = dense(4, 256), Overlap(tp=False)
    plans = [Plan(**plan, overlap=alone.model_copy(update={"host_waits": waits})) for waits in (False, True)]
    hidden, waited = (scenario(model, 8, p, 4, dispatch_s=1e-3) for p in plans)
    found = [blocks(model, s.plan, s.job) for s in (hidden, waited)]
    launches = [sum(float(host_wait(p, Kernels()).launches) for p in (f["layer0"].forward, f["layer0"].backward)) for f in found]
    segments = (*found[0]["layer0"].forward, *found[0]["layer0"].backward)
    collectives = [op for segment in segments for op in segment if op.axis == "tp"]
    assert launches[0] == launches[1] + len(collectives)  # calls of its own, which nobody makes where they were timed apart
    each = sum(float(op_s(op, model, hidden.plan, hidden.cluster)) for op in collectives)
    prices = [price_blocks(f, model, s.plan, s.cluster)["layer0"] for f, s in zip(found, (hidden, waited), strict=True)]
    taken = [float(price.forward_s + price.backward_s) for price in prices]
    assert taken == pytest.approx([launches[0] * 1e-3, launches[1] * 1e-3 + each], rel=1e-9)
    assert estimate(waited) == pytest.approx(simulate_step(waited).step_time_s, rel=0.02)


def test_gradients_of_biases_are_sums_over_rows_by_kernels_of_their_own():
    """Of queries, keys and values, output, up- and down-projection: bf16 rows read once; Transformer Engine's products sum them up."""
    model = dense(2, 256, attention_bias=True, output_bias=True, mlp_bias=True, gated=False)
    bias = lambda op: op.bytes if op.name.endswith(".bias") else 0.0  # noqa: E731
    engine, functions = (layer(Kernels(backward=how), model) for how in ("engine", "functions"))
    widths = (HEADS + 2 * 4) * WIDTH + model.hidden + model.ffn + model.hidden
    assert (total(engine.backward, bias), total(functions.backward, bias)) == (2 * TOKENS * widths, 0.0)
    assert total(engine.forward, bias) == 0.0
    assert total(layer(Kernels(backward="engine")).backward, bias) == 0.0  # a model without biases


def test_unfused_attention_puts_heads_in_order():
    """Its result is copied forward, and the gradients of queries, keys and values are put together, once."""
    block = layer(Kernels(attention="unfused"))
    moved = lambda name: lambda op: op.bytes if op.name == name else 0.0  # noqa: E731
    assert total(block.forward, moved("attn.context")) == 2 * 2 * TOKENS * HEADS * WIDTH
    assert total(block.backward, moved("attn.split")) == 2 * 2 * TOKENS * (HEADS + 2 * 4) * WIDTH
    assert total(block.backward, moved("attn.split")) == total(layer(Kernels()).backward, moved("attn.split"))


@pytest.mark.parametrize(("tp", "launches"), [(1, (4, 4)), (4, (11, 4))])
def test_a_divided_embedding_masks_what_other_ranks_hold(tp, launches):
    block = blocks(dense(2, 256, positions=512), Plan(dp_shard=1, tp=tp), job())["embedding"]
    kernels = lambda op: op.launches if op.name == "embedding" else 0.0  # noqa: E731
    assert (total(block.forward, kernels), total(block.backward, kernels)) == launches


def test_losses_for_the_log_pass_over_the_logits_again():
    """Each is an fp32 copy (2 bytes read, 4 written) and a log-softmax that reads its rows from memory once (4, 4)."""
    model = dense(2, 256)
    block = blocks(model, Plan(dp_shard=1, framework={"metrics": 2}), job())["head"]
    logged = total(block.forward, lambda op: op.bytes if op.name == "head.metrics" else 0.0)
    assert logged == 2 * 14 * SEQUENCE * model.vocab
    assert block.saved_bytes == blocks(model, Plan(dp_shard=1), job())["head"].saved_bytes


@pytest.mark.parametrize(("zero", "whole", "kind"), [(0, False, "all_reduce"), (1, False, "reduce_scatter"), (1, True, "all_reduce")])
def test_gradients_meet_as_the_framework_reduces_them(zero, whole, kind):
    plan = Plan(dp_shard=8, zero=zero, framework={"reduces_whole": whole})
    ops = [op for op in gradient_ops(blocks(MODEL, plan, job())["layer0"], plan) if op.axis == "dp"]
    assert [op.kind for op in ops] == [kind]


def test_the_engine_launches_the_gradients_of_what_is_written_in_plain_pytorch():
    """Scores and residuals have no autograd function of their own, whatever the layers around them have, and no module either."""
    block = layer(Kernels(), moe(2, 256, leading=0))
    ops = [op for segment in block.backward for op in segment if op.kind in COMPUTE and np.any(op.bytes)]
    plain = sum(float(op.launches) for op in ops if op.name in ("router.topk", "attn.residual", "residual"))
    assert plain == 15 + 2
    assert host_wait(block.backward, Kernels()).launches == pytest.approx(
        sum(float(op.launches) for op in ops) - plain * (1 - PLAIN_LAUNCH / 2), rel=1e-12
    )


@pytest.mark.parametrize("experts", ["grouped", "sequential"])
def test_recompute_of_a_share_of_the_layers_costs_the_host_that_share_of_its_launches(experts):
    def launches(**plan):
        model = moe(2, 256, leading=0)
        return host_wait(
            blocks(model, Plan(dp_shard=1, kernels=Kernels(experts=experts), **plan), job())["layer0"].backward, Kernels()
        ).launches

    none, every, half = launches(), launches(recompute="full"), launches(recompute="full", recompute_share=0.5)
    assert half == pytest.approx((none + every) / 2, rel=1e-12)
    assert none < half


def test_kernels_of_a_loop_all_start_on_the_device():
    s = scenario(MODEL, 1, Plan(micro_batch=64), 1)
    cast = Op("moe.up.cast", "memory", bytes=1e6, launches=1 + 8 * 0.12, kernels=8)
    more = op_s(cast, s.model, s.plan, s.cluster) - op_s(replace(cast, kernels=0.0), s.model, s.plan, s.cluster)
    assert more == pytest.approx((8 - cast.launches) * s.cluster.accelerator.launch_s)
