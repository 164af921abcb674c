"""Tokens per expert as a distribution: conserved exactly, placed, capped, read from a table."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from small import moe, scenario

from simulator.errors import PlanError, ProfileError
from simulator.pricing.durations import moe_layers, rank_load
from simulator.scenario.model import Experts
from simulator.scenario.plan import Plan
from simulator.scenario.routing import Routing, read_counts
from simulator.scenario.variation import Variation
from simulator.simulate import simulate_ranks
from simulator.workload.routing import _capped, _many, moe_layer_count, placement, popularity, route

EXPERTS = Experts(count=64, top_k=4, ffn=128)
TOKENS = np.full((3, 5), 8192)


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    def one(*choices):
        return draw(st.sampled_from(choices))

    kind = one("balanced", "zipf", "dirichlet", "measured")
    own = {
        "balanced": {},
        "zipf": {"exponent": one(0.0, 0.5, 1.0, 2.5)},
        "dirichlet": {"concentration": one(0.05, 1.0, 50.0)},
        "measured": {"counts": ((4, 4, *[0] * 62),) * 2},
    }[kind]
    return Routing(
        distribution=kind, **own, sampled=one(True, False), bias_balance=one(0.0, 0.5, 1.0), capacity_factor=one(None, 0.5, 1.0, 2.0),
        redundant_experts=one(0, 8, 24),
    )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(routings(), st.integers(0, 5), st.sampled_from((1, 2, 8)))
def test_tokens_are_conserved(routing, seed, ranks):
    experts = Experts(count=64, top_k=2, ffn=128)
    tokens = random(seed).integers(0, 5000, size=(3, 5)) * ranks
    routed = route(routing, experts, 2, tokens, ranks, random(seed))
    assert (routed.received >= 0).all()
    assert (routed.dropped >= 0).all()
    assert (routed.received.sum(axis=-1) + routed.dropped == tokens * experts.top_k).all()
    if routing.capacity_factor is None:
        assert routed.dropped_share == 0
        assert routed.load.mean() == pytest.approx(1.0)
    again = route(routing, experts, 2, tokens, ranks, random(seed))
    assert again.received.tobytes() == routed.received.tobytes()


def test_balanced_is_exactly_even():
    routed = route(Routing(), EXPERTS, 2, TOKENS, 16, random())
    assert (routed.load == 1).all()


def test_a_token_visits_an_expert_at_most_once():
    for exponent in (0.5, 2.0, 6.0):
        chance = popularity(Routing(distribution="zipf", exponent=exponent), 3, EXPERTS, random())
        assert chance.sum(axis=1) == pytest.approx(4.0)
        assert chance.max() <= 1
    one_each = Routing(distribution="measured", counts=((2, 2, *[0] * 62),))
    assert popularity(one_each, 1, Experts(count=64, top_k=2, ffn=1), random())[0].tolist() == [1, 1, *[0] * 62]


def test_zipf_follows_its_law():
    chance = np.sort(popularity(Routing(distribution="zipf", exponent=0.7), 1, EXPERTS, random())[0])[::-1]
    assert chance / chance[0] == pytest.approx(np.arange(1, 65) ** -0.7)


def test_dirichlet_varies_by_its_concentration():
    for concentration in (1.0, 25.0):
        share = popularity(Routing(distribution="dirichlet", concentration=concentration), 400, EXPERTS, random()) / 4
        free = share[(share < 0.25).all(axis=1)]  # rows that the cap of one pick per token does not touch
        want = np.sqrt((1 - 1 / 64) / (64 * concentration + 1) / 64) * 1.0
        assert free.std() == pytest.approx(want, rel=0.1)


def test_measured_counts_are_the_expected_ones():
    counts = random().multinomial(40_000, np.full(64, 1 / 64), size=2)
    counts[:, 0] += 40_000 - counts.sum(axis=1)
    routed = route(
        Routing(distribution="measured", counts=tuple(map(tuple, counts.tolist())), sampled=False), EXPERTS, 2, TOKENS, 64, random()
    )
    want = counts[:, None, None, :] * (8192 * 4 / 40_000)
    assert np.abs(routed.received - want).max() <= 1


def test_draws_scatter_as_multinomial():
    tokens = np.full((40, 50), 8192)
    routed = route(Routing(distribution="zipf", exponent=0.0), EXPERTS, 1, tokens, 16, random())
    picks, share = 8192 * 4, 1 / 16
    assert routed.received.std() == pytest.approx(np.sqrt(picks * share * (1 - share)), rel=0.05)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 50), st.sampled_from((2, 4, 8, 16)), st.sampled_from((0, 16, 32, 64)))
def test_placement_holds_every_expert_and_fills_every_rank(seed, ranks, redundant):
    chance = random(seed).dirichlet(np.full(64, 0.5))
    home = placement(chance, ranks, redundant)
    assert home.shape == (ranks, (64 + redundant) // ranks)
    copies = np.bincount(home.ravel(), minlength=64)
    assert copies.min() >= 1
    if redundant:  # the next copy goes to the expert with the most tokens per copy
        per_copy = chance / copies
        replicated = copies > 1
        assert (chance[replicated] / (copies[replicated] - 1)).min() >= per_copy.max() * (1 - 1e-12)


def test_redundant_experts_even_out_the_ranks():
    zipf = {"distribution": "zipf", "exponent": 1.0, "sampled": False}
    heaviest = [route(Routing(**zipf, redundant_experts=r), EXPERTS, 4, TOKENS, 8, random()).load.max() for r in (0, 8, 32)]
    assert heaviest[0] > 2
    assert max(heaviest[1:]) < 1.01


def test_bias_is_a_milder_distribution():
    zipf = {"distribution": "zipf", "exponent": 0.7, "sampled": False}
    away = [route(Routing(**zipf, bias_balance=b), EXPERTS, 4, TOKENS, 8, random()).load.max() - 1 for b in (0.0, 0.5, 1.0)]
    assert away[1] == pytest.approx(away[0] / 2, abs=1e-3)
    assert away[2] == pytest.approx(0, abs=1e-3)


def test_capacity_drops_what_is_over_it():
    zipf = {"distribution": "zipf", "exponent": 0.7}
    shares = []
    for factor in (1.0, 1.5, 100.0):
        routed = route(Routing(**zipf, capacity_factor=factor), EXPERTS, 2, TOKENS, 8, random())
        assert routed.received.max() <= 8 * np.ceil(factor * 8192 * 4 / 64)
        shares.append(routed.dropped_share)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.1
    assert shares[2] == 0


def test_slots_must_divide():
    says = r"64 experts \+ 3 redundant ones = 67 slots do not divide over ep = 8; use redundant_experts of 0 plus a multiple of 8"
    with pytest.raises(PlanError, match=says):
        route(Routing(redundant_experts=3), EXPERTS, 1, TOKENS, 8, random())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"distribution": "zipf"}, "distribution = zipf without exponent; give exponent"),
        ({"exponent": 1.0}, "distribution = balanced with exponent; write distribution: zipf"),
        ({"distribution": "measured"}, "give counts"),
        ({"distribution": "dirichlet", "concentration": 0}, "concentration"),
        (
            {"distribution": "measured", "counts": ((1, 2), (1, 3))},
            "layer 1 adds up to 4, layer 0 to 3; every layer routes the same tokens",
        ),
        ({"distribution": "measured", "counts": ((1, 2), (1, 1, 1))}, "layer 1 has 3 experts, layer 0 has 2"),
        ({"distribution": "measured", "counts": ((4, -1), (1, 2))}, "layer 0 gives expert 1 -1 tokens"),
        ({"distribution": "measured", "counts": ()}, "counts is empty"),
        ({"distribution": "measured", "counts": ((0, 0),)}, "adds up to 0"),
        ({"capacity_factor": -1}, "capacity_factor"),
        ({"bias_balance": 2}, "bias_balance"),
        ({"redundant_experts": -8}, "redundant_experts"),
    ],
)
def test_routing_that_makes_no_sense(fields, says):
    with pytest.raises(ProfileError, match=says):
        Routing(**fields)


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        (((4, 4, 4, 4),), "the table has 1 layers x 4 experts, the model 2 MoE layers x 4 experts"),
        (((4, 4, 4, 4, 0), (4, 4, 4, 4, 0)), "2 layers x 5 experts"),
        (((4, 4, 4, 3), (4, 4, 4, 3)), "each layer adds up to 15, which is 7.5 tokens of top_k = 2"),
        (((4, 4, 4, 4), (9, 2, 2, 3)), "8 tokens of top_k = 2; expert 0 of layer 1 has 9"),
    ],
)
def test_table_that_does_not_fit_the_model(counts, says):
    experts = Experts(count=4, top_k=2, ffn=8)
    with pytest.raises(PlanError, match=says):
        route(Routing(distribution="measured", counts=counts), experts, 2, TOKENS, 2, random())


def test_table_from_a_file(tmp_path):
    path = tmp_path / "counts.csv"
    path.write_text("layer,expert_0,expert_1\n3,5,7\n4,6,6\n")
    assert read_counts(path) == ((5, 7), (6, 6))
    for text, says in (
        ("5,7\n6,6\n", "expected a header layer,expert_0"),
        ("layer,expert_0\n", "a line per MoE layer"),
        ("layer,expert_0,expert_1\n0,5\n", "line 2: 2 columns, the header has 3"),
        ("layer,expert_0,expert_1\n0,5,7\n1,5,many\n", "line 3: 'many' is not a count"),
        ("layer,expert_0,expert_1\n0,5,7.5\n", "'7.5' is not a count"),
        (" \n", "is empty"),
    ):
        path.write_text(text)
        with pytest.raises(ProfileError, match=says):
            read_counts(path)
    with pytest.raises(ProfileError, match="cannot be read"):
        read_counts(tmp_path / "missing.csv")


def test_loads_lie_on_ranks_as_the_mesh_does():
    routed = route(Routing(distribution="zipf", exponent=1.0), EXPERTS, 2, np.full((3, 2), 4096), 4, random())
    load = rank_load(routed, Plan(ep=4, etp=2, dp_shard=16))
    assert load.shape == (2, 3, 16)
    for rank in range(16):
        assert (load[:, :, rank] == routed.load[:, :, rank // 8, rank // 2 % 4]).all()


@pytest.mark.parametrize("plan", [Plan(pp=2, ep=4), Plan(tp=2, pp=2, vpp=2, ep=4, schedule="interleaved"), Plan(ep=8, recompute="full")])
def test_every_layer_meets_its_own_load_forward_and_backward(plan):
    s = scenario(moe(8, mtp_layers=1), 16, plan, 4)
    program = simulate_ranks(s, Variation(jitter=0)).program
    layer = moe_layers(program, s)
    assert sorted(set(layer[layer >= 0])) == list(range(moe_layer_count(s.model)))
    met: dict[tuple, list[int]] = {}
    for node, number in enumerate(layer):
        action = program.label[node]
        if number >= 0:
            met.setdefault((program.rank_class[node], action), []).append(int(number))
    for (_, action), numbers in met.items():
        order = sorted(numbers) if action.kind == "F" else sorted(numbers, reverse=True)
        assert numbers == order
    forward = {(a.micro_batch, n) for (_, a), numbers in met.items() if a.kind == "F" for n in numbers}
    backward = {(a.micro_batch, n) for (_, a), numbers in met.items() if a.kind == "B" for n in numbers}
    assert forward == backward
    assert len(forward) == 4 * moe_layer_count(s.model)


def test_uneven_experts_cost_time():
    s = scenario(moe(4, 1024), 8, Plan(ep=8), 4, sequence_length=1024)
    even = simulate_ranks(s, Variation(jitter=0))
    uneven = simulate_ranks(s, Variation(jitter=0), Routing(distribution="zipf", exponent=1.0))
    assert uneven.step_time_s > even.step_time_s
    assert uneven.dropped_share == 0
    dropping = simulate_ranks(s, Variation(jitter=0), Routing(distribution="zipf", exponent=1.0, capacity_factor=1.0))
    assert dropping.dropped_share > 0.1
    assert dropping.step_time_s < uneven.step_time_s


@pytest.mark.parametrize("capacity_factor", [0.5, 1.0, 1.25, 3.0])
def test_capacity_cuts_each_slot_of_a_multinomial(capacity_factor):
    """Slots drawn together that cannot fill up, or must: the same ranks' means and spreads as slots drawn one by one."""
    weight = np.random.default_rng(3).permutation(np.arange(1, 49) ** -0.7).reshape(4, 12)
    picks = np.full((4000, 1), 3000)
    found = _capped(picks, weight, capacity_factor / 48, np.random.default_rng(1))[:, 0]
    each = np.random.default_rng(2).multinomial(picks[:, 0], (weight / weight.sum()).ravel())
    plain = np.minimum(each, np.ceil(capacity_factor * 3000 / 48)).reshape(-1, 4, 12).sum(axis=-1)
    assert found.max() <= 12 * np.ceil(capacity_factor * 3000 / 48)
    assert np.abs(found.mean(axis=0) - plain.mean(axis=0)).max() <= 5 * (plain.std(axis=0) * np.sqrt(2 / 4000)).max() + 1e-9
    assert found.std(axis=0) == pytest.approx(plain.std(axis=0), rel=0.1, abs=0.2)


def test_large_counts_are_drawn_as_multinomial():
    """Marginal binomials and their correlations, against scipy's; small counts are numpy's own draws."""
    weight, picks = np.array([0.2, 0.0, 0.5, 0.3]), np.full((200, 500), 1000)
    counts = _many(picks, weight, random(4))
    assert (counts.sum(axis=0) == 1000).all()
    assert (counts >= 0).all()
    assert (counts[1] == 0).all()
    for part in (0, 2, 3):
        value, times = np.unique(counts[part], return_counts=True)
        found = np.cumsum(times) / picks.size
        assert np.abs(found - stats.binom.cdf(value, 1000, weight[part])).max() < 1.95 / np.sqrt(picks.size)  # Kolmogorov, 0.1 %
    want = -np.sqrt(0.2 * 0.5 / (0.8 * 0.5))
    assert np.corrcoef(counts[0].ravel(), counts[2].ravel())[0, 1] == pytest.approx(want, abs=0.01)
    few = _many(picks // 10, weight, random(4))
    assert (np.moveaxis(few, 0, -1) == random(4).multinomial(picks // 10, weight)).all()
