"""More work, more imbalance and slower hosts never end a step earlier; tokens, FLOP and bytes are conserved."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import moe, scenario, scenarios

from simulator.engine.ranks import replay_ranks
from simulator.errors import PlanError, ProfileError
from simulator.planning.remedies import remedies
from simulator.pricing.durations import RankDurations, Uneven, rank_load, uneven
from simulator.pricing.operations import loaded, op_s
from simulator.scenario.plan import Plan
from simulator.scenario.routing import Routing
from simulator.scenario.scenario import Scenario
from simulator.scenario.variation import Variation
from simulator.simulate import node_limited, simulate_ranks, simulate_step, slowdowns
from simulator.workload.experts import copies
from simulator.workload.routing import RoutedTokens, moe_layer_count
from simulator.workload.stages import blocks

ROUNDING = 1e-12
CALM = Variation(jitter=0)


def slowed(s: Scenario, hosts: dict[int, float]) -> Scenario:
    return s.model_copy(update={"cluster": s.cluster.model_copy(update={"slow_hosts": hosts})})


@settings(max_examples=40, deadline=None)
@given(scenarios(hidden=(256,), micro_batches=4), st.integers(0, 9), st.data())
def test_longer_operations_never_end_anything_earlier(s, seed, data):
    result = simulate_ranks(s, CALM)
    random = np.random.default_rng(seed)
    shape = len(result.program), result.order.ranks
    before = random.random(shape)
    after = before + random.random(shape) * (random.random(shape) < data.draw(st.sampled_from((0.001, 0.1, 1.0))))
    early, late = (replay_ranks(result.order, lambda n, d=d: d[n], keep=True).ends for d in (before, after))
    assert (late >= early).all()


@settings(max_examples=30, deadline=None)
@given(scenarios(hidden=(256, 1024), micro_batches=4), st.integers(0, 9), st.data())
def test_slower_host_never_helps(s, seed, data):
    host = data.draw(st.integers(0, s.cluster.hosts - 1))
    variation = Variation(seed=seed, jitter=0.1, throttled_share=0.1)
    times = [simulate_ranks(slowed(s, {host: factor}), variation).step_time_s for factor in (1.0, 1.1, 1.5, 3.0)]
    assert times == sorted(times)


@settings(max_examples=30, deadline=None)
@given(scenarios(hidden=(256, 1024), micro_batches=4, natural=True), st.integers(0, 9))
def test_more_imbalance_never_helps(s, seed):
    """Ranks of equal speed, loads pulled away from the mean by one factor: each expert group waits for its heaviest rank."""
    result, plan = simulate_ranks(s, CALM), s.plan
    micro_batches = s.job.global_batch // (plan.dp * plan.micro_batch)
    shape = moe_layer_count(s.model), micro_batches, result.order.ranks // (plan.ep * plan.etp), plan.ep
    away = np.random.default_rng(seed).uniform(-1, 1, shape)
    away -= away.mean(axis=-1, keepdims=True)
    slow = slowdowns(result.program, s)
    times = []
    for strength in (0.0, 0.1, 0.3, 0.49):
        routed = RoutedTokens(1.0 + strength * away, np.zeros(shape[:-1]), 1.0)
        what = Uneven(np.ones((plan.pp, result.order.ranks)), None, rank_load(routed, plan))
        times.append(replay_ranks(result.order, RankDurations(result.program, s, slow, what, CALM)).end_s.max())
    assert all(later >= earlier * (1 - ROUNDING) for earlier, later in zip(times[:-1], times[1:], strict=True))


def test_remedies_help():
    """The same popular experts, ever more of the imbalance taken away by bias, by copies, by dropping."""
    s = scenario(moe(4, 1024), 16, Plan(ep=8), 8, sequence_length=1024)

    def step_s(**remedy) -> float:
        return simulate_ranks(s, CALM, Routing(distribution="zipf", exponent=1.0, sampled=False, **remedy)).step_time_s

    balanced = simulate_ranks(s, CALM).step_time_s
    by_bias = [step_s(bias_balance=b) for b in (0.0, 0.3, 0.6, 1.0)]
    assert by_bias == sorted(by_bias, reverse=True)
    assert by_bias[-1] == pytest.approx(balanced, rel=1e-9)
    assert step_s(redundant_experts=8) < by_bias[0]
    by_capacity = [step_s(capacity_factor=c) for c in (8.0, 1.5, 1.0)]
    assert by_capacity == sorted(by_capacity, reverse=True)
    assert by_capacity[0] == by_bias[0]


def test_remedies_of_a_scenario_side_by_side(tmp_path):
    """A scenario's file says how uneven its experts are and what is done about it; every remedy helps, all of them most."""
    skewed = Routing(distribution="zipf", exponent=1.0, sampled=False, bias_balance=0.5, capacity_factor=1.5, redundant_experts=8)
    s = scenario(moe(4, 1024), 16, Plan(ep=8), 8, sequence_length=1024)
    s.model_copy(update={"routing": skewed}).save(tmp_path / "skewed.yaml")
    loaded = Scenario.load(tmp_path / "skewed.yaml")
    assert loaded.routing == skewed
    table = remedies(loaded, CALM).set_index("remedy")
    assert table.index.tolist() == ["none", "bias_balance", "capacity_factor", "redundant_experts", "all"]
    step, load = table["step_time_s"], table["heaviest_load"]
    assert step.idxmax() == load.idxmax() == "none"
    assert step["all"] <= step.min() * (1 + ROUNDING)
    assert (table["over_balanced"] >= 1 - ROUNDING).all()
    assert table["dropped_share"][["none", "bias_balance", "redundant_experts"]].max() == 0 < table["dropped_share"]["capacity_factor"]
    assert step["all"] == simulate_ranks(loaded, CALM).step_time_s
    assert any("routing" in said for said in simulate_step(loaded).not_modelled)
    with pytest.raises(ProfileError, match="uneven"):
        remedies(s)


