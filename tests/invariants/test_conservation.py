"""Nothing is lost or counted twice: FLOP, messages, meetings, seconds; and faster hardware is never slower."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import scenarios

from simulator.scenario.cluster import Cluster
from simulator.scenario.mesh import members
from simulator.scenario.plan import Plan
from simulator.scenario.scenario import Scenario
from simulator.simulate import classify, simulate_step
from simulator.workload.build import build_step
from simulator.workload.ops import total
from simulator.workload.stages import blocks, stage_blocks
from simulator.workload.step import StepProgram

EXACT = 1e-12
#: what a faster link may cost a step whose kernels it takes bandwidth from: the mean over a pass stands for each of its kernels
SHARED_MEMORY = 1e-3


def program(s: Scenario, every_rank: bool = False) -> StepProgram:
    heaviest = s.job.expert_load if s.job.routing == "natural" else 1.0
    return build_step(s.model, s.plan, s.job, classify(s.plan, s.cluster, heaviest, every_rank))


def flop_per_class(p: StepProgram) -> np.ndarray:
    """Return the FLOP of each class of ranks in the whole step, optimizer left out."""
    of_task = np.array([sum(float(op.flop) for op in task.ops if not op.name.startswith("optimizer")) for task in p.tasks])
    return np.bincount(np.asarray(p.rank_class), weights=of_task[np.asarray(p.task)])


def micro_batches(s: Scenario) -> int:
    return s.job.global_batch // (s.plan.dp * s.plan.micro_batch)


# --- work ---


@settings(max_examples=60, deadline=None)
@given(scenarios(hidden=(256,)))
def test_a_rank_computes_its_blocks_once_per_micro_batch(s):
    p, stages, kinds = program(s), stage_blocks(s.model, s.plan, s.job), blocks(s.model, s.plan, s.job)
    per_block = {name: float(total(b.forward + b.backward, lambda op: op.flop)) for name, b in kinds.items()}
    for c, flop in enumerate(flop_per_class(p)):
        rank = int(p.classes.stage[c])
        own = sum(per_block[name] for stage in stages[rank :: s.plan.pp] for name in stage)
        assert flop == pytest.approx(micro_batches(s) * own, rel=EXACT)


@settings(max_examples=60, deadline=None)
@given(scenarios(hidden=(256,)))
def test_the_cluster_computes_the_same_however_it_is_divided(s):
    """All ranks' FLOP equal those of one rank with the whole batch: no layer is lost, doubled or divided by the wrong degree."""
    divided = s.model_copy(update={"plan": s.plan.model_copy(update={"recompute": "none", "sequence_parallel": True})})
    alone = s.cluster.model_copy(update={"accelerators": 1, "slow_hosts": {}})
    whole = s.model_copy(update={"plan": Plan(dp_shard=1, kernels=s.plan.kernels), "cluster": alone})
    p = program(divided)
    assert (flop_per_class(p) * p.classes.count).sum() == pytest.approx(flop_per_class(program(whole)).sum(), rel=1e-9)


# --- messages and meetings ---


@settings(max_examples=40, deadline=None)
@given(scenarios(worlds=(8, 16), hidden=(256,), micro_batches=5, slow=True), st.booleans())
def test_every_message_has_one_receiver(s, every_rank):
    p = program(s, every_rank)
    stages = s.plan.pp * s.plan.vpp
    senders = [n for n, task in enumerate(p.task) if p.tasks[task].name == "send"]
    expected = 2 * (stages - 1) * micro_batches(s) * len(p.classes.stage) // s.plan.pp if s.plan.pp > 1 else 0
    assert len(senders) == expected
    waits = ((n, need) for n, needs in enumerate(p.needs) for need in needs if p.tasks[p.task[need]].name == "send")
    received = Counter(need for n, need in waits if p.rank_class[n] != p.rank_class[need])  # its own rank may wait until it has left
    assert received == dict.fromkeys(senders, 1)
    for node, needs in enumerate(p.needs):
        for need in needs:
            if p.tasks[p.task[need]].name != "send":  # across ranks, only messages are waited for
                assert p.rank_class[need] == p.rank_class[node]
            if p.rank_class[need] == p.rank_class[node]:
                continue
            there, here = p.label[need], p.label[node]
            assert (there.kind, there.micro_batch) == (here.kind, here.micro_batch)
            step = 1 if here.kind == "F" else -1
            from_stage, to_stage = (a.chunk * s.plan.pp + int(p.classes.stage[p.rank_class[n]]) for a, n in ((there, need), (here, node)))
            assert to_stage == from_stage + step


@settings(max_examples=40, deadline=None)
@given(scenarios(worlds=(8, 16), hidden=(256,), micro_batches=3))
def test_whole_groups_meet_in_the_same_collective(s):
    p = program(s, every_rank=True)
    meetings: dict[int, list[int]] = {}
    for node, meet in enumerate(p.meet):
        if meet >= 0:
            meetings.setdefault(meet, []).append(node)
    groups = {axis: members(s.plan, axis) for axis in p.classes.meets}
    for nodes in meetings.values():
        tasks = [p.tasks[p.task[n]] for n in nodes]
        assert len({(task.name, task.axis, task.ops[0].kind, float(task.ops[0].bytes)) for task in tasks}) == 1
        group = groups[tasks[0].axis]
        ranks = [p.rank_class[n] for n in nodes]
        assert sorted(ranks) == np.flatnonzero(group == group[ranks[0]]).tolist()


