"""The three regimes, exactly: who is left out, what a factor is fitted on, how groups are averaged."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.validation.keys import configuration_of, family_of, release_of
from simulator.validation.published import published_runs, validate
from simulator.validation.regimes import common_part, errors, floor, kinds, others, pairs, regimes, scored


def table(*rows: tuple[str, str, float, float], **changes) -> pd.DataFrame:
    """Return predicted rows from (family, release, measured, predicted)."""
    frame = pd.DataFrame(rows, columns=["family", "release", "measured_s", "predicted_s"])
    frame["relative_error"] = frame["predicted_s"] / frame["measured_s"] - 1
    same = {
        "skipped": "", "accelerator": "h100", "arch": "dense", "complete": "yes", "precision": "bf16", "flop": 1.0,
        "peak_flop_per_s": 1.0, "configuration": "", "options": "",
    }  # fmt: skip
    return frame.assign(id=[f"r{i}" for i in range(len(frame))], **(same | changes))


def test_the_factor_comes_from_other_models_of_the_release():
    rows = scored(table(("a", "1", 1, 2), ("a", "1", 1, 2), ("b", "1", 1, 4), ("c", "1", 1, 16), ("a", "2", 1, 3), ("b", "3", 1, 7)))
    # a: median of b, c and nothing, ln 4, ln 16, 0; b: of a, c and nothing; c: of a, b and nothing; alone in 2 and 3: none
    np.testing.assert_allclose(rows["factor"], [1 / 4, 1 / 4, 1 / 2, 1 / 2, np.nan, np.nan])
    np.testing.assert_allclose(rows["anchored_error"], [2 / 4 - 1, 2 / 4 - 1, 4 / 2 - 1, 16 / 2 - 1, np.nan, np.nan])


@pytest.mark.parametrize(
    ("models", "factor"), [([0.1], 0.05), ([-0.6, -0.01], -0.01), ([-0.1, 0.2], 0.0), ([0.05, 0.08, 0.06], 0.055), ([0.2] * 20, 0.2)]
)
def test_a_release_is_what_its_models_have_in_common(models, factor):
    assert common_part(np.array(models)) == pytest.approx(factor)


def test_a_big_sweep_of_one_model_decides_no_factor():
    few = table(("a", "1", 1, 2), ("b", "1", 1, 3), ("c", "1", 1, 4))
    many = pd.concat([few, *[few.iloc[[0]]] * 50], ignore_index=True)
    assert others(few, np.log(few["predicted_s"]))[1] == others(many, np.log(many["predicted_s"]))[1]


def test_the_baseline_is_one_rate_of_the_other_models():
    rows = scored(table(("a", "1", 1, 1), ("b", "2", 2, 1), ("c", "3", 8, 1)))
    # FLOP 1 everywhere: rates 1, 1/2, 1/8; a gets the geometric middle of b and c
    np.testing.assert_allclose(rows["baseline_s"], [4, 8**0.5, 2**0.5])
    alone = scored(table(("a", "1", 1, 1), ("b", "2", 2, 1)).assign(accelerator=["x", "y"], peak_flop_per_s=[1.0, 10.0]))
    # nobody else on the accelerator: the share of the peak that the other accelerator reached, 1/20 and 1
    np.testing.assert_allclose(alone["baseline_s"], [20, 0.1])


def test_groups_weigh_the_same_whatever_their_size():
    rows = scored(table(*[("a", "1", 1, 1.1)] * 9, ("b", "1", 1, 1.5)))
    found = errors(rows["relative_error"], rows)
    assert found["rows"] == 10
    assert found["groups"] == 2
    assert found["mean"] == pytest.approx(0.3)
    assert found["bias"] == pytest.approx(0.3)
    assert errors(rows["relative_error"] * np.nan, rows)["rows"] == 0


def test_pairs_share_a_release_and_any_common_factor_cancels():
    rows = scored(table(("a", "1", 1, 2), ("b", "1", 3, 6), ("c", "1", 5, 20), ("a", "2", 1, 9)))
    found = pairs(rows)
    assert sorted(zip(found["i"], found["j"], strict=True)) == [(0, 1), (0, 2), (1, 2)]
    np.testing.assert_allclose(found["error"], [0, np.log(2), np.log(2)], atol=1e-12)


def test_pairs_are_told_apart_by_what_they_share():
    one = ["h100", "h100", "h100", "b200", "b200"]
    rows = scored(table(*[(f, "1", 1, p) for f, p in zip("aabac", (1, 2, 8, 4, 64), strict=True)], accelerator=one))
    found = kinds(rows).set_index(["arch", "shared"]).loc["dense"]
    assert found["pairs"].to_dict() == {"release": 10, "model and accelerator": 1, "accelerator": 3, "model": 2, "neither": 4}
    assert found.loc["model and accelerator", "median"] == pytest.approx(np.log(2))
    assert found.loc["model", "pooled_median"] == pytest.approx(1.5 * np.log(2))
    assert found.loc["release", "groups"] == 4


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("12"), st.floats(0.1, 10), st.floats(0.1, 10)), min_size=1, max_size=12))
def test_one_factor_on_a_release_changes_no_ratio_and_the_anchored_error_less_than_the_cold(rows):
    plain, slow = table(*rows), table(*rows)
    slow["predicted_s"] = slow["predicted_s"] * np.where(slow["release"] == "1", 3.0, 1.0)
    slow["relative_error"] = slow["predicted_s"] / slow["measured_s"] - 1
    before, after = scored(plain), scored(slow)
    moved = (np.log(after["anchored_s"]) - np.log(before["anchored_s"])).dropna()
    assert (moved.abs() <= np.log(3.0) + 1e-6).all()
    np.testing.assert_allclose(pairs(before)["error"], pairs(after)["error"], atol=1e-9)


def test_the_floor_is_the_spread_of_repetitions():
    rows = scored(table(("a", "1", 1, 1), ("a", "2", 1.1, 1), ("a", "1", 5, 1)).assign(configuration=["x", "x", "y"]))
    assert floor(rows, ["configuration"]) == pytest.approx((np.log(1.1), np.log(1.1)))
    assert np.isnan(floor(rows, ["configuration", "release"])).all()


def test_rows_that_are_not_complete_stand_apart():
    rows = table(("a", "1", 1, 1), ("b", "1", 1, 2)).assign(complete=["yes", "partial"])
    found = regimes(scored(rows)).set_index(["regime", "complete", "arch"])
    assert found.loc[("cold", "yes", "dense"), "mean"] == 0
    assert found.loc[("cold", "partial", "dense"), "mean"] == 1
    assert found.loc[("cold", "yes", "moe"), "rows"] == 0


def test_releases_models_and_configurations_of_the_published_rows():
    rows = published_runs().set_index("id")
    releases = {
        "dgxc-v24.11.1-grok1-h100-bf16-8": "NVIDIA dgxc-benchmarking v24.11.1",
        "nemo-24.07-llama2-70b-pretrain-64-4096-128-3": "NVIDIA NeMo performance summary NeMo24.07",
        "sc21-t1-1.7b": "Narayanan et al. SC'21 Table 1 2021",
        "qwen30-gb200-gcp-926": "gpu-tpu-pedia GB200 Qwen3-30B NeMo 26.06",
        "mbridge-26.06.01-gptoss120b-gb300-fp8_mx-64": "Megatron-Bridge perf summary 26.06.01 (known regression)",
    }
    assert {name: release_of(rows.loc[name]) for name in releases} == releases
    assert family_of("Grok-1 314B PROXY (2 layers)") == "Grok-1 314B"
    assert family_of("DeepSeek-V3 truncated to 31 layers (3 dense + 28 MoE + MTP)") == "DeepSeek-V3"
    assert family_of("GPT-3 175B") == family_of("GPT 175B")
    first, other = rows.loc["qwen30-gb200-gcp-926"], rows.loc["qwen30-gb200-gcp-914"]
    assert configuration_of(first) == configuration_of(other)
    assert configuration_of(first, "notes") != configuration_of(other, "notes")


def test_processes_change_nothing():
    rows = published_runs().query("complete == 'yes'").iloc[::300]
    pd.testing.assert_frame_equal(validate(rows=rows), validate(rows=rows, processes=2))
