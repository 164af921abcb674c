"""Questions to the planner on small clusters: answers that hold by arithmetic, and one clear error where there is none."""

from __future__ import annotations

import pytest
from small import Small, cluster, dense, job, moe

from simulator.errors import PlanError, ProfileError
from simulator.planning.compare import compare
from simulator.planning.questions import answer, between, cheapest, fewest_accelerators, on_cluster, scaling, sizes, split, tokens_for
from simulator.planning.search import search
from simulator.planning.sensitivity import INPUTS, Input, tornado
from simulator.planning.space import Space
from simulator.results.energy import carbon_kg, energy_kwh
from simulator.scenario.plan import Plan

TINY = Space(zero=(1,), schedule=("1f1b",), recompute=("none",), layout=("balanced",), micro_batch=(1,), cp=(1,))


def question(accelerators: int = 8, batch: int = 16, **model: object) -> Small:
    return Small(model=dense(4, 1024, **model), cluster=cluster(accelerators), plan=Plan(), job=job(batch))


def test_an_answer_is_the_fastest_plan():
    s = question()
    row, best = answer(s, TINY), search(s, top=1, space=TINY).best
    assert row["step_time_s"] == best.step_time_s
    assert row["cost_usd"] == pytest.approx(best.training_days * 24 * 8 * s.cluster.price_usd_per_accelerator_hour)
    assert row["energy_kwh"] == pytest.approx(energy_kwh(s.cluster, best.accelerator_hours))


def test_energy_is_that_of_the_hosts_and_the_building():
    s = question()
    assert s.cluster.host.accelerators == 4
    assert energy_kwh(s.cluster, 40.0, load=0.5, pue=1.2) == pytest.approx(10 * (4 * 700 + 4600) / 1000 * 0.5 * 1.2)
    assert carbon_kg(1000.0, 0.056) == pytest.approx(56.0)


def test_fewest_accelerators_stops_at_the_first_that_is_fast_enough():
    s = question(16)
    days = {n: answer(on_cluster(s, s.cluster, n), TINY)["training_days"] for n in (4, 8, 16)}
    assert days[4] > days[8] > days[16]
    found = fewest_accelerators(s, (days[8] + days[16]) / 2, (4, 8, 16), TINY)
    assert found["accelerators"].tolist() == [4, 8, 16]
    assert fewest_accelerators(s, days[4], (4, 8, 16), TINY)["accelerators"].tolist() == [4]


def test_fewest_accelerators_looks_between_a_size_that_is_too_slow_and_its_double():
    s = question(16, batch=48)
    days = {n: answer(on_cluster(s, s.cluster, n), TINY)["training_days"] for n in (8, 12, 16)}
    assert days[8] > days[12] > days[16]
    tried = fewest_accelerators(s, days[12], space=TINY)["accelerators"].tolist()
    assert tried[-2:] == [8, 12]
    assert fewest_accelerators(s, days[16], space=TINY)["accelerators"].tolist()[-2:] == [12, 16]


def test_sizes_between_two_are_whole_hosts():
    c = question(16).cluster
    assert between(c, 8, 16) == [12]
    assert between(c, 8, 8) == []


def test_a_deadline_that_nothing_meets_names_the_nearest_miss():
    s = question(16)
    with pytest.raises(PlanError, match=r"training_days <= 1e-09: 16 accelerators of small come nearest with .*; allow training_days of"):
        fewest_accelerators(s, 1e-9, (4, 16), TINY)


def test_cheapest_cluster_and_the_budget_that_nothing_meets():
    s = question(8)
    dear = s.cluster.model_copy(update={"name": "dear", "price_usd_per_accelerator_hour": 10 * s.cluster.price_usd_per_accelerator_hour})
    both = {"small": s.cluster, "dear": dear}
    found = cheapest(s, both, (4, 8), days=1.0, space=TINY)
    assert found["cost_usd"].is_monotonic_increasing
    assert found["cluster"].iloc[0] == "small"
    assert len(found) == 4
    fastest = cheapest(s, both, (4, 8), budget_usd=float(found["cost_usd"].max()), space=TINY)
    assert fastest["training_days"].is_monotonic_increasing
    with pytest.raises(PlanError, match=r"cost_usd <= 1e-12: . accelerators of small come nearest"):
        cheapest(s, both, (4, 8), budget_usd=1e-12, space=TINY)
    with pytest.raises(ProfileError, match="no cluster can have these numbers"):
        cheapest(s, both, (6,), days=1.0, space=TINY)


