"""Oracle: bytes counted by hand for a model small enough to count, and the mistakes that memory estimators are known for.

The model: hidden 8, 4 heads and 2 key-value heads of width 2, gated MLP of 16, vocabulary 32, sequences of 16 tokens.
Everything is bf16 (2 bytes) but gradients, master weights, moments, log-sum-exp and scores, which are fp32 (4 bytes).
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import cluster

from simulator.errors import ProfileError
from simulator.feasibility import check, memory, minimum_accelerators
from simulator.scenario.framework import PRESETS
from simulator.scenario.job import Job
from simulator.scenario.kernels import Kernels
from simulator.scenario.model import Experts, Model
from simulator.scenario.overlap import Overlap
from simulator.scenario.plan import ELEMENT_BYTES, EVERY_OTHER_PRODUCT, Plan, Precision, Reserve
from simulator.scenario.scenario import Scenario
from simulator.schedules import schedule
from simulator.simulate import classify, node_seconds, simulate_step
from simulator.workload.build import build_step
from simulator.workload.memory import METRICS, memory_per_stage
from simulator.workload.stages import blocks, stage_blocks

NOTHING = Reserve(context="0 GB", communicator="0 GB", workspace="0 GB", fragmentation=0)
SIZES = {"hidden": 8, "vocab": 32, "heads": 4, "kv_heads": 2, "head_dim": 2, "ffn": 16, "source": "made up"}
DENSE = Model(name="dense", layers=4, **SIZES)
EXPERTS = Experts(count=4, top_k=2, ffn=8, shared_ffn=8)
MOE = Model(name="moe", layers=4, experts=EXPERTS, moe_layers=(False, True, True, True), **SIZES)

# --- by hand ---

#: q, k, v 8 x (4 + 2 + 2) * 2; output 8 x 8; gate, up, down 3 * 8 * 16; two norms of 8
ATTENTION, MLP, NORMS = 8 * 16 + 8 * 8, 3 * 8 * 16, 2 * 8
LAYER = ATTENTION + MLP + NORMS
EMBEDDING, HEAD = 32 * 8, 32 * 8 + 8
EXPERT, ROUTER, SHARED = 3 * 8 * 8, 4 * 8, 3 * 8 * 8

#: saved per token of a layer: inputs and outputs of two norms; q, k, v; log-sum-exp of 4 heads; attention's output; gate and up; product
TOKEN = 2 * 16 + 2 * 16 + 16 * 2 + 4 * 4 + 8 * 2 + 2 * 16 * 2 + 16 * 2
#: saved per token of the head: input and output of its norm, softmax in fp32
HEAD_TOKEN = 2 * 16 + 32 * 4


def plan(**changes) -> Plan:
    return Plan(**({"dp_shard": 1, "reserve": NOTHING, "framework": {"weight_gradients": "fused"}} | changes))


def measured(model: Model, p: Plan, micro_batches: int = 8, optimizer: str = "adam") -> dict[str, np.ndarray]:
    """Return bytes per stage, part by part."""
    batch = micro_batches * p.dp * p.micro_batch
    job = Job(tokens=16 * batch, global_batch=batch, sequence_length=16, optimizer=optimizer)
    return memory_per_stage(model, p, job, stage_blocks(model, p, job), blocks(model, p, job), micro_batches)


def only(parts: dict[str, np.ndarray], name: str) -> float:
    (value,) = parts[name]
    return float(value)


# --- weights, gradients, optimizer ---

WHOLE = 4 * LAYER + EMBEDDING + HEAD


@pytest.mark.parametrize(
    ("zero", "weights", "gradients", "optimizer", "buffers"),
    [
        (0, 2 * WHOLE, 4 * WHOLE, 12 * WHOLE, 0),
        (1, 2 * WHOLE, 4 * WHOLE, 12 * WHOLE / 4, 0),
        (2, 2 * WHOLE, 4 * WHOLE / 4, 12 * WHOLE / 4, 2 * 4 * LAYER),  # whole gradients of two layers in turn
        (3, 2 * WHOLE / 4, 4 * WHOLE / 4, 12 * WHOLE / 4, 2 * (4 + 2) * LAYER),  # and their whole weights
    ],
)
def test_zero_stages(zero, weights, gradients, optimizer, buffers):
    parts = measured(DENSE, plan(dp_shard=4, zero=zero))
    assert [only(parts, name) for name in ("weights", "gradients", "optimizer")] == [weights, gradients, optimizer]
    assert only(parts, "buffers") - only(measured(DENSE, plan(dp_shard=4, zero=0)), "buffers") == buffers


def test_state_of_context_parallel_ranks_is_one_group():
    """Context-parallel ranks hold the same parameters, so cp * dp_shard of them share the optimizer state."""
    assert only(measured(DENSE, plan(dp_shard=2, cp=2)), "optimizer") == 12 * WHOLE / 4


def test_replicas_do_not_share_state():
    assert only(measured(DENSE, plan(dp_shard=2, dp_replicate=4)), "optimizer") == 12 * WHOLE / 2


@pytest.mark.parametrize(("optimizer", "bytes_per_parameter"), [("adam", 12), ("muon", 8), ("sgd", 4)])
def test_optimizers(optimizer, bytes_per_parameter):
    assert only(measured(DENSE, plan(), optimizer=optimizer), "optimizer") == bytes_per_parameter * WHOLE


def test_precision_of_the_state():
    precision = Precision(gradients="bf16", master=None, moments="bf16", parameters="fp32")
    parts = measured(DENSE, plan(precision=precision))
    assert [only(parts, n) for n in ("weights", "gradients", "optimizer")] == [4 * WHOLE, 2 * WHOLE, 4 * WHOLE]


def test_tensor_parallel_state_and_activations():
    """Matrices and vocabulary are split, norms are not; with sequence parallelism every saved tensor is split, too."""
    parts = measured(DENSE, plan(tp=2))
    split = 4 * ((ATTENTION + MLP) / 2 + NORMS) + EMBEDDING / 2 + (32 * 8 / 2 + 8)
    assert only(parts, "weights") == 2 * split
    assert only(parts, "activations") == 16 * (4 * TOKEN + HEAD_TOKEN) / 2


def test_without_sequence_parallel_norms_are_whole():
    parts = measured(DENSE, plan(tp=2, sequence_parallel=False))
    norms = 2 * 16 + 2 * 16  # inputs and outputs of the two norms
    assert only(parts, "activations") == 16 * (4 * (norms + (TOKEN - norms) / 2) + 2 * 16 + 32 * 4 / 2)


def test_fewer_key_value_heads_than_tensor_parallel_ranks():
    """tp = 4 of 2 key-value heads: every rank keeps one whole head, so the two are held twice."""
    parts = measured(DENSE, plan(tp=4))
    layer = 8 * (1 + 1 + 1) * 2 + 8 * 8 / 4 + MLP / 4 + NORMS
    assert only(parts, "weights") == 2 * (4 * layer + EMBEDDING / 4 + (32 * 8 / 4 + 8))


@pytest.mark.parametrize("changes", [{"cp": 2}, {"micro_batch": 3}])
def test_activations_follow_the_tokens(changes):
    tokens = 16 * changes.get("micro_batch", 1) / changes.get("cp", 1)
    assert only(measured(DENSE, plan(**changes)), "activations") == tokens * (4 * TOKEN + HEAD_TOKEN)


def test_reserve():
    """The allocator loses a share of what it reserves; communicators (the world, tp, pp) and context lie outside of it."""
    reserve = Reserve(context="1 GB", communicator="2 GB", workspace="3 GB", fragmentation=0.2)
    parts, bare = measured(DENSE, plan(tp=2, pp=2, reserve=reserve)), measured(DENSE, plan(tp=2, pp=2))
    assert (parts["buffers"] - bare["buffers"]).tolist() == [3e9, 3e9]
    assert parts["communication"].tolist() == [3 * 2e9, 3 * 2e9]
    assert parts["total"] == pytest.approx((bare["total"] + 3e9) / 0.8 + 6e9 + 1e9, rel=1e-12)


def test_what_each_counter_sees():
    """torch.cuda's allocated and reserved bytes, and what nvidia-smi shows: each sees more than the one before."""
    parts = measured(DENSE, plan(tp=2, reserve=Reserve()))
    allocated, reserved, device = (sum(only(parts, name) for name in METRICS[m]) for m in ("allocated", "reserved", "device"))
    assert reserved == pytest.approx(allocated / 0.95, rel=1e-12)
    assert device == only(parts, "total") == pytest.approx(reserved + 2 * 0.5e9 + 1e9, rel=1e-12)


