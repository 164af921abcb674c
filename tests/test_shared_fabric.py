"""Oracle: sums by hand on a thin top tier, where two jobs meet or do not."""

from __future__ import annotations

import pytest

from simulator.errors import PlanError, ProfileError
from simulator.scenario.profiles import FABRICS
from simulator.scenario.scenario import Scenario
from simulator.shared_fabric import share_fabric
from tests.test_topology import of

CLUSTER = of("ib-ndr-clos-2to1", 512)


def on(hosts: tuple[int, ...], cluster=CLUSTER) -> Scenario:
    """Return a job whose expert groups have one member in each of its hosts."""
    plan = {"tp": 8, "etp": 8, "ep": len(hosts), "dispatcher": "alltoall", "recompute": "full", "placement": {"hosts": hosts}}
    return Scenario(model="qwen3-30b-a3b", cluster=cluster, plan=plan, job={"tokens": 1e12, "global_batch": 64, "sequence_length": 4096})


def slowdowns(jobs) -> dict:
    table = share_fabric(jobs)
    return table[table["kind"] == "all_to_all"].set_index("job")["slowdown"].to_dict()


def test_jobs_under_leaves_of_their_own_do_not_meet():
    per_leaf = FABRICS.load("ib-ndr-clos-2to1").tiers[0].accelerators // 8
    a, b = tuple(range(per_leaf)), tuple(range(per_leaf, 2 * per_leaf))
    assert slowdowns({"a": on(a), "b": on(b)}) == pytest.approx({"a": 1.0, "b": 1.0})


def test_jobs_that_share_leaves_share_their_cables():
    """Each job has a half of two leaves; alone its all-to-all fills half of the cables up, both fill more than there are."""
    per_leaf = FABRICS.load("ib-ndr-clos-2to1").tiers[0].accelerators // 8
    half = per_leaf // 2
    a = (*range(half), *range(per_leaf, per_leaf + half))
    b = (*range(half, per_leaf), *range(per_leaf + half, 2 * per_leaf))
    found = slowdowns({"a": on(a), "b": on(b)})
    # half of the members are under the other leaf: `per_leaf` x 8 NICs send n / 2 / (n - 1) of their rate up, half of which fits
    n = len(a)
    wanted = (n / 2) / (n - 1) / 0.5
    assert wanted > 1
    assert found["a"] == pytest.approx(wanted, rel=1e-6)
    assert found["a"] == pytest.approx(found["b"])


def test_bad_questions_are_refused():
    a = on((0, 1, 2, 3))
    with pytest.raises(PlanError, match="host 3 is used by a and b"):
        share_fabric({"a": a, "b": on((3, 4, 5, 6))})
    with pytest.raises(ProfileError, match="1 job shares"):
        share_fabric({"a": a})
    with pytest.raises(ProfileError, match="different clusters"):
        share_fabric({"a": a, "b": on((4, 5, 6, 7), of("ib-ndr-rail", 512))})
