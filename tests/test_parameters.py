"""The slopes of published rows against estimates with a parameter really moved, and what a cold table keeps."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from simulator.closed_forms import estimate
from simulator.pricing.operations import op_s
from simulator.scenario.kernels import Kernels
from simulator.validation.parameters import NAMES, cold, fitted, parameters_of, row_slopes, slopes
from simulator.validation.published import published_runs, scenario_from_row, validate
from simulator.validation.regimes import common_part, pairs, scored
from simulator.workload.ops import Op, host_wait
from simulator.workload.step import send_op

IDS = ("aa-131868", "vtrain-s-0000", "korth-22b-sel", "internevo-ck-8-8", "internevo-tp2-z4-8", "sc21-t2-zero-3-174.6-384")


@pytest.fixture(scope="module")
def runs():
    table = published_runs()
    return table[table["id"].isin(IDS)]


def moved(scenario, name: str, factor: float):
    accelerator, host = scenario.cluster.accelerator, scenario.cluster.host
    if name == "dispatch_s":
        host = host.model_copy(update={"dispatch_s": host.dispatch_s * factor})
    else:
        part = name.split(".")[1]
        speeds = accelerator.in_training | {part: accelerator.in_training.get(part, 1.0) * factor}
        accelerator = accelerator.model_copy(update={"in_training": speeds})
    return scenario.model_copy(update={"cluster": scenario.cluster.model_copy(update={"accelerator": accelerator, "host": host})})


def test_slopes_are_those_of_estimates_with_a_parameter_moved(runs):
    for row in runs.to_dict("records"):
        scenario = scenario_from_row(row)[0]
        found = slopes(scenario)
        rests_on = {p.name for p in parameters_of(scenario)}
        for name in NAMES:
            really = np.log(estimate(moved(scenario, name, np.exp(0.05))) / estimate(scenario)) / 0.05
            assert found[name] == pytest.approx(really if name in rests_on else 0.0, abs=1e-9)


def test_faster_parts_never_slow_a_step(runs):
    table = row_slopes(runs)
    assert (table[[n for n in NAMES if n != "dispatch_s"]] <= 1e-9).all(axis=None)
    assert (table["dispatch_s"] >= -1e-9).all()


def test_parameters_have_bounds_around_their_values(runs):
    for p in parameters_of(scenario_from_row(runs.iloc[0])[0]):
        assert p.lower <= p.start <= p.upper


def test_a_cold_table_changes_predictions_only(runs):
    table, found = validate(rows=runs), row_slopes(runs)
    cooled = cold(table, found)
    kept = [*table.columns, "anchor", "silicon"]
    assert list(cooled.columns) == [*kept, *(f"slope.{n}" for n in NAMES), *(f"moved.{n}" for n in NAMES)]
    assert cooled["id"].tolist() == table["id"].tolist()
    assert (cooled["predicted_s"] != table["predicted_s"]).any()
    assert cooled["relative_error"].to_numpy() == pytest.approx((cooled["predicted_s"] / table["measured_s"] - 1).to_numpy())
    for parameters, result in fitted(table, found).values():
        assert len(result.values) == len(parameters) <= 10


def test_both_rows_of_a_pair_are_predicted_by_parameters_that_neither_shaped():
    """Three models, one parameter: the absences of both rows of a pair move it for both, and add up to first order."""
    names = ["a", "b", "c"]
    rows = pd.DataFrame({"id": names, "family": names, "accelerator": "x", "release": "1"})
    table = rows.assign(skipped="", complete="yes", predicted_s=1.0, measured_s=[1.05, 1.02, 1.01], relative_error=0.0)
    table = table.assign(flop=1.0, peak_flop_per_s=1.0, precision="bf16", arch="moe", configuration="", options="")
    found = rows[["id"]].assign(silicon="Ampere", **dict.fromkeys(NAMES, 0.0), **{f"start.{name}": np.nan for name in NAMES})
    found["in_training.gemm"], found["start.in_training.gemm"] = [-1.0, -0.5, -0.2], 1.0
    cooled = cold(table, found)
    both = pairs(scored(cooled)).set_index(["i", "j"])["error"]
    for i, j in both.index:
        moved = cooled.loc[[i, j], "moved.in_training.gemm"].sum()
        slopes = found.loc[[i, j], "in_training.gemm"].to_numpy()
        residual = np.log(table.loc[[i, j], "predicted_s"] / table.loc[[i, j], "measured_s"]).to_numpy() + slopes * moved
        assert both[i, j] == pytest.approx(abs(residual[0] - residual[1]))


def test_a_row_is_anchored_on_other_models_by_its_own_parameters():
    """Two models, one parameter: without `a` the fit takes all of b's miss, so that b comes out right and `a` needs no factor."""
    rows = pd.DataFrame({"id": ["a", "b"], "family": ["a", "b"], "accelerator": "x", "release": "1", "silicon": "Ampere"})
    table = rows.drop(columns="silicon").assign(
        skipped="", complete="yes", predicted_s=[1.0, 1.0], measured_s=[2.0, 1.1], relative_error=0.0
    )
    found = rows[["id", "silicon"]].assign(**dict.fromkeys(NAMES, 0.0), **{f"start.{name}": np.nan for name in NAMES})
    found["in_training.gemm"], found["start.in_training.gemm"] = -1.0, 1.0
    cooled = cold(table, found).set_index("id")
    moved = np.log(cooled.loc["a", "predicted_s"])
    assert 0 < moved < np.log(1.1)
    assert cooled.loc["a", "anchor"] == pytest.approx(common_part(np.array([moved - np.log(1.1)])))
    assert scored(cooled.reset_index().assign(flop=1.0, peak_flop_per_s=1.0, precision="bf16"))["factor"][0] == pytest.approx(
        np.exp(-cooled.loc["a", "anchor"])
    )