def test_tied_embedding_is_held_twice_by_a_pipeline():
    tied = DENSE.model_copy(update={"tied_embeddings": True})
    assert only(measured(tied, plan()), "weights") == 2 * (WHOLE - 32 * 8)
    first, last = measured(tied, plan(pp=2))["weights"]
    assert (first, last) == (2 * (2 * LAYER + EMBEDDING), 2 * (2 * LAYER + HEAD))


# --- recompute ---


#: gradients of a layer's backward at its fullest moment: of gate and up, and of the layer's output
WORK_TOKEN = 2 * 16 * 2 + 16


def test_full_recompute_keeps_layer_inputs_and_rebuilds_one_layer():
    """When the last layer is rebuilt, the head has given its part back."""
    parts, none = measured(DENSE, plan(recompute="full")), measured(DENSE, plan())
    assert only(parts, "activations") == 16 * (4 * 16 + HEAD_TOKEN)
    assert only(none, "activations") == 16 * (4 * TOKEN + HEAD_TOKEN)
    pipeline = measured(DENSE, plan(pp=2, recompute="full"))
    assert pipeline["activations"].tolist() == [2 * 16 * 2 * 16, 16 * (2 * 16 + HEAD_TOKEN)]
    assert pipeline["buffers"][0] == 16 * (TOKEN - 16 + WORK_TOKEN)
    assert measured(DENSE, plan(pp=2))["buffers"][0] == 16 * WORK_TOKEN


