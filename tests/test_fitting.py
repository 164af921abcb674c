"""Oracle: parameters that made-up rows were made with; bounds, priors and left-out groups by construction."""

from __future__ import annotations

import numpy as np
import pytest

from simulator.fitting import Parameter, fit, leave_out

FREE = tuple(Parameter(name, "1", 1.0, 0.1, 10.0, 100.0) for name in ("a", "b"))


def rows(values: np.ndarray, count: int = 200, noise: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return slopes, misses and weights of rows that follow `values` up to noise."""
    random = np.random.default_rng(seed)
    slopes = -random.uniform(0.0, 1.0, size=(count, len(values)))
    return slopes, slopes @ np.log(values) + noise * random.standard_normal(count), np.ones(count)


def test_true_parameters_come_back():
    truth = np.array([0.7, 1.4])
    assert fit(FREE, *rows(truth)).values == pytest.approx(truth, rel=1e-4)


def test_outliers_move_little():
    slopes, misses, weights = rows(np.array([0.7, 1.4]), noise=0.02)
    misses[:10] += 3.0
    assert fit(FREE, slopes, misses, weights).values == pytest.approx([0.7, 1.4], rel=0.1)


def test_bounds_hold():
    tight = tuple(Parameter(p.name, "1", 1.0, 0.9, 1.1, 100.0) for p in FREE)
    found = fit(tight, *rows(np.array([0.7, 1.4])))
    assert np.all((found.values >= 0.9 - 1e-9) & (found.values <= 1.1 + 1e-9))


def test_without_rows_that_speak_of_it_a_parameter_stays():
    slopes, misses, weights = rows(np.array([0.7, 1.0]))
    slopes[:, 1] = 0.0
    found = fit(tuple(Parameter(p.name, "1", 1.0, 0.1, 10.0, 0.3) for p in FREE), slopes, misses, weights)
    assert found.values[1] == pytest.approx(1.0, abs=1e-6)
    assert found.sensitivity[1] == 0.0


def test_a_prior_stays_where_it_was_when_the_start_moves():
    """Starting again from a result must not take the result for what was known before."""
    truth, known = np.array([0.7, 1.4]), 1.0
    slopes, misses, weights = rows(truth, 20)
    once = fit(tuple(Parameter(p.name, "1", 1.0, 0.1, 10.0, 0.1, known) for p in FREE), slopes, misses, weights).values
    again = tuple(Parameter(p.name, "1", float(v), 0.1, 10.0, 0.1, known) for p, v in zip(FREE, once, strict=True))
    assert fit(again, slopes, misses - slopes @ np.log(once), weights).values == pytest.approx(once, rel=1e-4)


def test_intervals_hold_the_truth_four_times_of_five():
    truth, held = np.array([0.7, 1.4]), []
    for seed in range(100):
        found = fit(FREE, *rows(truth, 60, 0.1, seed), tolerance=1.0)
        held.append((found.low <= truth) & (truth <= found.high))
    assert 0.5 <= np.mean(held) <= 1.0


def test_a_left_out_group_does_not_shape_its_own_prediction():
    slopes, misses, weights = rows(np.array([0.7, 1.4]))
    groups = np.array(["odd", "even"] * 100)
    misses[groups == "odd"] += 0.5
    moved = leave_out(FREE, slopes, misses, weights, groups)["odd"]
    changed = misses.copy()
    changed[groups == "odd"] -= 5.0
    assert leave_out(FREE, slopes, changed, weights, groups)["odd"] == pytest.approx(moved, abs=1e-12)
    assert moved == pytest.approx(np.log([0.7, 1.4]), abs=1e-3)


def test_nothing_else_to_learn_from_leaves_the_starts():
    slopes, misses, weights = rows(np.array([0.7, 1.4]))
    assert leave_out(FREE, slopes, misses, weights, np.array(["all"] * 200))["all"].tolist() == [0.0, 0.0]