def test_a_limit_of_hosts_per_token_spares_the_network():
    """Eight experts on four hosts: two picks visit 13 / 7 hosts on average, under node-limited routing one; its copies decide."""
    skewed = Routing(distribution="zipf", exponent=1.0, sampled=False, hosts_per_token=1, redundant_experts=8)
    s = scenario(moe(4, 1024), 16, Plan(ep=8, dispatcher="deepep"), 8, host=2, sequence_length=1024)
    s = s.model_copy(update={"routing": skewed})
    table = remedies(s, CALM).set_index("remedy")
    assert table.index.tolist() == ["none", "hosts_per_token", "redundant_experts", "all"]
    assert table["step_time_s"]["hosts_per_token"] < table["step_time_s"]["none"]
    assert table["heaviest_load"]["hosts_per_token"] == table["heaviest_load"]["none"]
    assert table["step_time_s"]["all"] == table["step_time_s"].min()
    assert table["activations_bytes"]["redundant_experts"] < table["activations_bytes"]["none"]
    limited = node_limited(s, skewed)
    free, one = (copies(x.model.experts, True, 8.0, 2.0, 4.0)[0] for x in (s, limited))
    assert (free, one) == (pytest.approx(13 / 7 * 3 / 4), pytest.approx(3 / 4))
    assert node_limited(s, skewed.model_copy(update={"hosts_per_token": 4})) is s
    spread = s.model_copy(update={"plan": s.plan.model_copy(update={"dispatcher": "alltoall"})})  # a copy for each expert
    table = remedies(spread, CALM).set_index("remedy")["step_time_s"]
    assert table["hosts_per_token"] == table["none"]


def test_hosts_that_do_not_hold_a_tokens_experts_are_refused():
    s = scenario(moe(4, 1024), 16, Plan(ep=8), 8, host=1, sequence_length=1024)
    with pytest.raises(PlanError, match="hosts_per_token of at least 2"):
        simulate_ranks(s, CALM, Routing(hosts_per_token=1))


@settings(max_examples=40, deadline=None)
@given(scenarios(hidden=(256,), micro_batches=5, natural=True), st.integers(0, 9), st.sampled_from((0.0, 0.3)))
def test_routed_tokens_flop_and_bytes_are_conserved(s, seed, spread):
    what, dropped = uneven(s, Variation(seed=seed, sequence_spread=spread), Routing(distribution="zipf", exponent=0.8))
    assert dropped == 0
    assert what.load is not None
    assert what.load.mean(axis=(1, 2)) == pytest.approx(1.0)
    ops = [op for b in blocks(s.model, s.plan, s.job).values() for seg in (*b.forward, *b.backward) for op in seg if op.routed]
    for op in ops:
        spread_over = loaded(op, what.load[0])
        assert spread_over.flop * np.ones_like(what.load[0]) == pytest.approx(spread_over.flop)
        assert np.mean(spread_over.flop) == pytest.approx(op.flop)
        assert np.mean(spread_over.bytes) == pytest.approx(op.bytes)


@settings(max_examples=20, deadline=None)
@given(scenarios(hidden=(256, 2048), micro_batches=3, natural=True))
def test_a_load_for_each_rank_is_priced_as_one_at_a_time(s):
    loads, args = np.array([0.0, 0.3, 1.0, 1.7, 2.9]), (s.model, s.plan, s.cluster)
    for block in blocks(s.model, s.plan, s.job).values():
        for op in (op for segment in (*block.forward, *block.backward) for op in segment):
            together = np.broadcast_to(op_s(op, *args, load=loads), loads.shape)
            assert together.tolist() == [float(op_s(op, *args, load=float(load))) for load in loads]
            assert (np.diff(together) >= -ROUNDING * together[1:]).all()


def hastened(s: Scenario, links: float, kernels: float) -> Scenario:
    """Return `s` with links, or peaks and memory of the accelerators, that many times as fast."""
    host, accelerator = s.cluster.host, s.cluster.accelerator
    host = host.model_copy(
        update={
            "scale_up_bytes_per_s": host.scale_up_bytes_per_s * links,
            "nic_bytes_per_s": host.nic_bytes_per_s * links,
            "bus_bytes_per_s": {name: rate * links for name, rate in host.bus_bytes_per_s.items()},
        }
    )
    accelerator = accelerator.model_copy(
        update={
            "hbm_bytes_per_s": accelerator.hbm_bytes_per_s * kernels,
            "peak_flop_per_s": {name: rate * kernels for name, rate in accelerator.peak_flop_per_s.items()},
        }
    )
    return s.model_copy(update={"cluster": s.cluster.model_copy(update={"host": host, "accelerator": accelerator})})


@settings(max_examples=30)
@given(scenarios(hidden=(256, 2048), micro_batches=4), st.sampled_from((1.1, 2.0)))
def test_a_faster_link_or_accelerator_never_slows_a_step(s, factor):
    """The order is fixed, and what communication takes of the kernels beside it does not grow with its speed."""
    step = simulate_step(s).step_time_s
    for faster in (hastened(s, factor, 1.0), hastened(s, 1.0, factor)):
        assert simulate_step(faster).step_time_s <= step * (1 + ROUNDING)