@pytest.mark.parametrize(
    ("modules", "dropped"),
    [
        (("core_attn",), 4 * 4),
        (("layernorm",), 2 * 16),
        (("mlp_act",), 16 * 2),
        (("mlp",), 2 * 16 * 2 + 16 * 2),
        (("core_attn", "layernorm", "mlp_act"), 4 * 4 + 2 * 16 + 16 * 2),
    ],
)
def test_selective_recompute(modules, dropped):
    parts = measured(DENSE, plan(pp=2, recompute="selective", recompute_modules=modules))
    assert parts["activations"][0] == 16 * 2 * 2 * (TOKEN - dropped)
    assert parts["buffers"][0] == 16 * (dropped + WORK_TOKEN)


# --- kernels and framework ---


def layer_token(**changes) -> float:
    """Return the bytes that one layer saves per token."""
    parts = measured(DENSE, plan(pp=4, **changes))
    return float(parts["activations"][1]) / (16 * 3)  # the second of four stages holds one layer of three micro-batches


@pytest.mark.parametrize(
    ("kernels", "more"),
    [
        ({}, 0),
        ({"attention": "unfused"}, 4 * (16 * 2 - 4)),  # the softmax of 16 keys in 16 bits instead of one fp32 sum for each head
        ({"attention": "eager"}, 4 * (16 * 6 - 4)),  # in fp32, and cast
        ({"attention": "unfused", "dropout": True}, 4 * (16 * 5 - 4) + 2 * 8),  # and its mask and result; a mask for each branch
        ({"norm": "eager"}, 2 * 8 * 6),  # two norms: the row in fp32 and normalised
        ({"norm": "eager_fp32"}, 2 * 8 * 4),  # the row in fp32 in place of 16 bits, and normalised
        ({"pointwise": "eager"}, 16 * 2),  # the gate after its activation function
    ],
)
def test_kernels_that_keep_more(kernels, more):
    assert layer_token(kernels=kernels) == TOKEN + more


@pytest.mark.parametrize(("gemm", "more"), [("fp8", 0.2), ("bf16", 0.5), ("fp16", 0.5)])
def test_a_graph_of_the_whole_step_leaves_room_for_uneven_experts(gemm, more):
    """Pages for 1.2 times what even experts save, where products mark it; buffers for 1.5 times in 16 bits, where none does."""
    p = plan(pp=4, precision=Precision(gemm=gemm))
    kept = [
        float(measured(MOE, p.model_copy(update={"kernels": Kernels(experts="fused", graphs=graphs)}))["activations"][1]) / (16 * 3)
        for graphs in ((), ("full",))
    ]
    element = ELEMENT_BYTES[gemm]
    saved = EXPERTS.top_k * (8 * element + 2 * EXPERTS.ffn * 2 + EXPERTS.ffn * element)
    assert kept[1] - kept[0] == pytest.approx(more * saved)


def test_hybridep_has_room_for_every_token_of_its_group():
    """Rows in 16 bits, a probability in fp32 for each of 4 experts and a scale for 128 elements, of 2 ranks of 16 tokens."""
    parts = {d: measured(MOE, plan(dp_shard=2, ep=2, dispatcher=d))["communication"] for d in ("alltoall", "hybridep")}
    assert (parts["hybridep"] - parts["alltoall"]).tolist() == [2 * 16 * (2 * 8 + 4 * (4 + 8 / 128))]


@pytest.mark.parametrize(
    ("graphs", "precision", "copied"),
    [
        (("full",), {"gradients": "bf16"}, True),
        (("attn",), {"gradients": "bf16"}, False),  # made where activations were
        (("full",), {}, False),  # gradients in fp32 are used as they are
        (("full",), {"gradients": "bf16", "moments": "bf16"}, False),
    ],
)
def test_a_graph_of_the_whole_step_leaves_no_room_for_the_optimizers_gradients(graphs, precision, copied):
    """Of the part of the parameters that a rank updates: a quarter of the dense ones."""
    p = plan(dp_shard=4, zero=1, precision=Precision(**precision))
    with_graphs = measured(DENSE, p.model_copy(update={"kernels": Kernels(graphs=graphs)}))
    assert (with_graphs["buffers"] - measured(DENSE, p)["buffers"]).tolist() == [4 * WHOLE / 4 * copied]


