"""Oracle: torch.utils.flop_counter.FlopCounterMode on the meta device, which counts 2 m k n for every product it dispatches.

The torch blocks are written with explicit products, because the counter sees no fused attention on CPU or meta and no grouped
products: scores and weighted values are `bmm`, every expert has its own products over its balanced share of the tokens.

Like with like, two differences are taken out: torch's explicit attention attends to every key, so ours is scaled from the
keys that a causal mask leaves to all of them; and its backward is two products for each forward one, while a fused
kernel computes the scores once more, which makes 5 products for 2 forward (2.5) instead of 4 for 2.
"""

from __future__ import annotations

import pytest

from simulator.scenario.job import Job
from simulator.scenario.model import Experts, LatentAttention, LayerKind, Model
from simulator.scenario.plan import Plan
from simulator.workload.attention import ATTENTION_BACKWARD_FLOP, attended
from simulator.workload.flop import count
from simulator.workload.layers import head, transformer_layer
from simulator.workload.ops import Segment, total

torch = pytest.importorskip("torch")
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

S, HIDDEN, VOCAB, FFN = 256, 128, 512, 384
EXPERTS = Experts(count=8, top_k=2, ffn=64, shared_ffn=96)
PLAN, JOB = Plan(dp_shard=1), Job(tokens=S, global_batch=1, sequence_length=S)

GQA = Model(name="gqa", source="made up", layers=2, hidden=HIDDEN, vocab=VOCAB, heads=8, kv_heads=2, head_dim=32, ffn=FFN,
            experts=EXPERTS, moe_layers=(False, True))  # fmt: skip
LATENT = LatentAttention(q_rank=48, kv_rank=32, nope_dim=24, rope_dim=8, v_dim=40)
MLA = GQA.model_copy(update={"name": "mla", "latent": LATENT, "kv_heads": 8})
PLAIN_QUERY = MLA.model_copy(update={"latent": LATENT.model_copy(update={"q_rank": None})})


# --- the blocks in torch ---


def weight(*shape: int):
    return torch.empty(*shape, device="meta", requires_grad=True)


def core_attention(q, k, v):
    """Attention over all keys, (heads, S, width) each."""
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1), v)


def heads_first(x, heads: int):
    return x.view(S, heads, -1).transpose(0, 1)


def heads_last(x):
    return x.transpose(0, 1).reshape(S, -1)


