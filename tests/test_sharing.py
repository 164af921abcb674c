"""Oracle: the closed form of the tiers on regular fabrics, bytes over the fullest link, and what fabrics are known for."""

from __future__ import annotations

import numpy as np
import pytest

from simulator.network import sharing
from simulator.network.sharing import flows, known, route, share, together
from simulator.pricing.contention import _covered
from simulator.pricing.operations import op_s
from simulator.scenario.mesh import members
from simulator.scenario.plan import Plan
from simulator.scenario.profiles import FABRICS, MODELS
from simulator.scenario.scenario import Scenario
from simulator.simulate import simulate_step
from simulator.workload.ops import Op
from tests.test_topology import of

KIMI = MODELS.load("kimi-k2")
PLAN = Plan(tp=1, pp=4, ep=64, dp_shard=512)  # 2,048 ranks; a stage is 512 of them
REGULAR = ["ib-ndr-rail", "ib-ndr-clos", "ib-ndr-clos-2to1", "ib-ndr-rail-only", "ib-ndr-rail-deepseek", "alibaba-hpn7", "roce-meta-24k"]


def routed(fabric: str, routing: str, accelerators: int = 2048):
    cluster = of(fabric, accelerators)
    return cluster.model_copy(update={"fabric": cluster.fabric.model_copy(update={"routing": routing})})


@pytest.mark.parametrize("dispatcher", ["deepep", "alltoall"])
@pytest.mark.parametrize("fabric", REGULAR)
def test_graph_and_tiers_agree_where_groups_fall_on_block_borders(fabric, dispatcher):
    cluster = of(fabric, 2048)
    plan = PLAN.model_copy(update={"dispatcher": dispatcher})
    for op in (
        Op("dispatch", "all_to_all", bytes=1e9, axis="ep"),
        Op("gather", "all_gather", bytes=1e9, axis="edp"),
        Op("reduce", "reduce_scatter", bytes=1e9, axis="dp"),
        Op("send", "send", bytes=1e8, axis="pp"),
    ):
        tiers, graph = (float(op_s(op, KIMI, plan, cluster, graph=g)) for g in (False, True))
        # the tiers count the groups that do not fall on a border by their worst case: the graph may be faster
        assert graph <= tiers * (1 + 1e-9), op.name
        if op.axis in ("ep", "edp"):
            assert graph == pytest.approx(tiers, rel=1e-9), op.name


@pytest.mark.parametrize("routing", ["sprayed", "hashed"])
def test_an_all_to_all_takes_its_fullest_link_over_its_rate_when_all_flows_are_alike(routing):
    cluster = routed("ib-ndr-clos-2to1", routing)
    built, _ = known(cluster)
    sent = flows(PLAN, cluster, "ep", "all_to_all")
    paths = route(built, cluster, sent, pxn=True)
    load = np.bincount(paths.links, minlength=len(paths.capacity)) / paths.capacity
    each = np.bincount(sent.source).max() / cluster.host.nic_bytes_per_s
    kept = share(PLAN, cluster, "ep", "all_to_all")
    assert kept.rate <= each / load.max() * (1 + 1e-9), "no faster than the fullest link"
    if routing == "sprayed":
        assert kept.rate == pytest.approx(each / load.max(), rel=1e-9)


def test_every_pair_of_an_expert_group_in_different_hosts_has_one_flow():
    cluster = of("ib-ndr-rail", 2048)
    sent = flows(PLAN, cluster, "ep", "all_to_all")
    number = members(PLAN, "ep")
    assert (number[sent.source] == number[sent.target]).all()
    assert len(sent.source) == 32 * 64 * 56
    assert len(np.unique(sent.source * 2048 + sent.target)) == len(sent.source)
    rails = flows(PLAN, cluster, "ep", "rail_all_to_all")
    assert (rails.source % 8 == rails.target % 8).all()
    assert len(rails.source) == 2048 * 7


def test_rails_and_a_plain_clos_are_equal_in_bandwidth_and_apart_in_hops_and_collisions():
    rail, clos = ({r: routed(f, r) for r in ("sprayed", "hashed")} for f in ("ib-ndr-rail", "ib-ndr-clos"))
    plan = PLAN.model_copy(update={"dispatcher": "deepep"})
    even = [share(plan, c["sprayed"], "ep", "all_to_all") for c in (rail, clos)]
    assert [s.rate for s in even] == pytest.approx([1.0, 1.0])
    assert [s.level for s in even] == [0, 1], "one switch against three"
    collide = [share(plan, c["hashed"], "ep", "all_to_all").rate for c in (rail, clos)]
    assert collide[0] == pytest.approx(1.0)
    assert collide[1] < 0.8


