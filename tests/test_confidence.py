"""Intervals: quantiles by hand, groups left out, coverage of the shipped table, and what a question is told."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from simulator.results import confidence
from simulator.results.confidence import COVERAGE, NEAR, SCALES, WORDS, distances, features, interval, quantiles, residuals
from simulator.simulate import simulate_step
from simulator.validation.intervals import calibrated, coverage, judged, score, write
from simulator.validation.published import published_runs, scenario_from_row


def rows(*residual: float, group: str = "abcdefgh") -> pd.DataFrame:
    """Return rows that differ in nothing but their group and residual."""
    frame = pd.DataFrame({"group": list(group)[: len(residual)], "cold": residual, "anchored": np.nan})
    return frame.assign(id=frame["group"], source="s", model="m", **dict.fromkeys(SCALES, 1.0), **dict.fromkeys(WORDS, "same"))


def test_equal_rows_give_plain_quantiles():
    ends = quantiles(rows(0.0), rows(-0.2, -0.1, 0.0, 0.1, 0.2), "cold", 0.6)
    # midpoint rule: shares 0.1, 0.3, 0.5, 0.7, 0.9
    np.testing.assert_allclose(ends, [[-0.15, 0.15]])


def test_own_group_has_no_part():
    table = rows(5.0, 0.1, 0.2, group="abb")
    ends = quantiles(table, table, "cold", 0.8, leave_out=True)
    assert ends[0].max() <= 0.2
    np.testing.assert_allclose(ends[1:], 5.0)
    alone = rows(1.0)
    assert np.isnan(quantiles(alone, alone, "cold", 0.8, leave_out=True)).all()


def test_rows_without_a_factor_have_no_part_in_anchored_intervals():
    table = rows(0.0, 0.1, 0.2).assign(anchored=[np.nan, 0.3, 0.3])
    np.testing.assert_allclose(quantiles(table, table, "anchored", 0.8), 0.3)


def test_near_rows_count_more():
    table = rows(-1.0, 1.0)
    table["hidden"] = [1.0, 1000.0]
    assert quantiles(rows(0.0), table, "cold", 0.5).mean() < -0.3


def test_distance_units():
    a, b = rows(0.0), rows(0.0)
    b["tp"], b["precision"] = 8.0, "fp8"
    assert distances(a, b)[0, 0] == pytest.approx(np.hypot(3 / SCALES["tp"], WORDS["precision"]))


def test_the_score_charges_width_and_misses():
    assert score(np.array([0.0]), -0.1, 0.1)[0] == pytest.approx(0.2)
    assert score(np.array([0.3]), -0.1, 0.1)[0] == pytest.approx(0.2 + 2 / (1 - COVERAGE) * 0.2)


def test_calibration_holds_the_share_that_it_promises():
    random = np.random.default_rng(0)
    table = pd.concat([rows(float(x), group=name) for name, x in zip([f"{i}" for i in range(200)], random.normal(size=200), strict=True)])
    table["group"] = [str(i) for i in range(200)]
    table = table.reset_index(drop=True)
    level = calibrated(table, "cold")
    assert level == pytest.approx(COVERAGE, abs=0.03)
    assert coverage(table, "cold", quantiles(table, table, "cold", level, leave_out=True))[0] == pytest.approx(COVERAGE, abs=0.01)


def test_the_shipped_table_holds_what_it_promises():
    table, levels = residuals()
    ends = {regime: quantiles(table, table, regime, levels[regime], leave_out=True) for regime in levels}
    for line in judged(table, ends).to_dict("records"):
        assert 0.75 <= line["coverage"] <= 0.85
        assert 0.75 <= line["coverage_macro"] <= 0.85
        assert line["score"] < line["constant_score"]


def test_the_shipped_rows_are_published_rows():
    table, _ = residuals()
    runs = published_runs()
    assert table["id"].is_unique
    assert set(table["id"]) <= set(runs["id"])
    assert set(runs.loc[runs["complete"] == "yes", "id"]) <= set(table["id"])


def test_writing_is_reproducible_and_read_back(tmp_path, monkeypatch):
    table = rows(-0.2, -0.1, 0.0, 0.1, 0.2).assign(anchored=[0.1, 0.2, 0.3, 0.4, 0.5])
    levels = write(table, tmp_path / "a.csv")
    write(table, tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    monkeypatch.setattr(confidence, "RESIDUALS", tmp_path / "a.csv")
    residuals.cache_clear()
    try:
        read, found = residuals()
        assert found == levels
        np.testing.assert_allclose(read["cold"], table["cold"])
    finally:
        residuals.cache_clear()


def test_a_question_is_told_what_it_is_close_to():
    row = published_runs().set_index("id", drop=False).loc["dgxc-v24.11.1-gpt3_175b-h100-bf16-1024"]
    scenario, _ = scenario_from_row(row)
    around = interval(scenario, 10.0)
    assert 0 < around.low_s < around.high_s
    assert around.inside
    assert around.accelerator_known
    assert around.comparable["distance"].iloc[0] == pytest.approx(0.0, abs=1e-3)
    assert set(around.comparable.loc[around.comparable["distance"] < 1e-3, "model"]) == {"GPT-3 175B"}
    assert around.comparable["distance"].is_monotonic_increasing
    assert interval(scenario, 20.0).low_s == pytest.approx(2 * around.low_s)


def test_far_from_everything_says_so():
    row = published_runs().set_index("id", drop=False).loc["dgxc-v24.11.1-gpt3_175b-h100-bf16-1024"]
    scenario, _ = scenario_from_row(row)
    job = scenario.job.model_copy(update={"sequence_length": 2**24})
    around = interval(scenario.model_copy(update={"job": job}), 10.0)
    assert not around.inside
    assert around.comparable["distance"].min() > NEAR
    assert features(scenario)["accelerators"] == 1024


def test_a_step_carries_its_interval():
    row = published_runs().set_index("id", drop=False).loc["dgxc-v24.11.1-gpt3_175b-h100-bf16-128"]
    scenario, _ = scenario_from_row(row)
    result = simulate_step(scenario)
    around, told = result.interval(), result.summary()
    assert told["step_time_interval_80_s"] == [around.low_s, around.high_s]
    assert told["inside_validated_range"] is True
    assert told["comparable_runs"][0] in set(published_runs()["id"])