# --- seconds ---


@settings(max_examples=60, deadline=None)
@given(scenarios(hidden=(256,), slow=True, natural=True))
def test_a_stream_never_overlaps_itself(s):
    t = simulate_step(s).timeline
    assert (t.end_s >= t.start_s).all()
    for c in range(len(t.ranks)):
        for stream in set(t.stream[t.rank_class == c]):
            mine = (t.rank_class == c) & (t.stream == stream)
            assert (t.start_s[mine][1:] >= t.end_s[mine][:-1]).all()


@settings(max_examples=60, deadline=None)
@given(st.one_of(scenarios(), scenarios(slow=True), scenarios(slow=True, natural=True)))
def test_compute_exposed_and_idle_add_up_to_the_step(s):
    result = simulate_step(s)
    step, spent = result.step_time_s, result.timeline.exposed()
    exposed = [c for c in spent if c.endswith("_exposed_s")]
    assert (spent[["compute_s", *exposed, "host_s", "idle_s"]] >= 0).all(axis=None)
    assert spent[["compute_s", *exposed, "host_s", "idle_s"]].sum(axis=1).to_numpy() == pytest.approx(step, rel=EXACT)
    assert spent["ranks"].sum() == s.plan.world

    parts = result.breakdown()
    weight = spent["ranks"] / spent["ranks"].sum()
    assert parts["seconds"].sum() == pytest.approx(step, rel=EXACT)
    assert parts["share"].sum() == pytest.approx(1.0, rel=EXACT)
    compute = parts.loc[parts["part"].str.startswith("compute"), "seconds"].sum()
    assert compute == pytest.approx(((spent["compute_s"] + spent["host_s"]) * weight).sum(), rel=1e-9)
    idle = parts.set_index("part")["seconds"]["idle"]
    assert idle == pytest.approx((spent["idle_s"] * weight).sum(), rel=1e-9, abs=1e-9 * step)


@settings(max_examples=30, deadline=None)
@given(scenarios(hidden=(256,), slow=True, natural=True))
def test_the_same_scenario_twice_gives_the_same_timeline(s):
    first, second = simulate_step(s).timeline, simulate_step(s).timeline
    for field in ("rank_class", "stage", "stream", "name", "action", "start_s", "end_s", "ranks"):
        assert (getattr(first, field) == getattr(second, field)).all()


# --- faster hardware ---


def faster(cluster: Cluster, what: str) -> Cluster:
    """Return a cluster of which one thing is twice as good."""

    def part(name: str, **changes: object) -> Cluster:
        return cluster.model_copy(update={name: getattr(cluster, name).model_copy(update=changes)})

    def halved(latency):
        return latency.model_copy(update={k: getattr(latency, k) / 2 for k in ("ll", "ll128", "simple")})

    a, h, f = cluster.accelerator, cluster.host, cluster.fabric
    return {
        "nic": lambda: part("host", nic_bytes_per_s=2 * h.nic_bytes_per_s),
        "scale-up": lambda: part("host", bus_bytes_per_s={k: 2 * v for k, v in h.bus_bytes_per_s.items()}),
        "host latency": lambda: part("host", base_latency_s=halved(h.base_latency_s), hop_latency_s=halved(h.hop_latency_s)),
        "network latency": lambda: part(
            "fabric",
            hop_latency_s=halved(f.hop_latency_s),
            tiers=tuple(tier.model_copy(update={"latency_s": tier.latency_s / 2}) for tier in f.tiers),
        ),
        "hbm": lambda: part("accelerator", hbm_bytes_per_s=2 * a.hbm_bytes_per_s),
        "peak": lambda: part("accelerator", peak_flop_per_s={k: 2 * v for k, v in a.peak_flop_per_s.items()}),
        "launch": lambda: part("accelerator", launch_s=a.launch_s / 2),
    }[what]()


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(scenarios(), scenarios(slow=True, natural=True)),
    st.sampled_from(("nic", "scale-up", "host latency", "network latency", "hbm", "peak", "launch")),
)
def test_faster_hardware_never_slows_the_step(s, what):
    """Exactly, but for faster links: kernels beside communication that outlasts them lose more of the memory's bandwidth to it."""
    better = s.model_copy(update={"cluster": faster(s.cluster, what)})
    slack = SHARED_MEMORY if what in ("nic", "scale-up", "host latency", "network latency") else EXACT
    assert simulate_step(better).step_time_s <= simulate_step(s).step_time_s * (1 + slack)


@settings(max_examples=40, deadline=None)
@given(scenarios(hidden=(256,), slow=True))
def test_a_slow_host_never_speeds_the_step(s):
    healthy = s.model_copy(update={"cluster": s.cluster.model_copy(update={"slow_hosts": {}})})
    assert simulate_step(healthy).step_time_s <= simulate_step(s).step_time_s * (1 + EXACT)