def gqa(x, model: Model):
    heads, kv, dim = model.heads, model.kv_heads, model.head_dim
    q, k, v = (heads_first(x @ weight(HIDDEN, n * dim), n) for n in (heads, kv, kv))
    k, v = (t.repeat_interleave(heads // kv, dim=0) for t in (k, v))
    return heads_last(core_attention(q, k, v)) @ weight(heads * dim, HIDDEN)


def mla(x, model: Model):
    a, heads = model.latent, model.heads
    q_input = x @ weight(HIDDEN, a.q_rank) if a.q_rank else x
    q = heads_first(q_input @ weight(a.q_rank or HIDDEN, heads * (a.nope_dim + a.rope_dim)), heads)
    latent = x @ weight(HIDDEN, a.kv_rank + a.rope_dim)
    up = heads_first(latent[:, : a.kv_rank] @ weight(a.kv_rank, heads * (a.nope_dim + a.v_dim)), heads)
    rope = latent[:, a.kv_rank :].expand(heads, S, a.rope_dim)
    k, v = torch.cat([up[..., : a.nope_dim], rope], dim=-1), up[..., a.nope_dim :]
    return heads_last(core_attention(q, k, v)) @ weight(heads * a.v_dim, HIDDEN)


def mlp(x, ffn: int):
    gate, up = (x @ weight(HIDDEN, ffn) for _ in range(2))
    return (torch.nn.functional.silu(gate) * up) @ weight(ffn, HIDDEN)


def moe(x, e: Experts):
    """Balanced: each of the experts gets the same number of copies; which ones is of no consequence to the count."""
    scores = torch.softmax(x @ weight(HIDDEN, e.count), dim=-1)
    copies = (x.unsqueeze(1) * scores[:, : e.top_k, None]).reshape(e.count, S * e.top_k // e.count, HIDDEN)
    routed = torch.cat([mlp(rows, e.ffn) for rows in copies]).view(S, e.top_k, HIDDEN).sum(1)
    return routed + mlp(x, e.shared_ffn)


def layer(x, model: Model, kind: LayerKind):
    x = x + (mla if model.latent else gqa)(x, model)
    return x + (moe(x, model.experts) if kind.moe else mlp(x, model.ffn))


def counted(forward) -> tuple[int, int]:
    """Return torch's count of `forward` on an (S, HIDDEN) input that wants a gradient, and of its backward."""
    x = torch.empty(S, HIDDEN, device="meta", requires_grad=True)
    with FlopCounterMode(display=False) as there:
        y = forward(x)
    with FlopCounterMode(display=False) as back:
        y.sum().backward()
    return there.get_total_flops(), back.get_total_flops()


# --- ours ---


def ours(segments: tuple[Segment, ...], backward: bool) -> float:
    """Return the FLOP of a block with attention over all keys, and two products backward for each forward one."""
    scale = attended(S, None, causal=False) / attended(S, None) * (2 / ATTENTION_BACKWARD_FLOP if backward else 1)
    return float(total(segments, lambda op: op.flop * (scale if op.kind == "attention" else 1.0)))


@pytest.mark.parametrize(
    "model", [GQA, MLA, PLAIN_QUERY], ids=lambda m: f"{m.name}{'' if m.latent is None or m.latent.q_rank else '_plain_query'}"
)
@pytest.mark.parametrize("kind", GQA.kinds, ids=("dense", "moe"))
def test_layer(model, kind):
    block = transformer_layer(model, kind, PLAN, JOB)
    there, back = counted(lambda x: layer(x, model, kind))
    assert ours(block.forward, backward=False) == pytest.approx(there, rel=1e-3)
    assert ours(block.backward, backward=True) == pytest.approx(back, rel=1e-3)


def test_head():
    block = head(GQA, PLAN, JOB)
    there, back = counted(lambda x: x @ weight(HIDDEN, VOCAB))
    assert (ours(block.forward, False), ours(block.backward, True)) == (there, back)


def test_model_flop_per_token_is_three_forwards():
    """Two layers and the head, as Megatron-LM counts: backward twice the forward, attention over all keys."""

    def model(x):
        for kind in GQA.layer_kinds:
            x = layer(x, GQA, kind)
        return x @ weight(HIDDEN, VOCAB)

    there, back = counted(model)
    assert count(GQA, S).flop_per_token_noncausal == pytest.approx((there + back) / S, rel=1e-3)
    assert back == 2 * there


@pytest.mark.parametrize(("tp", "ep", "etp"), [(2, 1, 1), (1, 4, 1), (2, 2, 2), (2, 2, 1), (2, 4, 2)])
def test_ranks_share_the_work_of_one(tp, ep, etp):
    """FLOP of a layer over the ranks that its tokens are spread over add up to those of one rank that does everything.

    With tensor parallelism every rank of a group sees the same tokens; with expert parallelism alone each sees its own.
    MLA's down-projections and the router work on the split tokens, so nothing is computed twice.
    """
    plan = Plan(tp=tp, ep=ep, etp=etp, dp_shard=max(1, ep * etp // tp))
    for model in (GQA, MLA):
        for kind in model.kinds:
            one, shared = (transformer_layer(model, kind, p, JOB) for p in (PLAN, plan))
            for field in ("forward", "backward"):
                alone, each = (float(total(getattr(b, field), lambda op: op.flop)) for b in (one, shared))
                assert each * tp == pytest.approx(alone, rel=1e-12)


def test_ranks_without_a_key_value_head_of_their_own_compute_one_again():
    """tp = 4 and 2 key-value heads: each rank projects one head, so both heads are projected twice."""
    plan = Plan(tp=4, dp_shard=1)
    one, shared = (float(total(transformer_layer(GQA, GQA.kinds[0], p, JOB).forward, lambda op: op.flop)) for p in (PLAN, plan))
    assert 4 * shared - one == pytest.approx(2 * S * HIDDEN * (2 * GQA.kv_heads * GQA.head_dim), rel=1e-9)


@pytest.mark.parametrize("model", [GQA, MLA], ids=("gqa", "mla"))
@pytest.mark.parametrize(("recompute", "repeated"), [("selective", {"attention"}), ("full", {"attention", "gemm", "grouped_gemm"})])
def test_recompute_repeats_the_forward(model, recompute, repeated):
    """Full recompute adds one forward to the backward; selective recompute of attention adds the attention kernel."""
    plain, again = (transformer_layer(model, model.kinds[1], p, JOB) for p in (PLAN, PLAN.model_copy(update={"recompute": recompute})))
    added = float(total(again.backward, lambda op: op.flop) - total(plain.backward, lambda op: op.flop))
    assert added == pytest.approx(float(total(plain.forward, lambda op: op.flop if op.kind in repeated else 0.0)), rel=1e-12)
