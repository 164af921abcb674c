"""Choosing, scaling and the peers' rows, exactly on small tables, and their rows among the published ones."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from simulator.validation.choosing import choosing, sweeps
from simulator.validation.keys import layout_of, sweep_of
from simulator.validation.peers import PEERS, peers, plausible
from simulator.validation.published import published_runs
from simulator.validation.scaling import slopes


def sweep(name: str, measured: list[float], predicted: list[float]) -> pd.DataFrame:
    layout = [f"tp{i}" for i in range(len(measured))]
    return pd.DataFrame({"sweep": name, "layout": layout, "measured_s": measured, "predicted_s": predicted})


def test_ranks_and_regret():
    right = sweep("right", [1.0, 2, 3, 4, 5, 6, 7, 8], [10.0, 20, 30, 40, 50, 60, 70, 80])
    wrong = sweep("wrong", [2.0, 1, 3, 4, 5, 6, 7, 8], [1.0, 2, 3, 4, 5, 6, 7, 8])  # chooses 2.0, the best is 1.0
    small = sweep("small", [1.0, 2, 3], [3.0, 2, 1])  # too few layouts to be a sweep
    table = sweeps(pd.concat([right, wrong, small])).set_index("sweep")
    assert table.index.tolist() == ["right", "wrong"]
    assert table["spearman"].tolist() == [1.0, pytest.approx(1 - 6 * 2 / (8 * 63))]
    np.testing.assert_allclose(table["regret"], [0.0, 1.0], atol=1e-12)
    total = choosing(pd.concat([right, wrong, small]))
    assert (total["sweeps"], total["layouts"]) == (2, 16)
    assert total["regret_worst"] == pytest.approx(1.0)
    assert total["regret_median"] == pytest.approx(0.5)


def test_repeated_layouts_count_once():
    rows = pd.concat([sweep("s", [1.0, 2, 3, 4, 5, 6, 7, 8], [1.0, 2, 3, 4, 5, 6, 7, 8])] * 3)
    assert sweeps(rows)["layouts"].tolist() == [8]


def test_pooling_correlates_layouts_not_sizes():
    up = sweep("a", [1.0, 2, 3, 4, 5, 6, 7, 8], [8.0, 7, 6, 5, 4, 3, 2, 1])
    big = sweep("b", (1000 * up["measured_s"]).tolist(), (1000 * up["predicted_s"]).tolist())
    assert choosing(pd.concat([up, big]))["spearman_pooled"] == pytest.approx(-1.0)


def test_slope_per_doubling():
    gpus = np.array([256, 512, 1024])
    rows = pd.DataFrame({"id": [f"megascale-megatron-lm-768-{n}" for n in gpus], "accelerators": gpus, "source": "MegaScale"})
    rows = rows.assign(residual=0.03 * np.log2(gpus), release="", model="", precision="", accelerator="", layout="")
    (line,) = slopes(rows).to_dict("records")
    assert (line["rows"], line["from"], line["to"]) == (3, 256, 1024)
    assert line["slope"] == pytest.approx(0.03)
    assert line["standard_error"] == pytest.approx(0.0, abs=1e-9)


def test_dgxc_series_differ_in_replicas_and_batch_only():
    same = {"source": "NVIDIA dgxc-benchmarking", "release": "r", "model": "m", "precision": "fp8", "accelerator": "h100"}
    rows = pd.DataFrame([same | {"id": str(n), "accelerators": n, "layout": f"tp2 dp{n // 2} mbs1", "residual": 0.0} for n in (8, 16, 32)])
    other = pd.DataFrame([same | {"id": "x", "accelerators": 64, "layout": "tp4 dp16 mbs1", "residual": 9.0}])
    table = slopes(pd.concat([rows, other]))
    assert table["rows"].tolist() == [3, 3]
    assert table["series"].iloc[-1].startswith("dgxc, 1 series pooled")


def test_simumax_own_errors_follow_from_its_rows():
    runs = published_runs()
    for pattern, mean, worst in (("^simumax-llama", 0.052, -0.114), ("^simumax-(?!llama)", 0.100, -0.135)):
        some = runs[runs["id"].str.contains(pattern)]
        error = some["other_metrics"].str.extract(r"simumax_pred_s=([\d.]+)")[0].astype(float) / some["value"].astype(float) - 1
        assert error.abs().mean() == pytest.approx(mean, abs=5e-4)
        assert error[error.abs().idxmax()] == pytest.approx(worst, abs=5e-4)


def test_peers_rows_are_there_and_score_by_row():
    runs = published_runs()
    counts = [runs["id"].str.contains(peer.pattern).sum() for peer in PEERS]
    assert counts == [8, 25, 6, 69, 878, 3, 2]
    ids = runs.loc[runs["id"].str.contains(PEERS[0].pattern), "id"]
    rows = pd.DataFrame({"id": ids, "other_metrics": "", "anchored_error": [0.01] * 6 + [np.nan, -0.08], "relative_error": 0.0})
    line = peers(rows).iloc[0]
    assert (line["count"], line["scored"]) == (8, 7)
    assert line["mean"] == pytest.approx(0.14 / 7)
    assert line["worst"] == -0.08


def test_sweeps_of_the_published_rows_keep_kernels_apart():
    runs = published_runs().set_index("id")
    some = runs[runs["source"].str.startswith("Aleph-Alpha")]
    kernels = {sweep_of(r).rsplit("|", 1)[1] for r in some.to_dict("records")}
    assert kernels == {"flash_attention2", "flash_attention2 + RMS kernel", "flash_attentionv1.0.8", "fused", "torch"}
    assert layout_of(runs.loc["korth-22b-full"]).startswith("tp8 pp1")


def test_what_sources_leave_out_is_tried_value_by_value():
    tried: list[tuple] = []

    def predict(scenario) -> float:
        tried.append((scenario.model.name, scenario.plan.vpp, scenario.plan.micro_batch, scenario.job.routing))
        return 20.0

    table = plausible(published_runs(), predict)
    assert len(table) == len(tried) == 3 + 2 * 2
    assert {t[1:] for t in tried if t[0] == "Llama-3.1 405B"} == {(8, 1, "balanced")}
    assert {t[2:] for t in tried if t[0] == "DeepSeek-V3"} == {(1, "balanced"), (1, "natural")}
    assert table["relative_error"].notna().all()
