"""Small models, clusters and random scenarios that tests share: every fact is a shipped profile's, only the counts are small."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from simulator.scenario.cluster import Cluster, Host
from simulator.scenario.facts import Source
from simulator.scenario.job import Job
from simulator.scenario.kernels import Kernels
from simulator.scenario.model import Experts, Model
from simulator.scenario.overlap import Overlap
from simulator.scenario.plan import INTERLEAVED, TWO_CHUNKS, Plan
from simulator.scenario.profiles import CLUSTERS
from simulator.scenario.scenario import Scenario

SELECTIVE = ("core_attn", "layernorm", "moe_act")
#: what training stacks ran before, and now
STACKS = (
    Kernels(),
    Kernels(graphs=("attn", "moe_router")),
    Kernels(experts="fused", graphs=("full",)),
    Kernels(attention="unfused", dropout=True),
    Kernels(attention="eager", norm="eager", pointwise="eager", accumulation="separate", gate="separate"),
)
SCHEDULES = ("gpipe", "1f1b", "zb-h1", "zb-h2", "zb-1p", "zb-2p", *INTERLEAVED, *TWO_CHUNKS)
H100 = CLUSTERS.load("h100-rail-10240")


def cluster(accelerators: int, host: int = 4, slow_hosts: dict[int, float] | None = None, dispatch_s: float | None = None) -> Cluster:
    """Return `accelerators` H100 in hosts of `host`, whose launches take no time unless `dispatch_s` says so."""
    box = Host.model_validate(H100.host.model_dump(mode="json") | {"accelerators": host, "scale_up_domain": host})
    sources = tuple(s.model_copy(update={"facts": facts}) for s in box.sources if (facts := tuple(f for f in s.facts if f != "dispatch_s")))
    known = Source(grade="assumed", source="a host that a test is about", facts=("dispatch_s",))
    box = box.model_copy(update={"dispatch_s": dispatch_s, "sources": sources if dispatch_s is None else (*sources, known)})
    return H100.model_copy(update={"name": "small", "host": box, "accelerators": accelerators, "slow_hosts": slow_hosts or {}})


def dense(layers: int = 8, hidden: int = 256, **changes: Any) -> Model:
    sizes = {"vocab": 1024, "heads": 8, "kv_heads": 4, "head_dim": hidden // 8, "ffn": 4 * hidden, "name": "dense", "source": "made up"}
    return Model(layers=layers, hidden=hidden, **(sizes | changes))


def moe(layers: int = 8, hidden: int = 256, leading: int = 1, **changes: Any) -> Model:
    """Return a model of 8 experts per layer behind `leading` dense layers, top 2, and a shared expert."""
    experts = Experts(count=8, top_k=2, ffn=hidden, shared_ffn=hidden)
    kinds = (False,) * leading + (True,) * (layers - leading)
    return dense(layers, hidden, **({"name": "moe", "experts": experts, "moe_layers": kinds} | changes))


def job(global_batch: int = 16, sequence_length: int = 512, **changes: Any) -> Job:
    return Job(tokens=10 * global_batch * sequence_length, global_batch=global_batch, sequence_length=sequence_length, **changes)


class Small(Scenario):
    """A scenario that a failing test can print."""

    def __repr__(self) -> str:
        m, p, c = self.model, self.plan, self.cluster
        size = f"{m.name} {m.layers}+{m.mtp_layers} layers of {m.hidden}, {c.accelerators} in hosts of {c.host.accelerators} {c.slow_hosts}"
        size += f"; {p.kernels} dispatch {c.host.dispatch_s}"
        more = f"cp{p.cp} replicas {p.dp_replicate} layout {p.layout} sp {p.sequence_parallel} {p.dispatcher} {p.overlap}"
        return f"<{size}; {p} {more}; {self.job}>"


def scenario(model: Model, accelerators: int, plan: Plan, micro_batches: int, host: int = 4, **changes: Any) -> Scenario:
    """Return a scenario with as many sequences as `micro_batches` need."""
    plan = plan.on(accelerators)
    slow, dispatch = changes.pop("slow_hosts", None), changes.pop("dispatch_s", None)
    batch = micro_batches * plan.dp * plan.micro_batch
    return Small(model=model, cluster=cluster(accelerators, host, slow, dispatch), plan=plan, job=job(batch, **changes))


@st.composite
def scenarios(
    draw: st.DrawFn,
    worlds: tuple[int, ...] = (8, 16, 32),
    hidden: tuple[int, ...] = (256, 2048),
    micro_batches: int = 9,
    slow: bool = False,
    natural: bool = False,
    uneven: bool = True,
) -> Scenario:
    """Draw a legal scenario: dense or MoE, any degrees, ZeRO stage, schedule, layout, recompute and overlap."""

    def one(*choices: Any) -> Any:
        return draw(st.sampled_from(choices))

    def divisor(n: int, at_most: int) -> int:
        return one(*(d for d in range(1, min(n, at_most) + 1) if n % d == 0))

    world = one(*worlds)
    pp = divisor(world, 4)
    tp = divisor(world // pp, 4)
    cp = divisor(world // (pp * tp), 2)
    dp = world // (pp * tp * cp)
    replicas = divisor(dp, 2)
    sparse = natural or one(False, True)
    inner = dp // replicas * cp * tp
    ep = divisor(inner, 8) if sparse else 1
    etp = divisor(inner // ep, 2) if sparse else 1
    schedule = one("gpipe", "1f1b", "interleaved")
    vpp = one(2, 3) if schedule == "interleaved" else 1
    per_stage = one(1, 2)
    layers, layout = pp * vpp * per_stage, None
    if uneven:
        layers += one(0, 0, 1, 3)
        layout = "balanced" if layers % (pp * vpp) else one(None, "balanced")
    legal = [m for m in range(1, micro_batches + 1) if schedule != "interleaved" or m % max(1, m // pp) == 0]
    split, zero = sparse or one(True, False), one(0, 1, 2, 3)
    plan = Plan(
        tp=tp, cp=cp, pp=pp, vpp=vpp, ep=ep, etp=etp, dp_replicate=replicas, zero=zero, micro_batch=one(1, 2),
        schedule=schedule, layout=layout, recompute=one("none", "selective", "full"), recompute_modules=SELECTIVE,
        sequence_parallel=split, dispatcher=one("alltoall", "deepep", "hybridep"),
        overlap=Overlap(
            grad_reduce=one(True, False), param_gather=one(True, False), tp=one(True, False, *["pieces"] * split), pp=one(True, False),
            prefetch=one(0, 1, 2, 3) if zero == 3 else 1,
        ),
        kernels=one(*STACKS),
    )  # fmt: skip
    size = one(*hidden)
    extra = {"mtp_layers": one(0, 1) if uneven else 0}
    model = moe(layers, size, leading=one(0, 1) if uneven and layers > 1 else 0, **extra) if sparse else dense(layers, size, **extra)
    host = one(2, 4, 8)
    changes: dict[str, Any] = {"sequence_length": one(512, 1024), "dispatch_s": one(None, 1e-6, 40e-6)}
    if natural:
        changes |= {"routing": "natural", "expert_load": min(float(ep), one(1.1, 1.7))}
    if slow:
        hosts = world // host
        changes["slow_hosts"] = draw(st.dictionaries(st.integers(0, hosts - 1), st.sampled_from((1.1, 1.5)), min_size=1, max_size=2))
    return scenario(model, world, plan, one(*legal), host, **changes)


def roomy(s: Scenario) -> Scenario:
    """Return `s` on accelerators with memory for anything: what is asked is how long the step takes."""
    accelerator = s.cluster.accelerator.model_copy(update={"hbm_bytes": 1e15})
    return s.model_copy(update={"cluster": s.cluster.model_copy(update={"accelerator": accelerator})})


@st.composite
def any_schedule(draw: st.DrawFn, experts: bool) -> Scenario:
    """Draw a small scenario that runs under some schedule."""
    name, pp = draw(st.sampled_from(SCHEDULES)), draw(st.sampled_from([2, 4]))
    vpp = 2 if name in TWO_CHUNKS + INTERLEAVED else 1
    stages = pp * (1 if name == "dualpipe" else vpp)
    m = pp * draw(st.sampled_from([2, 3, 6]))
    layers, hidden = stages * draw(st.integers(1, 2)), draw(st.sampled_from([256, 2048]))
    model = moe(layers=layers, hidden=hidden) if experts else dense(layers, hidden)
    ep = draw(st.sampled_from([1, 8])) if experts else 1
    tp = draw(st.sampled_from([1, 2]))
    plan = Plan(
        tp=tp, pp=pp, vpp=vpp, ep=ep, schedule=name, dp_shard=8 // tp, zero=draw(st.sampled_from([0, 1, 2, 3])), dispatcher="deepep",
        layout=draw(st.sampled_from([None, "balanced"])), recompute=draw(st.sampled_from(["none", "selective"])),
        overlap=Overlap(pp=draw(st.booleans()), prefetch=draw(st.sampled_from([0, 1, 3]))),
    )  # fmt: skip
    step = Job(tokens=512 * m * plan.dp * 10, global_batch=m * plan.dp, sequence_length=512)
    return Small(model=model, cluster=H100.model_copy(update={"accelerators": 8 * pp}), plan=plan, job=step)