def test_tokens_grow_with_the_budget():
    s = question()
    one, two = tokens_for(s, 1.0, TINY), tokens_for(s, 2.0, TINY)
    assert two["tokens"] == pytest.approx(2 * one["tokens"])
    assert one["cost_usd"] == pytest.approx(1.0)


def test_scaling_keeps_or_grows_the_batch():
    s = question(8, batch=8)
    strong, weak = (scaling(s, (2, 4, 8)[1:], kind, TINY) for kind in ("strong", "weak"))
    assert strong["global_batch"].tolist() == [8, 8]
    assert weak["global_batch"].tolist() == [4, 8]  # the batch is that of the scenario's own eight
    for table in (strong, weak):
        assert table["efficiency"].iloc[0] == 1.0
        per = table["tokens_per_s"] / table["accelerators"]
        assert table["efficiency"].iloc[1] == pytest.approx(per.iloc[1] / per.iloc[0])
    assert weak["efficiency"].iloc[1] >= strong["efficiency"].iloc[1]


def test_weak_scaling_leaves_out_sizes_whose_share_is_no_whole_batch():
    s = question(8, batch=2)
    assert scaling(s, (2, 4, 8), "weak", TINY)["global_batch"].tolist() == [1, 2]
    with pytest.raises(PlanError, match="2 sequences on 8 accelerators are no whole number"):
        scaling(s, (2,), "weak", TINY)


def test_sizes_double_from_one_domain():
    assert sizes(cluster(16)) == [4, 8, 16]
    assert sizes(cluster(16), at_most=9) == [4, 8]


def test_the_larger_job_gets_the_larger_share():
    small, large = question(12, batch=16), question(12, batch=16)
    large = large.model_copy(update={"job": large.job.model_copy(update={"tokens": 4 * large.job.tokens})})
    found = split({"small": small, "large": large}, (4, 8), TINY).set_index("job")
    assert found.loc["large", "accelerators"] == 8
    assert found.loc["small", "accelerators"] == 4
    with pytest.raises(PlanError, match="no split of 12 accelerators into 8"):
        split({"small": small, "large": large}, (8,), TINY)


# --- compare ---


def test_differences_add_up_to_that_of_the_steps():
    s = Small(model=moe(4, 1024), cluster=cluster(8), plan=Plan(pp=2, ep=4, dp_shard=4), job=job(16))
    found = compare({"ep 4": s, "ep 1": s.with_plan(ep=1), "tp 2": s.with_plan(tp=2, ep=2)})
    steps = found.table.set_index("name")["step_time_s"]
    for name in ("ep 1", "tp 2"):
        assert found.differences(name)["seconds"].sum() == pytest.approx(steps[name] - steps["ep 4"], abs=1e-12)
    assert found.terms()["ep 4"].sum() == pytest.approx(steps["ep 4"])
    assert found.differences()["seconds"].tolist() == found.differences("ep 1", "ep 4")["seconds"].tolist()
    with pytest.raises(ProfileError, match="no scenario 'ep 2'"):
        found.differences("ep 2")
    with pytest.raises(ProfileError, match="nothing to compare"):
        compare({})


# --- sensitivity ---


def test_a_faster_part_never_makes_the_step_longer():
    found = search(question(), top=3, space=Space(zero=(1,), schedule=("1f1b",), recompute=("none",), cp=(1,)))
    table = tornado(found)
    assert set(table["input"]) == {one.name for one in INPUTS}
    slow = table[table["input"] == "kernel launch"]  # the only one of which more is worse
    assert (slow["low_s"] <= slow["high_s"]).all()
    others = table[table["input"] != "kernel launch"]
    assert (others["low_s"] >= others["high_s"] - 1e-12).all()
    assert (table["regret"] >= 0).all()
    assert (table["changes"] == (table["regret"] > 0)).all()
    width = (table["high_s"] - table["low_s"]).abs()
    assert width.is_monotonic_decreasing


def test_an_input_that_turns_the_decision_is_found():
    found = search(question(), top=4, space=Space(zero=(1,), schedule=("1f1b",), recompute=("none",), cp=(1,), tp=(1, 4), pp=(1,)))
    assert {scenario.plan.tp for scenario in found.scenarios} == {1, 4}
    network = next(one for one in INPUTS if one.name == "scale-out bandwidth")
    slower = tornado(found, [Input("scale-out", 1e-4, 1.0, network.scale, "made up")])
    best = found.scenarios[0].plan.tp
    assert bool(slower["changes"].iloc[0]) == (best == 1)
    with pytest.raises(ProfileError, match="no input"):
        tornado(found, [])