def test_unfused_attention_is_korthikantis_formula():
    """Equation 1 with sequence parallelism: s b h (34 + 5 a s / h) / t for a plain MLP of 4 h, heads as many as in the hidden width."""
    s, h, a, t = 16, 8, 8, 2
    gpt = DENSE.model_copy(update={"gated": False, "layer_norm": True, "heads": a, "kv_heads": a, "head_dim": h // a, "ffn": 4 * h})
    p = plan(pp=4, tp=t, kernels={"attention": "unfused", "dropout": True})
    assert measured(gpt, p)["activations"][1] == 3 * s * h * (34 + 5 * a * s / h) / t


#: bytes per logit kept, and live at the loss; the norm's input and output are beside them
LOSSES = {"in_place": (2, 2), "compiled": (2, 4), "fused": (4, 6), "vocab_parallel": (4, 10), "eager": (4, 12)}


@pytest.mark.parametrize("cross_entropy", LOSSES)
def test_what_the_loss_keeps_of_the_logits(cross_entropy):
    """With as many words the projection's own gradient is the smaller moment: two gathered rows and a matrix."""
    wide = DENSE.model_copy(update={"vocab": 512})
    kept, live = LOSSES[cross_entropy]
    parts = measured(wide, plan(pp=4, tp=2, framework={"cross_entropy": cross_entropy, "weight_gradients": "fused"}))
    logits = 16 * 512 / 2
    assert parts["activations"][3] == 16 * (TOKEN + 2 * 16) / 2 + kept * logits
    assert parts["buffers"][3] == max((live - kept) * logits, (2 - kept) * logits + 2 * 16 * 16, 16 * WORK_TOKEN / 2 - kept * logits)


@pytest.mark.parametrize(("tp", "style", "live"), [(1, "torch", 12), (2, "torch", 16), (2, True, 12)])
def test_pytorchs_loss_over_a_divided_vocabulary_makes_a_fourth_tensor(tp, style, live):
    """Log-softmax, the picked words' gradient, its sum with the softmax, their product: all in fp32."""
    wide = DENSE.model_copy(update={"vocab": 512})
    p = plan(pp=4, tp=tp, overlap=Overlap(tp=style), framework={"cross_entropy": "eager", "weight_gradients": "fused"})
    assert measured(wide, p)["buffers"][3] == (live - 4) * 16 * 512 / tp


def test_eager_checkpointing_keeps_the_output_of_the_down_projection():
    """It stores what it was told to, read or not; torch.compile drops what no gradient reads."""
    by_operation = {"recompute": "selective", "recompute_modules": EVERY_OTHER_PRODUCT}
    fused, eager = (layer_token(kernels={"gate": "separate", "pointwise": how}, **by_operation) for how in ("fused", "eager"))
    assert eager - fused == 2 * 8


def test_gathered_logits_are_not_split():
    one, two = (measured(DENSE, plan(pp=4, tp=t, framework={"cross_entropy": "gathered"})) for t in (1, 2))
    logits = one["activations"][3] - 16 * (TOKEN + 2 * 16)
    assert logits == two["activations"][3] - 16 * (TOKEN + 2 * 16) / 2 == 6 * 16 * 32


def test_placeholders_for_weight_gradients():
    """One bf16 tensor per shape of weight, however many layers have it, beside the head's own gradient when it is written."""
    shapes = ATTENTION + MLP
    with_them, without = (measured(DENSE, plan(pp=2, framework={"weight_gradients": how})) for how in ("placeholders", "fused"))
    assert with_them["buffers"][0] - without["buffers"][0] == 2 * shapes
    assert with_them["weights"].tolist() == without["weights"].tolist()


def test_placeholder_of_an_expert_is_one_matrix():
    """The experts of a rank share one; the dense layer's MLP, the router and the shared expert have their own."""
    p = plan(framework={"weight_gradients": "placeholders"})
    more = only(measured(MOE, p), "buffers") - only(measured(MOE, plan()), "buffers")
    written = 2 * 32 * 8  # the head's
    assert more - written <= 2 * (ATTENTION + MLP + ROUTER + EXPERT + SHARED) <= more


def test_gradients_kept_beside_the_main_ones():
    """DeepSpeed's bf16 optimizer: 2 more bytes per parameter, never sharded."""
    p = plan(dp_shard=4, framework={"weight_gradients": "kept"})
    assert only(measured(DENSE, p), "gradients") == (4 + 2) * WHOLE


def test_a_flat_fp32_copy_of_the_gradients_stays_reserved():
    p = plan(dp_shard=4, framework={"weight_gradients": "copied"})
    assert only(measured(DENSE, p), "fragmentation") == 4 * WHOLE / 4


def test_stage_outputs_and_buckets():
    kept = plan(pp=2, framework={"weight_gradients": "fused", "keeps_outputs": True, "bucket_elements": 1000})
    parts, without = measured(DENSE, kept), measured(DENSE, plan(pp=2))
    assert (parts["activations"] - without["activations"]).tolist() == [2 * 16 * 8 * 2, 0]
    assert (parts["buffers"] - without["buffers"]).tolist() == [4000, 4000]


def test_offloaded_layers_wait_on_the_host():
    p = plan(pp=4, framework={"weight_gradients": "fused", "offloaded_layers": 1})
    assert measured(DENSE, p)["activations"][0] == 0.75 * measured(DENSE, plan(pp=4))["activations"][0]


def test_ulysses_keeps_the_output_of_both_exchanges():
    assert layer_token(cp=2, context_parallel="all_to_all") == (TOKEN + 8 * 2) / 2
    assert layer_token(context_parallel="all_to_all") == TOKEN


@pytest.mark.parametrize("dtype", ["fp8", "fp4"])
def test_low_precision_products_read_copies_of_the_weights(dtype):
    """Two layouts beside the bf16 weight, or one beside a weight that is kept in low precision; not of embedding and head."""
    size = ELEMENT_BYTES[dtype]
    bf16, low = (only(measured(DENSE, plan(precision={"gemm": dtype, "parameters": p})), "weights") for p in ("bf16", dtype))
    assert bf16 == 2 * WHOLE + 2 * size * 4 * LAYER
    assert low == pytest.approx(size * WHOLE + size * 4 * LAYER, rel=1e-12)


def test_one_scale_for_a_weight_needs_one_copy_of_it():
    """Blackwell multiplies FP8 weights of one scale in either layout."""
    size, low = ELEMENT_BYTES["fp8"], {"gemm": "fp8", "layouts": 1}
    bf16, fp8 = (only(measured(DENSE, plan(precision=low | {"parameters": p})), "weights") for p in ("bf16", "fp8"))
    assert bf16 == 2 * WHOLE + size * 4 * LAYER
    assert fp8 == pytest.approx(size * WHOLE)


@pytest.mark.parametrize("layouts", [1, 2])
def test_a_narrow_output_projection_is_copied_where_it_lies(layouts):
    """On the last stage alone, a rank's part of vocabulary times hidden, its norm not; whatever the layers multiply in."""
    for gemm in ("bf16", "fp8"):
        wide, narrow = (plan(pp=2, tp=2, precision={"gemm": gemm, "layouts": layouts, "head": head}) for head in ("bf16", "fp8"))
        more = measured(DENSE, narrow)["weights"] - measured(DENSE, wide)["weights"]
        assert more.tolist() == [0, layouts * ELEMENT_BYTES["fp8"] * 32 * 8 / 2]


def test_a_narrow_output_projection_of_weights_kept_narrow_needs_the_other_layout():
    low = {"gemm": "fp8", "parameters": "fp8"}
    wide, narrow = (only(measured(DENSE, plan(precision=low | {"head": head})), "weights") for head in ("bf16", "fp8"))
    assert narrow - wide == pytest.approx(ELEMENT_BYTES["fp8"] * 32 * 8, rel=1e-9)


def test_torchao_keeps_its_inputs_in_16_bits():
    """The same saved bytes in bf16 and in FP8, as torchtitan's published peaks have it."""
    tokens = [layer_token(precision={"gemm": g}, framework=PRESETS["fsdp"]) for g in ("bf16", "fp8")]
    assert tokens == [TOKEN, TOKEN]


def test_matrices_gathered_one_by_one():
    """DeepSpeed's ZeRO-3 of 2021 holds one whole matrix, here the head, and the gradients of two, not a layer."""
    p = plan(dp_shard=4, zero=3, overlap=Overlap(by_tensor=True, prefetch=0))
    whole = only(measured(DENSE, plan(dp_shard=4, zero=3, overlap=Overlap(prefetch=0))), "buffers")
    assert whole - only(measured(DENSE, p), "buffers") == (2 + 2 * 4) * (LAYER - HEAD)


def test_zero_3_casts_what_it_gathers():
    p = plan(dp_shard=4, zero=3, precision={"gemm": "fp8", "head": "fp8"})
    assert only(measured(DENSE, p), "weights") == 2 * WHOLE / 4


def test_fp32_weights_are_gathered_in_16_bits():
    p = plan(dp_shard=4, zero=3, precision={"parameters": "fp32", "master": None})
    assert only(measured(DENSE, p), "weights") == 4 * WHOLE / 4
    assert only(measured(DENSE, p), "buffers") == only(measured(DENSE, plan(dp_shard=4, zero=3)), "buffers")


def test_a_pair_gives_back_what_it_takes():
    """Layer by layer, a pair holds one micro-batch and a layer; one after the other, the table holds two."""
    pairs = plan(schedule="table", table="0F0 0F1+0B0 0F2+0B1 0B2")
    alone = measured(DENSE, plan(), 3)
    together = measured(DENSE, pairs, 3)
    assert only(together, "activations") == only(alone, "activations")
    assert only(together, "buffers") - only(alone, "buffers") == 16 * TOKEN
    order = schedule("table", 1, 1, 3, pairs.table)
    assert (order.in_flight.max(), order.resident.max()) == (2, 1)


@pytest.mark.parametrize("name", ["deepseek-v3-2048-h800", "llama-3-405b-8192-h100"])
def test_published_layouts_that_ran_are_predicted_to_fit(name):
    s = Scenario.load(f"examples/{name}.yaml")
    assert check(s) == []
    assert memory(s)["total"].max() > 0.85 * s.cluster.accelerator.hbm_bytes  # and left little room


def test_frameworks_have_names():
    assert Plan(framework="deepspeed").framework.keeps_outputs
    assert Plan(framework="megatron") == Plan()
    with pytest.raises(ProfileError, match="framework: zero is not known; use one of megatron, megatron-2022, deepspeed, fsdp"):
        Plan(framework="zero")


# --- schedules ---


def in_flight(name: str, pp: int, vpp: int, micro_batches: int) -> np.ndarray:
    """Return the micro-batches that each rank holds, chunk by chunk, where no backward is split: (pp, moments, vpp)."""
    whole, rest = np.moveaxis(schedule(name, pp, vpp, micro_batches).in_flight, 2, 0)
    assert not rest.any()
    return whole


@given(pp=st.integers(1, 8), micro_batches=st.integers(1, 24))
def test_1f1b_holds_what_is_behind_it_in_the_pipeline(pp, micro_batches):
    held = in_flight("1f1b", pp, 1, micro_batches).sum(axis=2).max(axis=1)
    assert held.tolist() == [min(pp - rank, micro_batches) for rank in range(pp)]


@given(pp=st.integers(1, 8), micro_batches=st.integers(1, 24))
def test_gpipe_holds_everything(pp, micro_batches):
    assert in_flight("gpipe", pp, 1, micro_batches).max(axis=1).tolist() == [[micro_batches]] * pp


@given(pp=st.integers(1, 6), vpp=st.integers(2, 5), rounds=st.integers(1, 6))
def test_interleaved_holds_its_warm_up_and_one(pp, vpp, rounds):
    """Narayanan et al., SC 2021: 2 (p - r - 1) + (v - 1) p chunks ahead, and the one that is computed."""
    m = rounds * pp
    held = in_flight("interleaved", pp, vpp, m).sum(axis=2).max(axis=1)
    assert held.tolist() == [min(m * vpp, 2 * (pp - rank - 1) + (vpp - 1) * pp + 1) for rank in range(pp)]


@given(name=st.sampled_from(["gpipe", "1f1b", "interleaved"]), pp=st.integers(1, 5), rounds=st.integers(1, 5), per=st.integers(1, 2))
def test_in_flight_is_what_the_table_shows(name, pp, rounds, per):
    """Brute force over the whole table, whatever the shortcut in `in_flight` leaves out."""
    vpp = 1 + per if name == "interleaved" else 1
    m = rounds * pp
    size = np.arange(1, vpp + 1)  # chunks of different weight
    found = (in_flight(name, pp, vpp, m) @ size).max(axis=1)
    for rank, row in enumerate(schedule(name, pp, vpp, m).table):
        held, peak = 0, 0
        for action in row:
            held += size[action.chunk] if action.kind == "F" else -size[action.chunk]
            peak = max(peak, held)
        assert (found[rank], held) == (peak, 0)


@pytest.mark.parametrize(("name", "vpp"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2)])
def test_activations_of_a_pipeline(name, vpp):
    m = 8
    found = measured(DENSE, plan(pp=2, vpp=vpp, schedule=name), m)["activations"]
    layer, head = 16 * TOKEN, 16 * HEAD_TOKEN
    expected = {
        "gpipe": [m * 2 * layer, m * (2 * layer + head)],
        "1f1b": [2 * 2 * layer, 2 * layer + head],
        # rank 0: 2 + 2 + 1 chunks of one layer; rank 1: 2 + 1, of which one or two carry the head
        "interleaved": [5 * layer, None],
    }[name]
    assert found[0] == expected[0]
    if expected[1] is not None:
        assert found[1] == expected[1]
    else:
        counts = in_flight(name, 2, vpp, m)[1]
        assert found[1] == max(c[0] * layer + c[1] * (layer + head) for c in counts)


# --- known mistakes ---


def expert_bytes(p: Plan, part: str) -> float:
    """Return what the routed experts of one MoE layer add to `part`: with them less without them."""
    parts, none = measured(MOE, p), measured(MOE.model_copy(update={"experts": EXPERTS.model_copy(update={"ffn": 4})}), p)
    return 2 * (only(parts, part) - only(none, part)) / 3  # half the width is half the bytes; three layers


@pytest.mark.parametrize(
    ("tp", "ep", "etp", "dp"),
    [(1, 1, 1, 4), (1, 2, 1, 4), (4, 2, 1, 2), (4, 1, 4, 2), (2, 2, 2, 2), (4, 4, 2, 4), (2, 4, 1, 4)],
)
def test_mistake_experts_divided_by_tp(tp, ep, etp, dp):
    """Routed experts are divided by etp * ep, whatever tp is."""
    p = plan(tp=tp, ep=ep, etp=etp, dp_shard=dp)
    assert expert_bytes(p, "weights") == 2 * 4 * EXPERT / (etp * ep)


@pytest.mark.parametrize(
    ("tp", "cp", "ep", "etp", "dp"), [(1, 1, 1, 1, 4), (1, 1, 2, 1, 4), (4, 1, 2, 1, 2), (2, 1, 2, 2, 2), (2, 2, 4, 1, 4), (1, 2, 4, 1, 4)]
)
def test_mistake_expert_optimizer_state_over_dp(tp, cp, ep, etp, dp):
    """It is sharded over edp = dp * cp * tp / (etp * ep)."""
    p = plan(tp=tp, cp=cp, ep=ep, etp=etp, dp_shard=dp)
    edp = dp * cp * tp // (etp * ep)
    assert (p.edp, p.expert_shard) == (edp, edp)
    assert expert_bytes(p, "optimizer") == 12 * 4 * EXPERT / (etp * ep) / edp


def test_mistake_expert_optimizer_state_over_dp_with_replicas():
    """A replica holds its own copy: the shards of an expert are those inside one replica."""
    p = plan(ep=2, dp_shard=4, dp_replicate=2)
    assert (p.edp, p.expert_shard) == (4, 2)
    assert expert_bytes(p, "optimizer") == 12 * 4 * EXPERT / 2 / 2


def test_mistake_every_layer_priced_dense():
    """Stages: embedding and a dense layer, an MoE layer, an MoE layer, an MoE layer and head."""
    p = plan(pp=4)
    moe = ATTENTION + NORMS + ROUTER + 4 * EXPERT + SHARED
    found = measured(MOE, p)
    assert (found["weights"] / 2).tolist() == [EMBEDDING + LAYER, moe, moe, moe + HEAD]
    #: saved per token: attention's part, router scores, the copies' rows, their gate and up, product, and the shared expert's
    saved = TOKEN - 3 * 16 * 2 + 4 * 4 + 2 * (8 * 2 + 2 * 8 * 2 + 8 * 2) + (2 * 8 * 2 + 8 * 2)
    in_warm_up = [4, 3, 2, 1]
    expected = [4 * TOKEN, 3 * saved, 2 * saved, saved + HEAD_TOKEN]
    assert in_flight("1f1b", 4, 1, 8).max(axis=(1, 2)).tolist() == in_warm_up
    assert (found["activations"] / 16).tolist() == expected


def test_mistake_every_layer_priced_dense_in_the_step():
    """The dense stage of the program exchanges no tokens, the others do, twice per layer, micro-batch and direction."""
    s = scenario(MOE, plan(pp=4, ep=2, dp_shard=2), micro_batches=4)
    nodes = named(s)
    exchanges = [sum(count for name, count in nodes[stage].items() if name in ("moe.dispatch", "moe.combine")) for stage in range(4)]
    assert exchanges == [0, 16, 16, 16]


def test_mistake_average_stage():
    """The fullest stage decides: what fits on average does not fit."""
    s = scenario(MOE, plan(pp=4), micro_batches=8)
    total = memory(s)["total"]
    assert total.max() > 1.1 * total.mean()
    between = (total.max() + total.mean()) / 2
    small = s.cluster.model_copy(update={"accelerator": s.cluster.accelerator.model_copy(update={"hbm_bytes": float(between)})})
    (problem,) = check(s.model_copy(update={"cluster": small}))
    assert problem.rule == "the model fits in memory"
    assert problem.numbers.startswith(f"stage {int(total.argmax())} needs")
    assert simulate_step(s).peak_memory_bytes == total.max()


@given(tp=st.integers(1, 8), cp=st.integers(1, 4), pp=st.integers(1, 16), ep=st.integers(1, 64), etp=st.integers(1, 8))
def test_mistake_minimum_accelerators_as_a_product(tp, cp, pp, ep, etp):
    """Attention and expert mesh lie over the same ranks: pp * max(tp * cp, etp * ep) when one divides the other, else their lcm."""
    dense, expert = tp * cp, etp * ep
    found = minimum_accelerators(plan(tp=tp, cp=cp, pp=pp, ep=ep, etp=etp))
    assert found >= pp * max(dense, expert)
    assert found % (pp * dense) == found % (pp * expert) == 0
    if dense % expert == 0 or expert % dense == 0:
        assert found == pp * max(dense, expert)


@pytest.mark.parametrize(("ep", "etp", "least"), [(64, 1, 16 * 64), (8, 1, 16 * 8), (64, 8, 16 * 512)])
def test_mistake_minimum_accelerators_of_a_known_plan(ep, etp, least):
    """TP8, PP16: DeepSeek-V3 with EP64 starts at 1,024 accelerators, not 8,192."""
    assert minimum_accelerators(plan(tp=8, pp=16, ep=ep, etp=etp)) == least


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_blocks_gathered_ahead_are_held(ahead):
    """ZeRO-3: whole weights of the block that runs and of those ahead, on a stage of six blocks; one ahead is usual."""
    plans = (plan(dp_shard=4, zero=3, overlap=Overlap(prefetch=n)) for n in (ahead, 1))
    found, usual = (only(measured(DENSE, p), "buffers") for p in plans)
    assert found - usual == (ahead - 1) * 2 * LAYER


def test_buffers_of_collectives_in_pieces():
    """Whole rows ten times over (Transformer Engine): six in the datatype of the product, four in bf16; none for one rank."""
    pieces = Overlap(tp="pieces")
    for tp, gemm, more in ((1, "bf16", 0), (2, "bf16", 10 * 2), (2, "fp8", 6 * (1 + 4 / 128) + 4 * 2)):
        both = (plan(tp=tp, precision=Precision(gemm=gemm), overlap=overlap) for overlap in (Overlap(), pieces))
        without, found = (only(measured(DENSE, p), "buffers") for p in both)
        assert found - without == pytest.approx(16 * 8 * more, rel=1e-12)  # tokens times hidden


# --- ZeRO-2 and ZeRO-3 in a pipeline ---


def scenario(model: Model, p: Plan, micro_batches: int) -> Scenario:
    batch = micro_batches * p.dp * p.micro_batch
    job = Job(tokens=16 * batch, global_batch=batch, sequence_length=16)
    return Scenario(model=model, cluster=cluster(p.world), plan=p, job=job)


def program(s: Scenario):
    return build_step(s.model, s.plan, s.job, classify(s.plan, s.cluster, 1.0, every_rank=False))


def named(s: Scenario) -> list[dict[str, int]]:
    """Return, for each stage, how often each task name occurs on one of its ranks."""
    made = program(s)
    found: list[dict[str, int]] = [{} for _ in range(s.plan.pp)]
    for task, rank in zip(made.task, made.rank_class, strict=True):
        stage, name = int(made.classes.stage[rank]), made.tasks[task].name
        found[stage][name] = found[stage].get(name, 0) + 1
    assert len(made.classes.stage) == s.plan.pp  # one class per stage, so counts are those of one rank
    return found


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize(("zero", "gathers", "reductions"), [(0, 0, 1), (1, 1, 1), (2, 1, 5), (3, 10, 5)])
@pytest.mark.parametrize("overlap", [True, False])
def test_mistake_sharded_collectives_once_per_step(pp, zero, gathers, reductions, overlap):
    """5 micro-batches: ZeRO-2 reduces after every backward, ZeRO-3 also gathers before every forward and backward."""
    p = plan(pp=pp, zero=zero, dp_shard=4, ep=2, overlap=Overlap(grad_reduce=overlap, param_gather=overlap))
    nodes = named(scenario(MOE, p, micro_batches=5))
    per_stage = [[("embedding", "dense", "moe"), ("moe", "moe", "head")], [("embedding", "dense", "moe", "moe", "moe", "head")]][pp == 1]
    for stage, blocks_here in enumerate(per_stage):
        dense, moe = len(blocks_here), blocks_here.count("moe")
        assert nodes[stage].get("parameters.dp", 0) == gathers * dense
        assert nodes[stage].get("parameters.edp", 0) == gathers * moe
        assert nodes[stage].get("gradients.dp", 0) == reductions * dense
        assert nodes[stage].get("gradients.edp", 0) == reductions * moe


@pytest.mark.parametrize(("zero", "times"), [(1, 1), (2, 5), (3, 5)])
def test_mistake_sharded_collectives_priced_once_per_step(zero, times):
    """Seconds on the data-parallel stream: every reduction of every micro-batch is priced, and as often as it runs."""
    p = plan(pp=2, zero=zero, dp_shard=4)
    s = scenario(DENSE, p, micro_batches=5)
    made = program(s)
    seconds = node_seconds(made, s)
    names = np.array([made.tasks[t].name for t in made.task])
    spent = {name: seconds[names == name] for name in ("gradients.dp", "parameters.dp")}
    assert len(spent["gradients.dp"]) == times * (2 * 2 + 2)
    assert (spent["gradients.dp"] > 0).all()
    assert (spent["parameters.dp"] > 0).all()
    once = scenario(DENSE, p, micro_batches=1)
    single = node_seconds(program(once), once)
    single_names = np.array([program(once).tasks[t].name for t in program(once).task])
    factor = 1 if zero == 1 else 5
    for name in spent:
        gathered_ahead = name == "parameters.dp" and zero < 3
        assert spent[name].sum() == pytest.approx((1 if gathered_ahead else factor) * single[single_names == name].sum(), rel=1e-12)


def test_zero_3_costs_a_pipeline_time():
    """Few tokens on wide layers: the data-parallel stream decides, once (ZeRO-1), or 8 times (ZeRO-2), or with gathers (ZeRO-3)."""
    wide = DENSE.model_copy(update={"hidden": 2048, "heads": 16, "kv_heads": 16, "head_dim": 128, "ffn": 8192})
    times = [simulate_step(scenario(wide, plan(pp=2, zero=zero, dp_shard=8), micro_batches=8)).step_time_s for zero in (1, 2, 3)]
    assert times[1] > 1.8 * times[0]
    assert times[2] > 1.5 * times[1]
