"""The search: legal plans and only those, columns priced as single plans are, the winner of a brute force."""

from __future__ import annotations

from itertools import product

import numpy as np
import pandas as pd
import pytest
from small import Small, cluster, dense, job, moe

from simulator.closed_forms import estimate
from simulator.lower_bound import bound
from simulator.errors import PlanError
from simulator.feasibility import memory, structure
from simulator.planning.search import SELECTIVE, Priced, legal_plans, search
from simulator.scenario.model import Model
from simulator.scenario.plan import COLUMNS, Overlap, Plan, Precision
from simulator.scenario.profiles import CLUSTERS
from simulator.simulate import simulate_step


def question(model: Model, accelerators: int, batch: int, host: int = 4, plan: Plan | None = None, **of_job: object) -> Small:
    return Small(model=model, cluster=cluster(accelerators, host), plan=plan or Plan(), job=job(batch, **of_job))


SCENARIOS = {
    "dense": question(dense(6), 8, 16),
    "moe": question(moe(6, mtp_layers=1), 16, 32),
    "narrow": question(dense(5, heads=6, kv_heads=3), 12, 24, host=6),
    "long": question(dense(4), 16, 8, sequence_length=16384),
    "replicas": question(moe(4), 16, 16, plan=Plan(dp_replicate=2)),
    "gpipe": question(dense(4), 8, 96, plan=Plan(schedule="gpipe")),
    "odd rounds": question(dense(12), 8, 120),
    "not split": question(moe(4), 8, 16, plan=Plan(sequence_parallel=False, overlap=Overlap(grad_reduce=False, param_gather=False))),
    "natural": question(moe(4), 8, 16, routing="natural", expert_load=3.0),
    "experts only": question(moe(4, leading=0, ffn=99), 8, 16),
}
each = pytest.mark.parametrize("s", SCENARIOS.values(), ids=SCENARIOS)


def with_plan(s: Small, plan: Plan) -> Small:
    return s.model_copy(update={"plan": plan})


def key(plan: Plan) -> tuple:
    return (*(getattr(plan, name) for name in COLUMNS), plan.zero, plan.recompute, plan.schedule)


