"""Oracle: Megatron's groups, written down from its RankGenerator as nested loops; blocks counted member by member."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small import moe, scenario

from simulator.errors import PlanError, ProfileError
from simulator.feasibility import check
from simulator.formats.megatron import plan_from_megatron
from simulator.scenario.mesh import accelerator_of, members, placed
from simulator.scenario.placement import Placement
from simulator.scenario.plan import Plan
from simulator.simulate import simulate_ranks, simulate_step

AXES = ("tp", "cp", "ep", "dp", "pp")
INSIDE = "tp-cp-ep-pp-dp"


def megatron_groups(plan: Plan, axis: str) -> set[frozenset[int]]:
    """Return the groups of accelerators along `axis`: those that agree in every other coordinate of the mesh, in its order."""
    experts = axis in ("ep", "etp", "edp")
    degree = {"tp": plan.etp, "cp": 1, "ep": plan.ep, "dp": plan.edp} if experts else {"tp": plan.tp, "cp": plan.cp, "ep": 1, "dp": plan.dp}
    degree["pp"] = plan.pp
    token = {"etp": ("tp",), "edp": ("dp",), "dp": ("dp", "cp")}.get(axis, (axis,))
    order = plan.placement.order.split("-")
    groups: dict[tuple, set[int]] = {}
    for place, digits in enumerate(itertools.product(*(range(degree[a]) for a in reversed(order)))):
        coordinate = dict(zip(reversed(order), digits, strict=True))
        groups.setdefault(tuple(coordinate[a] for a in order if a not in token), set()).add(place)
    return {frozenset(g) for g in groups.values()}


degrees = st.fixed_dictionaries({a: st.sampled_from([1, 2, 4]) for a in ("tp", "cp", "pp", "dp_shard", "ep", "etp")})


@given(degrees, st.permutations(AXES))
@settings(max_examples=300, deadline=None)
def test_groups_are_megatrons(numbers, order):
    plan = Plan(**numbers, placement={"order": "-".join(order)})
    assume((plan.dp * plan.cp * plan.tp) % (plan.ep * plan.etp) == 0)
    s = scenario(moe(8), plan.world, plan, plan.dp, sequence_length=1024)
    assume(not [p for p in check(s) if p.rule in ("dp follows cp", "attention and expert mesh have the same stages")])
    where = accelerator_of(plan, 8)
    assert sorted(where) == list(range(plan.world))
    for axis in ("tp", "cp", "dp", "ep", "etp", "edp"):
        number = members(plan, axis)
        ours = {frozenset(where[number == g].tolist()) for g in np.unique(number)}
        assert ours == megatron_groups(plan, axis), axis
    stages = where.reshape(plan.pp, -1)
    assert {frozenset(column.tolist()) for column in stages.T} == megatron_groups(plan, "pp")


@given(degrees, st.sampled_from(["tp-cp-ep-dp-pp", INSIDE, "cp-tp-ep-dp-pp", "tp-cp-dp-ep-pp"]), st.sampled_from([8, 16, 32]))
@settings(max_examples=150, deadline=None)
def test_members_of_a_block_are_counted(numbers, order, block):
    plan = Plan(**numbers, placement={"order": order})
    assume((plan.dp * plan.cp * plan.tp) % (plan.ep * plan.etp) == 0)
    s = scenario(moe(8), plan.world, plan, plan.dp, sequence_length=1024)
    assume(not [p for p in check(s) if p.rule in ("dp follows cp", "attention and expert mesh have the same stages")])
    where = accelerator_of(plan, 8)
    for axis in ("tp", "cp", "dp", "ep", "etp", "edp"):
        number = members(plan, axis)
        counts = [np.bincount(where[number == g] // block) for g in np.unique(number)]
        fewest = min(c[c > 0].min() for c in counts)
        assert placed(plan, axis, 8).within(block) == fewest, axis


def test_hosts_by_hand_are_filled_in_their_order():
    plan = Plan(tp=4, dp_shard=4, placement={"hosts": (3, 0)})
    assert accelerator_of(plan, 8).tolist() == [*range(24, 32), *range(8)]
    scattered = Plan(tp=2, dp_shard=4, placement={"accelerators": (0, 8, 16, 24, 1, 9, 17, 25)})
    assert accelerator_of(scattered, 8).tolist() == [0, 8, 16, 24, 1, 9, 17, 25]
    assert placed(scattered, "tp", 8).within(8) == 1
    assert placed(scattered, "dp", 8).within(8) == 2


def test_neighbours_torn_apart_cost_time():
    plan = Plan(tp=4, dp_shard=8)
    whole = scenario(moe(8), 32, plan, 8, host=8)
    torn = whole.with_plan(placement={"accelerators": np.arange(32).reshape(4, 8).T.ravel().tolist()})
    assert simulate_step(torn).step_time_s > 1.2 * simulate_step(whole).step_time_s


def test_any_order_of_whole_hosts_is_as_good_where_the_leaf_joins_them():
    plan = Plan(tp=4, dp_shard=8)
    whole = scenario(moe(8), 32, plan, 8, host=8)
    shuffled = whole.with_plan(placement={"hosts": (2, 0, 3, 1)})
    assert simulate_step(shuffled).step_time_s == simulate_step(whole).step_time_s


def test_a_slow_host_slows_the_ranks_that_sit_on_it():
    plan = Plan(pp=2, dp_shard=8, placement={"order": "tp-cp-ep-pp-dp"})
    s = scenario(moe(8), 16, plan, 16, host=8)
    slow = s.model_copy(update={"cluster": s.cluster.model_copy(update={"slow_hosts": {1: 1.5}})})
    table = simulate_ranks(slow).table()
    assert set(table.loc[table["slowdown"] > 1, "host"]) == {1}
    assert sorted(table.loc[table["slowdown"] > 1, "stage"]) == [0] * 4 + [1] * 4, "dp outermost: the host holds four of each stage"


def test_spare_hosts_are_left_out_and_paid_for():
    s = scenario(moe(8), 64, Plan(tp=2, ep=8), 8, host=8).with_plan(placement={"spare_hosts": 4})
    assert s.plan.world == 32
    assert check(s) == []
    full = scenario(moe(8), 32, Plan(tp=2, ep=8), 16, host=8)
    assert simulate_step(s).step_time_s == simulate_step(full).step_time_s
    assert simulate_step(s).accelerator_hours == 2 * simulate_step(full).accelerator_hours


@pytest.mark.parametrize(
    ("placement", "says"),
    [
        ({"accelerators": (0, 1, 2, 1)}, "accelerator 1 is used twice, for rank 1 and rank 3; give each its own"),
        ({"hosts": (5, 5)}, "host 5 is used twice, for block of ranks 0 and block of ranks 1"),
        ({"order": "tp-cp-dp-pp"}, "'tp-cp-dp-pp' must name tp, cp, ep, dp, pp once each, or be fewest-bytes; did you mean tp-"),
        ({"hosts": (1,), "spare_hosts": 1}, "spare_hosts = 1: 0 or more, and only without a list"),
        ({"hosts": (-1,)}, "hosts[0] = -1: counted from 0"),
        ({"hosts": (1,), "accelerators": (1,)}, "give one"),
    ],
)
def test_bad_placements_are_refused(placement, says):
    with pytest.raises(ProfileError) as error:
        Placement(**placement)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Plan(dp_shard=8, placement={"hosts": (9,)}), "placement names host 9, the cluster has 0 to 1"),
        (Plan(cp=2, dp_shard=8, placement={"order": "dp-tp-cp-ep-pp"}), "order dp-tp-cp-ep-pp with cp = 2 and dp = 8"),
        (Plan(tp=2, pp=2, dp_shard=4, etp=1, placement={"order": "tp-pp-cp-ep-dp"}), "puts 2 attention and 1 expert ranks inside pp"),
        (Plan(dp_shard=8, placement={"spare_hosts": 2}), "spare_hosts = 2, the cluster has 2 hosts"),
    ],
)
def test_placements_that_do_not_fit_are_problems(plan, says):
    s = scenario(moe(8), 16, plan, 8, host=8)
    assert any(says in str(p) for p in check(s)), [str(p) for p in check(s)]
    with pytest.raises(PlanError):
        simulate_step(s)


def test_megatrons_flag_is_read():
    line = "torchrun pretrain_gpt.py --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --micro-batch-size 1"
    assert plan_from_megatron(line).plan.placement.order == "tp-cp-ep-dp-pp"
    assert plan_from_megatron(line + " --use-tp-pp-dp-mapping").plan.placement.order == INSIDE
