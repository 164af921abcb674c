"""Oracle: every order of the axes on every order of the hosts, their bytes counted flow by flow."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from small import cluster, dense, job, moe

from simulator.errors import PlanError
from simulator.feasibility import check, structure
from simulator.placing import fewest_bytes, step_traffic, tier_bytes
from simulator.scenario.mesh import accelerator_of, members
from simulator.scenario.plan import Plan
from simulator.scenario.scenario import Scenario
from simulator.simulate import simulate_step


def podded(model, plan: Plan, pod: int, oversubscription: float = 4.0, **of_job) -> Scenario:
    """Return a scenario on 8 accelerators in 4 hosts, in pods of `pod` accelerators."""
    at = cluster(8, host=2)
    leaf, last = at.fabric.tiers[0], at.fabric.tiers[-1]
    tiers = (leaf.model_copy(update={"accelerators": pod, "oversubscription": oversubscription}), last)
    fabric = at.fabric.model_copy(update={"tiers": tiers})
    return Scenario(model=model, cluster=at.model_copy(update={"fabric": fabric}), plan=plan, job=job(16, **of_job))


def counted(s: Scenario, block: int, traffic: dict) -> float:
    """Return the bytes that leave blocks, flow by flow: the neighbours of a ring in order of place, all pairs of an all-to-all."""
    where, total = accelerator_of(s.plan, 2), 0.0
    for (axis, kind), size in traffic.items():
        number = members(s.plan, axis)
        for g in np.unique(number):
            places = where[number == g].tolist()
            n = len(places)
            if kind == "send":
                total += sum(size * n / (n - 1) for a, b in itertools.pairwise(places) if a // block != b // block)
            elif kind == "all_to_all":
                sent = size * s.model.experts.top_k / n
                total += sum(sent for a in places for b in places if a // block != b // block)
            else:
                passes = 2 if kind == "all_reduce" else 1
                ring = sorted(places)
                pairs = zip(ring, ring[1:] + ring[:1])
                total += sum(passes * (n - 1) / n * size for a, b in pairs if a // block != b // block)
    return total


def placed(s: Scenario, **changes) -> Scenario:
    place = s.plan.placement.model_copy(update=changes)
    return s.model_copy(update={"plan": s.plan.model_copy(update={"placement": place})})


def placements(s: Scenario):
    """Yield every legal order of the axes on every order of the hosts."""
    for order in map("-".join, itertools.permutations(("tp", "cp", "ep", "dp", "pp"))):
        if not structure(placed(s, order=order)):
            yield from (placed(s, order=order, hosts=hosts) for hosts in itertools.permutations(range(4)))


LONG = {"sequence_length": 4096}
CASES = {
    "stages inside a pod": podded(dense(), Plan(pp=2), 4, **LONG),
    "tensor and pipeline": podded(dense(), Plan(tp=2, pp=2), 4, **LONG),
    "experts": podded(moe(), Plan(ep=4, pp=2, dispatcher="alltoall"), 4),
    "experts over pods": podded(moe(), Plan(ep=2, tp=2, etp=1, dispatcher="alltoall"), 4),
    "pods of one host": podded(moe(), Plan(ep=4, pp=2, dispatcher="alltoall"), 2),
    "pods of three hosts": podded(dense(), Plan(tp=2, pp=4), 6, **LONG),
}


@pytest.mark.parametrize("name", CASES)
def test_no_placement_sends_fewer_bytes_over_the_dearest_tier(name):
    s = CASES[name]
    block = int(tier_bytes(s)["accelerators"].iloc[0])
    best = fewest_bytes(s)
    found, traffic = tier_bytes(best)["crossing_bytes"].iloc[0], step_traffic(s)
    assert found == pytest.approx(counted(best, block, traffic), rel=1e-9)
    assert found == pytest.approx(min(counted(tried, block, traffic) for tried in placements(s)), rel=1e-9)


def test_the_usual_order_loses_where_messages_outweigh_gradients():
    s = podded(dense(), Plan(pp=2), 4, sequence_length=65536)
    usual, best = (tier_bytes(x)["crossing_bytes"].iloc[0] for x in (s, fewest_bytes(s)))
    assert best < usual / 2
    assert fewest_bytes(s).plan.placement.order.index("pp") < fewest_bytes(s).plan.placement.order.index("dp")


def test_scattered_hosts_come_together_again():
    s = CASES["experts"]
    scattered = placed(s, hosts=(0, 2, 1, 3))
    assert tier_bytes(fewest_bytes(scattered))["crossing_bytes"].tolist() == tier_bytes(fewest_bytes(s))["crossing_bytes"].tolist()


def test_a_scenario_asks_for_it_by_name(tmp_path):
    s = CASES["stages inside a pod"]
    asked = s.with_plan(placement={"order": "fewest-bytes"})
    assert "call simulator.fewest_bytes(scenario) first" in str(check(asked)[0])
    assert simulate_step(asked).step_time_s == simulate_step(fewest_bytes(s)).step_time_s
    shipped = Scenario.load(Path(__file__).parents[1] / "examples" / "deepseek-v3-2048-h800.yaml")
    shipped.with_plan(placement={"order": "fewest-bytes"}).save(tmp_path / "s.yaml")
    assert Scenario.load(tmp_path / "s.yaml").plan.placement.order == "fewest-bytes"


def test_a_plan_that_no_order_makes_legal_is_refused():
    with pytest.raises(PlanError):
        fewest_bytes(podded(moe(), Plan(ep=3), 4))
