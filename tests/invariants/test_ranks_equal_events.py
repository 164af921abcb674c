"""The replay of every rank gives what SimPy gives for every rank, node by node, with durations of its own for each."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small import any_schedule, dense, moe, scenario, scenarios

from simulator.engine.events import run
from simulator.engine.order import prepare
from simulator.engine.ranks import critical_path, longest, replay_ranks
from simulator.errors import DeadlockError
from simulator.results.ranks import RanksResult
from simulator.scenario.plan import Plan
from simulator.scenario.routing import Routing
from simulator.scenario.scenario import Scenario
from simulator.scenario.variation import Variation
from simulator.simulate import simulate_ranks, simulate_step
from simulator.workload.build import build_step
from simulator.workload.classes import rank_classes

TOLERANCE = 1e-9
CALM = Variation(jitter=0)


@st.composite
def variations(draw: st.DrawFn) -> Variation:
    def one(*choices):
        return draw(st.sampled_from(choices))

    return Variation(
        seed=draw(st.integers(0, 9)), jitter=one(0.0, 0.02, 0.3), slow_host_share=one(0.0, 0.3), slow_host_slowdown=one(1.1, 2.0),
        throttled_share=one(0.0, 0.2), sequence_spread=one(0.0, 0.0, 0.4),
    )  # fmt: skip


def routings(s: Scenario) -> st.SearchStrategy[Routing | None]:
    if s.model.experts is None:
        return st.none()
    redundant = -s.model.experts.count % s.plan.ep + s.plan.ep
    return st.sampled_from(
        (
            None,
            Routing(distribution="zipf", exponent=1.0),
            Routing(distribution="zipf", exponent=0.7, redundant_experts=redundant),
            Routing(distribution="dirichlet", concentration=2.0, capacity_factor=1.25),
            Routing(distribution="dirichlet", concentration=2.0, bias_balance=0.5, sampled=False),
        )
    )


def every_rank(result: RanksResult) -> tuple[np.ndarray, np.ndarray]:
    """Return the end of every node of every rank, by SimPy and by the replay."""
    s, order, program = result.scenario, result.order, result.program
    same, ranks = np.ones(s.plan.world), order.ranks
    every = build_step(s.model, s.plan, s.job, rank_classes(s.plan, same, same, every_rank=True))
    kept = replay_ranks(order, result.durations, keep=True)
    assert kept.ends is not None
    seconds, mine = np.empty(len(every)), np.empty(len(every))
    lasts = np.array([np.broadcast_to(result.durations(node), ranks) for node in range(len(program))])
    stage, rank = np.array(program.rank_class), np.array(every.rank_class)
    for number in range(s.plan.world):
        here, there = np.flatnonzero(rank == number), np.flatnonzero(stage == number // ranks)
        assert [every.tasks[every.task[n]] for n in here] == [program.tasks[program.task[n]] for n in there]
        seconds[here], mine[here] = lasts[there, number % ranks], kept.ends[there, number % ranks]
    return run(every.streams(), every.needs, every.meet, seconds)[1], mine


def assert_same(result: RanksResult) -> None:
    theirs, mine = every_rank(result)
    assert np.abs(theirs - mine).max() <= TOLERANCE * theirs.max()
    assert result.step_time_s == pytest.approx(theirs.max(), rel=TOLERANCE)


@settings(max_examples=60, deadline=None)
@given(scenarios(worlds=(8, 16, 32), hidden=(256, 1024), micro_batches=4, slow=True), variations(), st.data())
def test_every_node_of_every_rank(s, variation, data):
    assert_same(simulate_ranks(s, variation, data.draw(routings(s))))


@settings(max_examples=12, deadline=None)
@given(scenarios(worlds=(64,), hidden=(256,), micro_batches=3, slow=True, natural=True), variations(), st.data())
def test_every_node_of_64_ranks(s, variation, data):
    assert_same(simulate_ranks(s, variation, data.draw(routings(s))))


@settings(max_examples=20, deadline=None)
@given(any_schedule(experts=True), variations(), st.data())
def test_every_node_under_every_schedule(s, variation, data):
    """Pairs and weight gradients on their own included."""
    assert_same(simulate_ranks(s, variation, data.draw(routings(s))))


@settings(max_examples=20, deadline=None)
@given(any_schedule(experts=True), st.sampled_from((1.0, 1.3)))
def test_slow_hosts_under_every_schedule(s, slow):
    s = s.model_copy(update={"cluster": s.cluster.model_copy(update={"slow_hosts": {0: slow} if slow > 1 else {}})})
    assert simulate_step(s, ranks="all").step_time_s == pytest.approx(simulate_step(s).step_time_s, rel=TOLERANCE)


@settings(max_examples=40, deadline=None)
@given(scenarios(hidden=(256, 2048), micro_batches=5, slow=True, natural=True))
def test_without_variation_it_is_the_step_of_the_classes(s):
    ranks, classes = simulate_ranks(s, CALM), simulate_step(s)
    assert ranks.step_time_s == pytest.approx(classes.step_time_s, rel=TOLERANCE)
    mean = classes.timeline.exposed().eval("(compute_s * ranks).sum() / ranks.sum()")
    assert ranks.table()["compute_s"].mean() == pytest.approx(mean, rel=TOLERANCE)
    every, few = ranks.phases(), classes.phases()
    names = [name for name in few if name.endswith("_s")]
    weighted = few[names].mul(few["ranks"], axis=0).sum() / few["ranks"].sum()
    assert every[names].mean().to_numpy() == pytest.approx(weighted.to_numpy(), rel=TOLERANCE, abs=TOLERANCE * ranks.step_time_s)
    assert every[names].sum(axis=1).to_numpy() == pytest.approx(ranks.step_time_s, rel=TOLERANCE)


@settings(max_examples=40, deadline=None)
@given(scenarios(hidden=(256,), micro_batches=5, slow=True), variations())
def test_time_of_a_rank_adds_up(s, variation):
    result = simulate_ranks(s, variation)
    table, slack = result.table(), TOLERANCE * result.step_time_s
    assert len(table) == s.plan.world
    assert (table[["compute_s", "host_s", "exposed_s", "wait_s"]] >= -slack).all(axis=None)
    assert (table[["compute_s", "host_s", "exposed_s", "wait_s"]].sum(axis=1) - result.step_time_s).abs().max() <= slack
    assert table["end_s"].max() == result.step_time_s
    path = result.critical_path()
    assert path["start_s"].iloc[0] == 0
    assert path["end_s"].iloc[-1] == result.step_time_s
    assert (path["start_s"].to_numpy()[1:] == path["end_s"].to_numpy()[:-1]).all()


@settings(max_examples=40, deadline=None)
@given(scenarios(hidden=(256, 2048), micro_batches=5))
def test_exposed_communication_is_that_of_the_timeline(s):
    """On one stage, where nobody waits for messages, as on the timeline; where two streams run at once, not above it."""
    assume(s.plan.pp == 1)
    mine = simulate_ranks(s, CALM).table()["exposed_s"].max()
    timeline = simulate_step(s).timeline
    spent = timeline.exposed()
    theirs = spent[[f"{stream}_exposed_s" for stream in ("tp", "cp", "ep", "dp")]].sum(axis=1).max()
    assert mine <= theirs * (1 + TOLERANCE)
    talks = timeline.table().query("stream != 'compute'").sort_values(["rank_class", "start_s"])
    after = talks.groupby("rank_class")["end_s"].transform(lambda ends: ends.cummax().shift(fill_value=0.0))
    if (talks["start_s"] >= after).all():  # no two streams at once
        assert mine == pytest.approx(theirs, rel=TOLERANCE)


@pytest.mark.parametrize("dispatch_s", [5e-6, 1e-3])
def test_wait_for_the_host_in_pairs_is_that_of_the_timeline(dispatch_s):
    """On one stage where every collective is waited for: what replay and timeline call host, communication and waiting are the same."""
    table = "0F0 0F1+0B0 0F2+0B1 0B2\n"
    s = scenario(moe(4, 256, leading=0), 8, Plan(ep=4, tp=2, schedule="table", table=table, micro_batch=2), 3, dispatch_s=dispatch_s)
    ranks, classes = simulate_ranks(s, CALM), simulate_step(s)
    spent, mine = classes.timeline.exposed().iloc[0], ranks.table().iloc[0]
    assert mine["host_s"] == pytest.approx(spent["host_s"], rel=1e-9)
    assert mine["host_s"] > 0.1 * classes.step_time_s
    theirs = spent[[c for c in spent.index if c.endswith("_exposed_s")]].sum()
    assert [mine["exposed_s"], mine["wait_s"]] == pytest.approx([theirs, spent["idle_s"]], rel=1e-9, abs=1e-9 * classes.step_time_s)
    every, few = (r.breakdown().set_index("part")["seconds"] for r in (ranks, classes))
    assert every["compute"] == pytest.approx(few[few.index.str.startswith("compute: ")].sum(), rel=1e-9)
    assert few["compute: host"] > spent["host_s"]  # the first forward and the last backward wait for it, too


def test_ranks_that_wait_for_stages_count_no_more_of_the_host():
    """Launches beside the wait for another stage are waiting there; all parts add up to the step."""
    s = scenario(moe(8, 256), 16, Plan(pp=4, vpp=2, schedule="dualpipe", ep=2), 8, dispatch_s=2e-5)
    ranks, classes = simulate_ranks(s, CALM), simulate_step(s)
    spent = classes.timeline.exposed().eval("(host_s * ranks).sum() / ranks.sum()")
    table = ranks.table()
    assert 0.5 * spent < table["host_s"].mean() < spent
    assert (table[["compute_s", "host_s", "exposed_s", "wait_s"]] >= -TOLERANCE * ranks.step_time_s).all(axis=None)
    assert ranks.breakdown()["seconds"].sum() == pytest.approx(ranks.step_time_s, rel=1e-12)


def test_slow_host_is_found():
    s = scenario(dense(8, 1024), 32, Plan(tp=2, pp=2), 8, slow_hosts={5: 1.3})
    result = simulate_ranks(s, Variation(jitter=0.01))
    slowest = result.slowest(4)
    assert set(slowest["host"]) == {5}
    assert slowest["over_stage"].min() > 1.2
    spent = result.critical_path().groupby("host")["seconds"].sum()
    assert spent.idxmax() == 5


def test_same_seed_same_bytes():
    s = scenario(moe(4), 16, Plan(pp=2, ep=4), 6)
    variation = Variation(seed=3, jitter=0.05, slow_host_share=0.2, throttled_share=0.2, sequence_spread=0.2)
    routing = Routing(distribution="dirichlet", concentration=3.0)
    one, two = (simulate_ranks(s, variation, routing, seeds=3) for _ in range(2))
    assert one.table().to_csv() == two.table().to_csv()
    assert one.critical_path().to_csv() == two.critical_path().to_csv()
    assert one.step_times_s.tobytes() == two.step_times_s.tobytes()
    assert len(set(one.step_times_s)) == 3
    other = simulate_ranks(s, variation.model_copy(update={"seed": 4}), routing)
    assert other.step_time_s == one.step_times_s[1]
    row = one.distribution().iloc[0]
    assert row["seeds"] == 3
    assert row["min_s"] <= row["p05_s"] <= row["p50_s"] <= row["p95_s"] <= row["max_s"]


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (2, 1), (3, 1), (6, 2), (4, 3), (12, 2), (24, 1)])
def test_maximum_over_groups(size, stride):
    values = np.random.default_rng(0).random(24)
    rank = np.arange(24)
    number = rank // (size * stride) * stride + rank % stride
    want = np.array([values[number == g].max() for g in number])
    got = np.broadcast_to(longest(values, size, stride), (24 // (size * stride), size, stride)).reshape(-1)
    assert (got == want).all()


def test_nodes_that_wait_for_each_other_are_refused():
    queues = {(0, "compute"): [0, 1], (0, "tp"): [2]}
    with pytest.raises(DeadlockError, match="node 0.*wait for each other"):
        prepare(queues, [(2,), (), (1,)], [-1] * 3, [(1, 1)] * 3, 2, lambda n: f"node {n}")


def test_critical_path_needs_the_ends():
    order = prepare({(0, "compute"): [0]}, [()], [-1], [(1, 1)], 2)
    with pytest.raises(ValueError, match="keep=True"):
        critical_path(order, replay_ranks(order, lambda _: 1.0))