def brute_force(s: Small) -> list[Plan]:
    """Return every plan of the documented space that breaks no rule, one `Plan` at a time."""
    n, like = s.cluster.accelerators, s.plan
    degrees = [d for d in range(1, n + 1) if n % d == 0]
    cps = (1, 2, 4, 8, 16, 32) if s.job.sequence_length > 8192 else (1,)
    found = []
    for tp, cp, pp, vpp, ep, etp, mbs in product(degrees, cps, degrees, (1, 2, 3, 4, 6, 8), range(1, 9), (1, 2, 4, 8), (1, 2, 4, 8)):
        if n % (tp * cp * pp * like.dp_replicate) or tp > s.cluster.host.scale_up_domain or etp > tp:
            continue
        schedule = "interleaved" if vpp > 1 else like.schedule
        sizes = {"tp": tp, "cp": cp, "pp": pp, "vpp": vpp, "ep": ep, "etp": etp, "micro_batch": mbs, "schedule": schedule}
        shard = n // (tp * cp * pp * like.dp_replicate)
        if vpp > 1 and (pp == 1 or s.job.global_batch // (shard * like.dp_replicate * mbs) < pp):
            continue
        shape = sizes | {"dp_shard": shard, "layout": "balanced", "recompute_modules": SELECTIVE}
        for zero, recompute in product((1, 3), ("none", "selective", "full")):
            plan = like.model_copy(update=shape | {"zero": zero, "recompute": recompute})
            if structure(with_plan(s, plan)):
                break  # sharding and recompute break no rule of structure
            found.append(plan)
    return found


@each
def test_legal_plans_are_those_of_a_brute_force(s):
    columns = [plans.row(i) for plans in legal_plans(s) for i in range(len(plans))]
    expected = {key(plan): plan for plan in brute_force(s)}
    assert len(columns) == len({key(plan) for plan in columns})
    assert {key(plan) for plan in columns} == expected.keys()
    assert len(expected) >= 50
    for plan in columns[:: max(1, len(columns) // 50)]:
        assert plan == expected[key(plan)]
        assert structure(with_plan(s, plan)) == []
        assert Plan.model_validate(plan.model_dump(mode="json")) == plan


@each
def test_columns_are_priced_as_single_plans(s):
    random = np.random.default_rng(0)
    for plans in legal_plans(s):
        priced = Priced.of(s, plans)
        bounds, estimates, needs = priced.bounds(), priced.estimates(), priced.peak_memory()
        for i in random.choice(len(plans), size=min(12, len(plans)), replace=False):
            one = with_plan(s, plans.row(i))
            assert bounds[i] == pytest.approx(bound(one), rel=1e-12)
            assert estimates[i] == pytest.approx(estimate(one), rel=1e-12)
            assert needs[i] == pytest.approx(float(memory(one)["total"].max()), rel=1e-12)


# --- the winner ---


@pytest.mark.parametrize(
    "s",
    [
        question(dense(4, 1024), 4, 8, plan=Plan(zero=0)),
        question(moe(3, 1024), 8, 8, host=2),
        question(dense(4, 512), 8, 64, plan=Plan(overlap=Overlap(grad_reduce=False, param_gather=False))),
    ],
    ids=["dense", "moe", "exposed"],
)
def test_the_winner_is_the_brute_forces(s):
    capacity = s.cluster.accelerator.hbm_bytes
    fitting = [with_plan(s, plan) for plan in brute_force(s)]
    fitting = [one for one in fitting if float(memory(one)["total"].max()) <= capacity]
    steps = sorted(simulate_step(one).step_time_s for one in fitting)
    calls: list[tuple[str, int, int]] = []
    found = search(s, top=5, progress=lambda *call: calls.append(call))
    assert found.table["step_time_s"].tolist() == pytest.approx(steps[:5], rel=1e-9)
    assert found.best.step_time_s == pytest.approx(steps[0], rel=1e-9)
    assert (found.fitting, len(found.results)) == (len(fitting), 5)
    assert found.legal == len(brute_force(s)) >= found.fitting >= found.estimated >= 5
    assert (found.table["bound_s"] <= found.table["step_time_s"] * (1 + 1e-9)).all()
    assert found.table["estimate_s"].to_numpy() == pytest.approx(found.table["step_time_s"].to_numpy(), rel=1e-9)
    for row, result in zip(found.table.to_dict("records"), found.results, strict=True):
        plan = result.scenario.plan
        assert {name: getattr(plan, name) for name in ("tp", "pp", "vpp", "ep", "dp", "zero", "recompute")}.items() <= row.items()
        assert row["peak_memory_bytes"] == result.peak_memory_bytes <= capacity
    for stage in ("bound", "estimate", "simulate"):
        done = [(i, n) for name, i, n in calls if name == stage]
        assert done == sorted(done, key=lambda call: call[0])
        assert done[-1][0] == done[-1][1] > 0


def test_more_wanted_than_there_are():
    found = search(question(dense(1, heads=1, kv_heads=1), 1, 1), top=100)
    assert len(found.table) == found.legal == found.estimated == 6  # two ZeRO stages, three kinds of recompute
    assert isinstance(found.table, pd.DataFrame)
    assert found.table["step_time_s"].is_monotonic_increasing


def test_twice_the_same():
    s = SCENARIOS["moe"]
    pd.testing.assert_frame_equal(search(s, top=3).table, search(s, top=3).table, check_exact=True)


# --- nothing to choose from ---


def test_nothing_legal_says_what_does_not_divide():
    with pytest.raises(PlanError, match=r"no degrees divide 8 accelerators, 3 heads, 1 layers and global_batch 3; choose a global_batch"):
        search(question(dense(1, heads=3, kv_heads=3), 8, 3, host=1))


def test_nothing_fits_says_how_much_is_missing():
    s = question(dense(2, 16384, vocab=128_000), 2, 2, host=2)
    with pytest.raises(PlanError, match=r"the smallest plan needs [0-9.]+ GB of 85\.5 GB \(tp2 pp1 dp1 .*; use more") as caught:
        search(s)
    smallest = min(float(memory(with_plan(s, plan))["total"].max()) for plan in brute_force(s))
    assert f"needs {smallest / 1e9:.1f} GB" in str(caught.value)
    assert len(caught.value.problems) == 1


def test_a_datatype_that_the_accelerator_lacks_is_said():
    s = question(dense(2), 2, 2, host=2, plan=Plan(precision=Precision(gemm="fp8")))
    a100 = s.cluster.model_copy(update={"accelerator": CLUSTERS.load("a100-superpod-1120").accelerator})
    with pytest.raises(PlanError, match="precision.gemm = fp8"):
        search(s.model_copy(update={"cluster": a100}))
