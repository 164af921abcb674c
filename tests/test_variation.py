"""What sets ranks and micro-batches apart: drawn by seed, conserved, refused with the remedy."""

from __future__ import annotations

import numpy as np
import pytest
from small import dense, scenario

from simulator.errors import PlanError, ProfileError
from simulator.pricing.durations import uneven
from simulator.scenario.plan import Plan
from simulator.scenario.routing import Routing
from simulator.scenario.variation import Variation
from simulator.simulate import simulate_ranks, simulate_step


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("slow_host_slowdown", -0.1, "slow_host_slowdown: -0.1: what is slow takes 1 or more times as long; write 1.1 for 10 % slower"),
        ("throttled_slowdown", 0.9, "1 or more times as long"),
        ("slow_host_share", 5, "5 is not a share between 0 and 1; write 0.005 for 0.5 %"),
        ("throttled_share", -1, "not a share"),
        ("jitter", -0.1, "not a sigma"),
        ("sequence_spread", 20, "20 is not a sigma between 0 and 1; write 0.02 for 2 %"),
        ("jitter", float("nan"), "jitter"),
        ("seed", -1, "seed"),
        ("slow_hosts", 0.1, "did you mean slow_host_share"),
    ],
)
def test_bad_values_are_refused_with_the_remedy(field, value, says):
    with pytest.raises(ProfileError, match=says):
        Variation(**{field: value})


def test_defaults_switch_on_nothing_but_jitter():
    variation = Variation()
    assert (variation.slowdown(1000, 8) == 1).all()
    assert (variation.tokens(4, 8, 4096, 4) == 4096).all()
    assert [row["fact"] for row in variation.provenance()] == ["jitter"]


def test_every_number_in_use_has_a_source():
    rows = Variation(slow_host_share=0.005, throttled_share=0.1, throttled_slowdown=1.2).provenance()
    assert [(r["fact"], r["grade"]) for r in rows] == [
        ("jitter", "assumed"),
        ("slow_host_slowdown", "published"),
        ("throttled_slowdown", "assumed"),
    ]
    assert "MegaScale" in rows[1]["source"]


def test_share_of_slow_hosts_and_whole_hosts():
    slow = Variation(seed=1, slow_host_share=0.005).slowdown(80_000, 8).reshape(-1, 8)
    assert (slow == slow[:, :1]).all()
    assert set(slow[:, 0]) == {1.0, 1.1}
    assert (slow[:, 0] > 1).mean() == pytest.approx(0.005, rel=0.3)
    hot = Variation(seed=1, throttled_share=0.05).slowdown(80_000, 8)
    assert (hot > 1).mean() == pytest.approx(0.05, rel=0.1)


def test_slow_and_throttled_multiply_and_a_last_host_may_be_part_empty():
    everything = Variation(slow_host_share=1, throttled_share=1, slow_host_slowdown=1.5, throttled_slowdown=2.0)
    assert (everything.slowdown(13, 8) == 3.0).all()
    assert len(everything.slowdown(13, 8)) == 13


@pytest.mark.parametrize("spread", [0.1, 0.5, 1.0])
def test_uneven_sequences_conserve_tokens(spread):
    tokens = Variation(seed=2, sequence_spread=spread).tokens(16, 64, 4096, 8)
    assert tokens.sum() == 16 * 64 * 4096
    assert (tokens % 8 == 0).all()
    assert tokens.min() > 0
    assert np.log(tokens).std() == pytest.approx(spread, rel=0.1)


def test_tokens_that_do_not_divide_are_refused():
    with pytest.raises(PlanError, match="4095 tokens of a micro-batch do not divide over its 8 ranks; use a multiple of 8"):
        Variation().tokens(1, 1, 4095, 8)


