"""The search: legal plans and only those, columns priced as single plans are, the winner of a brute force."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pandas as pd
import pytest
from small import Small, cluster, dense, job, moe

from simulator.closed_forms import estimate
from simulator.errors import PlanError, ProfileError
from simulator.feasibility import memory, structure
from simulator.lower_bound import bound, passes_table
from simulator.planning.priced import PAIRED, Estimates, Priced, distinct
from simulator.planning.search import search
from simulator.planning.space import CHUNKS, CONTEXT, EXPERT_TENSOR, MICRO_BATCHES, SCHEDULES, Space, grouped, legal_table, numbered
from simulator.pricing.operations import Known
from simulator.scenario.model import Model
from simulator.scenario.overlap import Overlap
from simulator.scenario.placement import ORDER, PIPELINE_INSIDE
from simulator.scenario.plan import COLUMNS, INTERLEAVED, TWO_CHUNKS, Plan, PlanColumns, Precision
from simulator.scenario.profiles import CLUSTERS
from simulator.schedules import SCHEDULES as EVERY
from simulator.simulate import simulate_step
from simulator.workload.stages import blocks, stage_blocks


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
    "in pieces": question(dense(4), 8, 16, plan=Plan(overlap=Overlap(tp="pieces"))),
    "natural": question(moe(4), 8, 16, routing="natural", expert_load=3.0),
    "experts only": question(moe(4, leading=0, ffn=99), 8, 16),
}
each = pytest.mark.parametrize("s", SCENARIOS.values(), ids=SCENARIOS)


def with_plan(s: Small, plan: Plan) -> Small:
    return s.model_copy(update={"plan": plan})


STRUCTURE = Space(schedule=SCHEDULES, zero=(1,), recompute=("none",))


def key(plan: Plan) -> tuple:
    said = (plan.zero, plan.recompute, plan.recompute_modules, plan.schedule, plan.layout)
    return (*(getattr(plan, name) for name in COLUMNS), *said)


def same_stages(s: Small, plan: Plan, layout: str) -> bool:
    """Whether another layout, legal for the plan, divides the layers as its own does."""
    other = plan.model_copy(update={"layout": None if layout == "even" else layout})
    return not structure(with_plan(s, other)) and stage_blocks(s.model, other, s.job) == stage_blocks(s.model, plan, s.job)


def brute_force(s: Small, space: Space = STRUCTURE) -> list[Plan]:
    """Return every plan of the documented space that breaks no rule, one `Plan` at a time."""
    n, like = s.cluster.accelerators, s.plan
    degrees = [d for d in range(1, n + 1) if n % d == 0]
    cps = CONTEXT if s.job.sequence_length > 8192 else (1,)
    mbss, vpps, etps = space.micro_batch or MICRO_BATCHES, space.vpp or CHUNKS, space.etp or EXPERT_TENSOR
    found = []
    for tp, cp, pp, vpp, ep, etp, mbs in product(degrees, cps, degrees, vpps, range(1, 9), etps, mbss):
        if n % (tp * cp * pp * like.dp_replicate) or tp > s.cluster.host.scale_up_domain or etp > tp:
            continue
        shard = n // (tp * cp * pp * like.dp_replicate)
        shape = {"tp": tp, "cp": cp, "pp": pp, "vpp": vpp, "ep": ep, "etp": etp, "micro_batch": mbs, "dp_shard": shard}
        m = s.job.global_batch // (shard * like.dp_replicate * mbs)
        for schedule, layout in product(space.schedule, space.layout):
            if vpp > 1 and (pp == 1 or (schedule.startswith("interleaved") and m < pp)):
                continue
            said = shape | {"schedule": schedule, "layout": None if layout == "even" else layout, "table": None}
            if not (vpp == 2 if schedule in TWO_CHUNKS else vpp > 1 if schedule in INTERLEAVED else vpp == 1):
                continue
            plan = like.model_copy(update=said)
            if structure(with_plan(s, plan)) or any(same_stages(s, plan, other) for other in space.layout[: space.layout.index(layout)]):
                continue
            for zero, (recompute, modules) in product(space.zero, space.recomputes(s.model)):
                found.append(plan.model_copy(update={"zero": zero, "recompute": recompute, "recompute_modules": modules}))
    return found


@each
def test_legal_plans_are_those_of_a_brute_force(s):
    table = legal_table(s, STRUCTURE).of_kind(zero=1)
    columns = [table.row(i) for i in range(len(table))]
    expected = {key(plan): plan for plan in brute_force(s)}
    assert len(columns) == len({key(plan) for plan in columns})
    assert {key(plan) for plan in columns} == expected.keys()
    assert len(expected) >= 50
    for plan in columns[:: max(1, len(columns) // 50)]:
        assert plan == expected[key(plan)]
        assert structure(with_plan(s, plan)) == []
        assert Plan.model_validate(plan.model_dump(mode="json")) == plan


@pytest.mark.parametrize("name", ["moe", "narrow", "replicas", "gpipe", "not split", "natural"])
def test_columns_are_priced_as_single_plans(name):
    s = SCENARIOS[name]
    draw = np.random.default_rng(0)
    for zero, schedules in ((1, SCHEDULES), (3, ("1f1b", "interleaved"))):
        table = legal_table(s, Space(schedule=schedules)).of_kind(zero=zero)
        chosen = np.sort(draw.choice(len(table), size=min(5, len(table)), replace=False))
        priced = Priced.of(s, table.take(chosen))
        bounds, estimates, needs = priced.bounds(), priced.estimates(), priced.peak_memory()
        in_pairs = np.flatnonzero(priced.table.runs(*PAIRED))
        if len(in_pairs):
            tight = priced.tight_bounds(in_pairs, Estimates(priced, in_pairs).pair_seconds())
            bounds[in_pairs] = np.maximum(bounds[in_pairs], tight)
        for i, row in enumerate(chosen.tolist()):
            one = with_plan(s, table.row(row))
            assert bounds[i] == pytest.approx(bound(one), rel=1e-12)
            assert estimates[i] == pytest.approx(estimate(one), rel=1e-12)
            assert needs[i] == pytest.approx(float(memory(one)["total"].max()), rel=1e-12)


# --- the winner ---


def drawn(seed: int) -> tuple[Small, Space]:
    """Draw a small question and a space of some dozens of plans."""
    one = random.Random(seed)
    model = one.choice([dense, moe])(one.choice([3, 4, 6]), one.choice([256, 512, 1024]))
    s = question(model, one.choice([2, 4]), 8, host=one.choice([2, 4]))
    schedules = ("1f1b", *one.sample([name for name in SCHEDULES if name != "1f1b"], 1))
    zero, recompute = one.sample([0, 1, 2, 3], 1), ("none", one.choice(["full", "layernorm", "core_attn+mlp_act"]))
    return s, Space(schedule=schedules, zero=tuple(zero), recompute=recompute, micro_batch=(one.choice([1, 2]),), vpp=(1, 2), etp=(1,))


@pytest.mark.parametrize("seed", range(20))
def test_the_winner_is_the_brute_forces(seed):
    s, space = drawn(seed)
    capacity = s.cluster.accelerator.hbm_bytes
    fitting = [one for one in (with_plan(s, plan) for plan in brute_force(s, space)) if float(memory(one)["total"].max()) <= capacity]
    steps = sorted(simulate_step(one).step_time_s for one in fitting)
    calls: list[tuple[str, int, int]] = []
    found = search(s, top=3, progress=lambda *call: calls.append(call), space=space)
    assert found.best.step_time_s <= steps[0] * 1.01
    assert found.best.step_time_s >= steps[0] * (1 - 1e-9)
    assert (found.legal, found.fitting) == (len(brute_force(s, space)), len(fitting))
    assert found.fitting >= found.estimated >= min(3, len(fitting))
    left_out = np.isinf(found.pool.estimate_s) & (found.pool.memory_bytes <= capacity)
    assert (found.pool.bound_s[left_out] >= found.best.step_time_s).all()  # what bound discards cannot win
    assert (found.table["bound_s"] <= found.table["step_time_s"] * (1 + 1e-9)).all()
    for row, result in zip(found.table.to_dict("records"), found.results, strict=True):
        plan = result.scenario.plan
        assert {name: getattr(plan, name) for name in ("tp", "pp", "vpp", "ep", "dp", "zero", "schedule")}.items() <= row.items()
        assert row["peak_memory_bytes"] == result.peak_memory_bytes <= capacity
    assert [one.plan for one in found.scenarios] == [result.scenario.plan for result in found.results]
    for stage in ("bound", "estimate", "simulate"):
        done = [(i, n) for name, i, n in calls if name == stage]
        assert done[-1][0] == done[-1][1] > 0


def test_the_front_is_the_fastest_plan_within_each_memory():
    s = question(moe(4, 2048), 8, 16)
    found = search(s, top=1, space=Space(schedule=("1f1b", "interleaved")))
    front = found.front(levels=5)
    pool = found.pool
    every = np.concatenate([priced.estimates() for priced in pool.priced])
    assert front["estimate_s"].is_monotonic_increasing
    assert front["peak_memory_bytes"].is_monotonic_decreasing
    for limit in np.linspace(s.cluster.accelerator.hbm_bytes, pool.memory_bytes.min(), 5):
        fastest = every[pool.memory_bytes <= limit].min()
        assert front.loc[front["peak_memory_bytes"] <= limit, "estimate_s"].min() == pytest.approx(fastest, rel=1e-12)
    assert len(pool) == len(every)


def test_more_wanted_than_there_are():
    found = search(question(dense(1, heads=1, kv_heads=1), 1, 1), top=1000)
    assert len(found.table) == found.legal == found.estimated == 6 * 4 * 5  # schedules of one rank, kinds of sharding, of recompute
    assert isinstance(found.table, pd.DataFrame)
    assert found.table["step_time_s"].is_monotonic_increasing


def test_no_plan_stands_in_a_list_twice():
    """Modules that the model lacks, and layouts that divide its layers alike, make no new plan."""
    s = question(dense(4), 8, 16)
    space = Space(recompute=("none", "moe_act", "layernorm", "layernorm+moe_act", "mla_up_proj+layernorm", "full"))
    assert [kind for kind, _ in space.recomputes(s.model)] == ["none", "selective", "full"]
    assert space.recomputes(s.model)[1][1] == ("layernorm",)
    assert ("selective", ("layernorm", "moe_act")) in space.recomputes(moe(4))
    found = search(s, top=40)
    effects = [(key(plan)[:-1], stage_blocks(s.model, plan, s.job)) for plan in (one.plan for one in found.scenarios)]
    assert len(set(effects)) == len(effects) == 40


def test_every_schedule_is_searched():
    s = question(moe(4, 2048), 8, 64, host=2)
    assert set(SCHEDULES) == set(EVERY)
    assert set(SCHEDULES) - set(Space().schedule) == {"dualpipe"}
    space = Space(pp=(2,), vpp=(1, 2), zero=(1,), recompute=("none",), micro_batch=(1,), schedule=SCHEDULES)
    found = search(s, top=200, space=space)
    assert {plan.schedule for plan in (one.plan for one in found.scenarios)} == set(SCHEDULES)
    assert not found.pool.loose[found.pool.legal].any()
    assert (found.table["bound_s"] <= found.table["step_time_s"] * (1 + 1e-9)).all()


def test_twice_the_same():
    s = SCENARIOS["dense"]
    pd.testing.assert_frame_equal(search(s, top=3).table, search(s, top=3).table, check_exact=True)


# --- placement ---


def thin(s: Small) -> Small:
    """Return the question on a fabric whose tiers are four times oversubscribed."""
    fabric = s.cluster.fabric
    tiers = tuple(tier.model_copy(update={"oversubscription": 4.0}) for tier in fabric.tiers)
    return s.model_copy(update={"cluster": s.cluster.model_copy(update={"fabric": fabric.model_copy(update={"tiers": tiers})})})


FEW = Space(zero=(1,), schedule=("1f1b",), recompute=("none",), micro_batch=(1,), layout=("balanced",))


def test_orders_are_searched_where_the_fabric_is_thin():
    s = question(moe(4), 16, 16)
    assert {row["order"] for row in search(s, top=3, space=FEW).table.to_dict("records")} == {ORDER}
    found = search(thin(s), top=2, space=FEW)
    pool = found.pool
    plans = [pool.plan(i) for i in range(len(pool))]
    assert {plan.placement.order for plan in plans} == {ORDER, PIPELINE_INSIDE}
    assert pool.legal.tolist() == [not structure(with_plan(thin(s), plan)) for plan in plans]
    assert 0 < found.legal < len(pool)
    steps = {i: simulate_step(with_plan(thin(s), plans[i])).step_time_s for i in np.flatnonzero(pool.legal)}
    assert all(pool.bound_s[i] <= step * (1 + 1e-9) for i, step in steps.items())
    assert found.best.step_time_s <= min(steps.values()) * 1.01


def test_an_order_that_leaves_nothing_is_named():
    only = FEW.model_copy(update={"order": (PIPELINE_INSIDE,), "pp": (2,), "tp": (1,), "ep": (4,), "etp": (1,)})
    with pytest.raises(PlanError, match="order = tp-cp-ep-pp-dp leaves none"):
        search(question(moe(4), 16, 16), space=only)


# --- nothing to choose from ---


def test_nothing_legal_says_what_does_not_divide():
    with pytest.raises(PlanError, match=r"fails for 8 accelerators, 3 heads, 1 layers and global_batch 3; choose a global_batch"):
        search(question(dense(1, heads=3, kv_heads=3), 8, 3, host=1))


def test_a_constraint_that_empties_the_space_is_named():
    space = Space(tp=(16,), zero=(1,))
    with pytest.raises(PlanError, match=r"tp = 16 leaves none: .* free or widen tp") as caught:
        search(question(dense(4, heads=4), 8, 16, host=8), space=space)
    assert len(caught.value.problems) == 1


def test_a_constraint_that_needs_more_memory_is_named():
    s = question(dense(2, 16384, vocab=128_000), 2, 2, host=2)
    with pytest.raises(PlanError, match=r"free tp, recompute, or use more accelerators"):
        search(s, space=Space(tp=(2,), recompute=("none",)))


def test_a_module_that_does_not_exist_is_said():
    with pytest.raises(ProfileError, match="recompute 'layer_norm': did you mean layernorm"):
        Space(recompute=("layer_norm",))


def test_constraints_are_what_the_user_narrowed():
    space = Space(tp=(4,), zero=(1, 3))
    assert space.constraints == ("tp", "zero")
    assert space.without("tp").constraints == ("zero",)
    plan = Plan(tp=2, pp=4, recompute="selective", recompute_modules=("layernorm", "moe_act"))
    like = Space.like(plan, "tp", "recompute", "layout", pp=(2, 4))
    assert (like.tp, like.pp, like.recompute, like.layout) == ((2,), (2, 4), ("layernorm+moe_act",), ("even",))


def test_nothing_fits_says_how_much_is_missing():
    s = question(dense(2, 16384, vocab=128_000), 2, 2, host=2)
    with pytest.raises(PlanError, match=r"the smallest plan needs [0-9.]+ GB of 85\.5 GB \(tp2 pp1 dp1 .*; use more") as caught:
        search(s)
    smallest = min(float(memory(with_plan(s, plan))["total"].max()) for plan in brute_force(s, Space()))
    assert f"needs {smallest / 1e9:.1f} GB" in str(caught.value)
    assert len(caught.value.problems) == 1


def test_a_datatype_that_the_accelerator_lacks_is_said():
    s = question(dense(2), 2, 2, host=2, plan=Plan(precision=Precision(gemm="fp8")))
    a100 = s.cluster.model_copy(update={"accelerator": CLUSTERS.load("a100-superpod-1120").accelerator})
    with pytest.raises(PlanError, match="precision.gemm = fp8"):
        search(s.model_copy(update={"cluster": a100}))


# --- what makes it fast changes nothing ---


def test_numbers_are_those_that_sorting_gives():
    rng = np.random.default_rng(1)
    keys = [rng.integers(low, high, 500) for low, high in ((0, 3), (-5, 60), (10**6, 10**6 + 4))]
    number, count = numbered(*keys)
    _, expected = np.unique(np.stack(keys, axis=1), axis=0, return_inverse=True)
    assert number.tolist() == expected.ravel().tolist()
    assert count == expected.max() + 1
    groups = grouped(*keys)
    assert sorted(np.concatenate(groups).tolist()) == list(range(500))
    assert all(len({tuple(key[i] for key in keys) for i in group}) == 1 for group in groups)
    assert len(groups) == count
    assert numbered(np.zeros(0, dtype=int))[1] == 0
    assert grouped(np.zeros(0, dtype=int)) == []


@pytest.mark.parametrize("name", ["moe", "long"])
def test_prices_shared_by_recomputes_are_those_of_each(name):
    s = SCENARIOS[name]
    table = legal_table(s, STRUCTURE).of_kind(zero=1)
    first, _ = distinct(table.plans, ("tp", "cp", "ep", "etp", "micro_batch"))
    plans, known = table.plans.take(first), None
    for recompute, modules in Space().recomputes(s.model):
        like = plans.like.model_copy(update={"recompute": recompute, "recompute_modules": modules})
        columns = PlanColumns(**{field: getattr(plans, field) for field in COLUMNS}, like=like)
        known = known or Known(s.model, columns, s.cluster)
        own = blocks(s.model, columns, s.job)
        shared, alone = (passes_table(own, s.model, columns, s.cluster, k) for k in (known, None))
        for field, values in alone.items():
            np.testing.assert_array_equal(shared[field], values)