def test_collectives_lose_speed_only_between_hosts_and_where_a_profile_says_so(runs):
    rows = runs.set_index("id", drop=False)
    a100 = scenario_from_row(rows.loc["korth-22b-sel"])[0]
    assert "in_training.scale_out" in {p.name for p in parameters_of(a100)}
    plan, cluster = a100.plan.model_copy(update={"pp": 2}), a100.cluster.model_copy(update={"accelerators": 16})
    kept = cluster.accelerator.in_training["scale_out"]
    whole = cluster.accelerator.model_copy(update={"in_training": cluster.accelerator.in_training | {"scale_out": 1.0}})
    ratios = []
    for axis in ("tp", "world"):
        gather = Op("gather", "all_gather", bytes=1e8, axis=axis)
        slow, fast = (op_s(gather, a100.model, plan, c) for c in (cluster, cluster.model_copy(update={"accelerator": whole})))
        ratios.append(float(slow / fast))
    assert ratios == pytest.approx([1.0, 1 / kept])
    bare = whole.model_copy(update={"in_training": {"gemm": 1.0}})
    bare = a100.model_copy(update={"cluster": cluster.model_copy(update={"accelerator": bare})})
    assert "in_training.scale_out" not in {p.name for p in parameters_of(bare)}


def test_one_host_of_vtrain_is_read_without_recompute_and_with_heads_cut_into_whole_parts():
    table = published_runs()
    own = table[table["source"] == "vTrain ground truth (single node)"]
    eight = scenario_from_row(own[own["tp"].astype(str).isin(("8", "8.0"))].iloc[0])[0]
    assert (eight.model.vocab, eight.plan.recompute) == (8 * 6282, "none")
    assert (eight.plan.framework.cross_entropy, eight.plan.kernels.accumulation, eight.plan.overlap.host_waits) == ("half", "none", True)
    assert eight.plan.framework.splits_messages is False
    several = table[(table["source"] == "vTrain ground truth (multi-node)") & (table["tp"].astype(str).isin(("1", "1.0")))]
    padded = scenario_from_row(several.iloc[0])[0]
    assert (padded.model.vocab, padded.plan.recompute) == (50304, "full")
    assert (padded.plan.kernels.accumulation, padded.plan.overlap.host_waits) == ("separate", False)


def test_one_host_of_vtrain_follows_the_formulas_of_its_source_and_not_a_clock():
    """Two and four replicas differ by 4.79 ms of all-reduce; the rows by what the source's formula makes of its table: -1.48 ms."""
    table = published_runs()
    rows = table[(table["source"] == "vTrain ground truth (single node)") & (table["tp"] == "1") & (table["pp"] == "1")]
    rows = rows[(rows["hidden"] == "2048") & (rows["layers"] == "24") & (rows["mbs"] == "2")].astype(
        {"gbs": int, "dp": int, "value": float}
    )
    by_turns = {(r.dp, r.gbs // (2 * r.dp)): r.value for r in rows.itertuples()}
    parameters = 24 * (12 * 2048**2 + 13 * 2048) + 2 * 50257 * 2048 + 1024 * 2048
    mebibytes = round(2 * parameters / 2**20)
    expected = mebibytes / 1024 * (1 / 197.28 - 1 / 221.86)
    for turns in (2, 4, 8):
        assert by_turns[2, turns] - by_turns[4, turns] == pytest.approx(expected, abs=2e-6)


def test_one_host_of_vtrain_sends_at_the_rate_of_its_source():
    """Of two micro-batches, two stages show three messages and four stages seven; lines over the layers leave four of them: 2.5 ms each."""
    table = published_runs()
    rows = table[table["source"] == "vTrain ground truth (single node)"].astype({"gbs": int, "pp": int, "layers": int, "value": float})
    rows = rows[(rows["tp"] == "1") & (rows["dp"] == "1") & (rows["hidden"] == "2048") & (rows["mbs"] == "8") & (rows["gbs"] == 16)]
    seconds = {(r.pp, r.layers): r.value for r in rows.itertuples()}
    without_layers = {pp: seconds[pp, 12] - 3 * (seconds[pp, 16] - seconds[pp, 12]) for pp in (2, 4)}
    shown = (without_layers[4] - without_layers[2]) / 4
    scenario = scenario_from_row(rows.iloc[0])[0]
    message = send_op(scenario.plan, scenario.model, scenario.job)
    assert float(op_s(message, scenario.model, scenario.plan, scenario.cluster)) == pytest.approx(shown, rel=0.01)


def test_the_engine_launches_gradients_at_half_the_cost_of_functions_in_python():
    forward, gradient = (Op("mlp.up", "gemm", flop=1.0, bytes=1.0, grad=grad, launches=4.0) for grad in ("", "weight"))
    segments = ((forward,), (gradient,))
    assert [host_wait(segments, Kernels(backward=kind)).launches for kind in ("functions", "engine")] == [8.0, 6.0]