def test_seeds_are_independent_and_repeatable():
    draws = [Variation(seed=seed, throttled_share=0.5).slowdown(64, 8).tobytes() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert Variation().random("a").random() != Variation().random("b").random()


def test_jitter_has_mean_one_and_the_sigma_of_its_kernels():
    s = scenario(dense(2, 1024), 512, Plan(), 1, host=8)
    result = simulate_ranks(s, Variation(jitter=0.2))
    durations, program = result.durations, result.program
    for node, task in enumerate(program.task):
        if program.tasks[task].stream == "compute" and len(program.tasks[task].ops) > 1:
            price = durations.prices[task]
            factor = durations(node) / price.sum()
            want = 0.2 * np.sqrt((price**2).sum()) / price.sum()
            assert factor.mean() == pytest.approx(1.0, abs=4 * want / np.sqrt(512))
            assert factor.std() == pytest.approx(want, rel=0.2)
            assert (durations(node) == durations(node)).all()


def test_jitter_is_of_kernels_only_and_uncorrelated():
    s = scenario(dense(2, 1024), 256, Plan(tp=4), 2, host=8)
    result = simulate_ranks(s, Variation(jitter=0.2))
    computes = [result.program.tasks[t].computes for t in result.program.task]
    lasts = [result.durations(node) for node in range(len(computes))]
    assert all(np.ndim(x) == int(c) for x, c in zip(lasts, computes, strict=True))
    correlation = np.corrcoef([x for x, c in zip(lasts, computes, strict=True) if c])
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.4


def test_longer_sequences_take_longer_and_attention_most():
    s = scenario(dense(2, 1024), 8, Plan(), 4, host=8, sequence_length=4096)
    variation = Variation(seed=5, jitter=0, sequence_spread=0.3)
    what, _ = uneven(s, variation, None)
    result = simulate_ranks(s, variation)
    program, durations = result.program, result.durations
    assert what.tokens is not None
    for node, task in enumerate(program.task):
        action, ops = program.label[node], program.tasks[task].ops
        if action is None or program.tasks[task].axis in ("dp", "edp"):
            continue
        more = what.tokens[action.micro_batch]
        price = durations.prices[task]
        least, most = price.sum() * np.minimum(more, 1.0), price.sum() * np.maximum(more, more**2)
        lasts = durations(node)
        assert (lasts <= np.maximum(most, price.sum()) * (1 + 1e-9)).all()
        assert (lasts >= np.minimum(least, price.sum() * more**2) * (1 - 1e-9)).all()
        if all(op.kind == "attention" for op in ops):
            assert lasts == pytest.approx(price.sum() * more**2)


def test_routing_of_a_dense_model_is_refused():
    s = scenario(dense(2), 8, Plan(), 1)
    with pytest.raises(PlanError, match="routing needs experts: routing is balanced, dense is dense; leave routing out"):
        simulate_ranks(s, routing=Routing())


def test_no_seeds_are_refused():
    with pytest.raises(PlanError, match="seeds = 0; use 1 or more"):
        simulate_ranks(scenario(dense(2), 8, Plan(), 1), seeds=0)


def test_variation_needs_every_rank():
    s = scenario(dense(2), 8, Plan(), 1)
    with pytest.raises(ProfileError, match="write ranks='all'"):
        simulate_step(s, variation=Variation())
    every = simulate_step(s, ranks="all", variation=Variation(jitter=0.1), seeds=2)
    assert every.step_time_s == simulate_ranks(s, Variation(jitter=0.1)).step_time_s
    assert every.breakdown()["seconds"].sum() == pytest.approx(every.step_time_s, rel=1e-12)
    summary = every.summary()
    assert summary["distribution"]["seeds"] == 2
    assert len(summary["slowest"]) == 8
    assert "jitter" in set(every.sources()["fact"])


def test_a_slow_last_stage_is_slow_and_holds_up_the_others():
    s = scenario(dense(8, 1024), 8, Plan(pp=4), 8)
    even, slow = (simulate_ranks(s, Variation(jitter=0, last_stage_slowdown=factor)) for factor in (1.0, 1.5))
    one, other = (r.table().groupby("stage")["compute_s"].sum() for r in (even, slow))
    assert (other / one).tolist() == pytest.approx([1, 1, 1, 1.5])
    assert slow.step_time_s > even.step_time_s