def test_without_pxn_cross_rail_traffic_climbs_to_the_spine():
    cluster = of("ib-ndr-rail", 2048)
    built, _ = known(cluster)
    sent = flows(PLAN, cluster, "ep", "all_to_all")
    with_pxn, without = (route(built, cluster, sent, pxn) for pxn in (True, False))
    assert with_pxn.level.max() == 0
    assert (without.level == 1).mean() == pytest.approx(7 / 8)
    hashed = routed("ib-ndr-rail", "hashed")
    rates = [share(PLAN.model_copy(update={"pxn": pxn}), hashed, "ep", "all_to_all").rate for pxn in (True, False)]
    assert rates[1] < rates[0] == pytest.approx(1.0)


def test_a_thin_top_tier_is_free_in_one_pod_and_a_multiple_when_groups_scatter():
    cluster = of("roce-meta-24k", 24576)
    plan = Plan(tp=1, pp=1, ep=64, dp_shard=24576, dispatcher="deepep")
    assert share(plan, cluster, "ep", "all_to_all").rate == pytest.approx(1.0)
    hosts = np.arange(3072).reshape(8, 384).T.ravel()  # neighbours in rank, in different pods
    scattered = plan.model_copy(update={"placement": plan.placement.model_copy(update={"hosts": tuple(hosts.tolist())})})
    # all of a group's traffic leaves the pod, over 9/8 / 7 of the bandwidth of the NICs
    assert share(scattered, cluster, "ep", "all_to_all").rate == pytest.approx(9 / 8 / 7, rel=1e-6)


def test_two_kinds_at_once_halve_each_other_on_the_nic():
    cluster = of("ib-ndr-rail", 2048)
    assert together(cluster, ((PLAN, "ep", "all_to_all"), (PLAN, "edp", "all_gather"))) == pytest.approx((2.0, 2.0))
    assert together(cluster, ((PLAN, "edp", "all_gather"),)) == pytest.approx((1.0,))


def test_jobs_on_hosts_of_their_own_contend_only_above_the_leaves():
    half = Plan(tp=1, ep=64, dp_shard=1024, dispatcher="deepep")
    even, odd = (
        half.model_copy(update={"placement": half.placement.model_copy(update={"hosts": tuple(range(first, 256, 2))})}) for first in (0, 1)
    )
    patterns = ((even, "ep", "all_to_all"), (odd, "ep", "all_to_all"))
    assert together(of("ib-ndr-clos", 2048), patterns) == pytest.approx((1.0, 1.0))
    shared = together(of("ib-ndr-clos-2to1", 2048), patterns)
    assert shared == pytest.approx((12 / 7, 12 / 7)), "6 of 7 peers are under other leaves: 32 NICs * 6/7 over 16 uplinks"


def test_what_is_solved_is_remembered(monkeypatch):
    cluster = of("ib-ndr-rail", 2048)
    first = share(PLAN, cluster, "ep", "all_to_all")
    monkeypatch.setattr(sharing, "flow_times", None)
    assert share(PLAN, cluster.model_copy(), "ep", "all_to_all") is first


SCENARIO = Scenario(
    model="qwen3-30b-a3b",
    cluster="superpod-1024-h100",
    plan={"ep": 32, "dispatcher": "deepep", "recompute": "full"},
    job={"tokens": 1e12, "global_batch": 1024, "sequence_length": 4096},
)


def test_a_fault_costs_the_step_what_it_takes_from_its_links():
    whole = simulate_step(SCENARIO)
    broken = [
        simulate_step(SCENARIO.model_copy(update={"cluster": SCENARIO.cluster.model_copy(update={"degraded": {part: left}})}))
        for part, left in (("spine 0", 0.0), ("rail 3", 0.5), ("accelerator 17", 0.5))
    ]
    assert broken.pop(0).step_time_s == whole.step_time_s, "few flows climb to the spines; 15 of 16 are enough"
    assert whole.step_time_s < min(b.step_time_s for b in broken)
    table = broken[0].network().set_index(["axis", "kind"])
    assert table.loc[("ep", "all_to_all"), "nic_share"] == pytest.approx(0.5)
    assert table.loc[("ep", "all_to_all"), "hottest"].startswith("NIC out")


def test_contention_only_lengthens_and_by_no_more_than_all_overlap():
    without, with_it = simulate_step(SCENARIO), simulate_step(SCENARIO, contention=True)
    assert without.step_time_s <= with_it.step_time_s
    communication = without.breakdown().loc[lambda t: t["part"].str.startswith("exposed"), ["seconds", "hidden_s"]].to_numpy().sum()
    assert with_it.step_time_s <= without.step_time_s + 2 * communication


def test_overlap_of_intervals():
    begin, finish = np.array([5.0, 1.0]), np.array([6.0, 3.0])
    found = _covered(begin, finish, np.array([0.0, 2.0, 3.0, 0.0, 5.5]), np.array([2.0, 5.5, 4.0, 10.0, 9.0]))
    assert found.tolist() == [1.0, 1.5, 0.0, 3.0, 0.5]


def test_shipped_routing_is_said():
    assert FABRICS.load("ib-ndr-rail").routing == "sprayed"
