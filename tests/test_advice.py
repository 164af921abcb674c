"""Scaling-law advice against the laws' own published examples, and against a search by hand."""

from __future__ import annotations

import numpy as np
import pytest

from simulator.errors import ProfileError
from simulator.planning.advice import HOFFMANN, REPLICATION, ParametricLaw, advise, efficiency_leverage, optimal_batch_tokens

GOPHER = 5.76e23


def test_chinchilla_at_its_own_budget():
    parameters, tokens = REPLICATION.optimum(GOPHER)
    assert parameters == pytest.approx(72e9, rel=0.01)
    assert tokens == pytest.approx(1.33e12, rel=0.01)
    assert tokens / parameters == pytest.approx(18.4, abs=0.1)


@pytest.mark.parametrize(("alpha", "beta", "ratio"), [(0.34, 0.28, 92.6), (0.3392, 0.2849, 59.1)])
def test_hoffmanns_optimum_depends_on_rounding(alpha, beta, ratio):
    law = ParametricLaw(HOFFMANN.floor, HOFFMANN.a, HOFFMANN.b, alpha, beta, "")
    parameters, tokens = law.optimum(GOPHER)
    assert tokens / parameters == pytest.approx(ratio, abs=0.3)


@pytest.mark.parametrize("flop", [1e20, 1e23, 1e26])
def test_no_other_split_of_the_compute_has_a_lower_loss(flop):
    parameters, tokens = REPLICATION.optimum(flop)
    assert 6 * parameters * tokens == pytest.approx(flop, rel=1e-12)
    others = parameters * np.geomspace(0.2, 5, 201)
    losses = REPLICATION.loss(others, flop / 6 / others)
    assert REPLICATION.loss(parameters, tokens) <= losses.min() * (1 + 1e-12)
    assert abs(int(losses.argmin()) - 100) <= 1


def test_leverage_is_that_of_the_sources_example():
    assert efficiency_leverage(1e22, 0.031, 12) == pytest.approx(7.2, abs=0.1)
    granularity = np.geomspace(2, 64, 400)
    assert granularity[efficiency_leverage(1e22, 0.031, granularity).argmax()] == pytest.approx(11.3, rel=0.03)


def test_experts_buy_loss_and_total_parameters():
    dense, sparse = advise(1e24), advise(1e24, activation=1 / 32)
    assert (dense.leverage, dense.total_parameters) == (1.0, dense.parameters)
    assert sparse.parameters == dense.parameters
    assert sparse.total_parameters == pytest.approx(32 * sparse.parameters)
    assert sparse.loss < dense.loss
    assert sparse.loss == pytest.approx(advise(1e24 * sparse.leverage).loss)
    assert any("2507.17702" in source for source in sparse.sources)


def test_advice_beyond_what_the_laws_were_fitted_on_says_so():
    assert advise(1e21, activation=1 / 32).extrapolated == ()
    (law,) = advise(5e21, activation=1 / 32).extrapolated
    assert "at most 3e+21 FLOP to 5e+21" in law
    assert len(advise(1e24).extrapolated) == 1
    assert len(advise(1e24, activation=1 / 32).extrapolated) == 2


def test_batch_grows_with_tokens_by_its_exponent():
    assert optimal_batch_tokens(2e12) / optimal_batch_tokens(1e12) == pytest.approx(2**0.571)


@pytest.mark.parametrize(("flop", "activation"), [(0, 1.0), (1e24, 0.0), (1e24, 1.5), (float("nan"), 1.0)])
def test_numbers_out_of_range_are_refused(flop, activation):
    with pytest.raises(ProfileError, match="write positive ones"):
        advise(flop, activation)
