"""Oracle: published peaks of device memory and published failures; the four mistakes that memory estimators are known for."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from simulator.scenario.plan import RESERVE_SOURCES, Reserve
from simulator.validation.memory import GIB, memory_summary, published_memory, timed_runs, validate_memory
from simulator.validation.row_memory import metric_of


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Every memory row, the timed runs of the sweep that also printed its failures, and some of the other runs."""
    timed = timed_runs()
    swept = timed["source"].str.startswith("Aleph-Alpha")
    few = timed[~swept & ~timed["source"].str.contains("single node")].iloc[::4]
    return validate_memory(pd.concat([published_memory(), timed[swept], few], ignore_index=True).fillna(""))


@pytest.fixture(scope="module")
def summary(table) -> pd.DataFrame:
    return memory_summary(table).set_index("source")


def test_every_row_has_a_source_and_a_provenance():
    rows = published_memory()
    assert len(rows) == rows["id"].nunique() == 736
    assert (rows["source"].str.len() > 0).all()
    assert rows["provenance"].str.startswith("read:").all()
    assert set(rows["outcome"]) == {"fits", "OOM"}


@pytest.mark.parametrize(
    ("source", "median", "worst"),
    [
        ("SimuMax B200 measured", 0.01, 0.04),
        ("Zero Bubble PP Table 4/5", 0.03, 0.10),
        ("Korthikanti et al. 2022 Fig. 1", 0.02, 0.03),
        ("BigScience BLOOM sweep", 0.05, 0.25),
    ],
)
def test_peaks(summary, source, median, worst):
    found = summary.loc[source]
    assert found["median_absolute_error"] <= median
    assert abs(found["worst"]) <= worst


def test_simumax_memory_within_three_percent_on_average(table):
    """Allocated and reserved, dense and DeepSeek-V2, tensor, pipeline, expert and context parallel."""
    rows = table[table["source"] == "SimuMax B200 measured"]
    assert len(rows) == 62
    assert rows["relative_error"].abs().mean() <= 0.03
    assert rows.loc[rows["metric"] == "allocated", "relative_error"].abs().max() <= 0.01


def test_fragmentation_is_what_published_runs_lose():
    """Peaks of one run as the allocator's own and as reserved: the share of the reserved ones that no tensor holds."""
    rows = published_memory().set_index("id")
    twice = [name for name in rows.index if f"{name}-resv" in rows.index]
    allocated, reserved = (rows.loc[names, "value_GiB"].astype(float).to_numpy() for names in (twice, [f"{n}-resv" for n in twice]))
    lost = 1 - allocated / reserved
    assert len(lost) == 31
    assert Reserve().fragmentation == pytest.approx(lost.mean(), abs=0.01)
    assert lost.min() > 0.02
    assert lost.max() < 0.09


def test_reserve_has_sources():
    assert set(RESERVE_SOURCES) == set(Reserve.model_fields)


def test_fits_and_fails(summary):
    everything = summary.loc["all rows"]
    assert everything["median_absolute_error"] <= 0.05
    assert everything["fails"] == 539
    assert everything["balanced_accuracy"] >= 0.90
    assert everything["balanced_accuracy_outside"] >= 0.97


def test_a_row_is_read_with_what_its_run_prints(table):
    row = table.set_index("id").loc["mem-simumax-deepseekv2_tp1_ep8_pp1_dp8_l4_mbc4_cef"]
    assert row["measured_bytes"] == 45.63 * GIB
    assert (row["metric"], row["fits_measured"], row["fits_predicted"]) == ("allocated", True, True)
    assert "cross-entropy of Transformer Engine" in row["assumptions"]


def test_calculations_say_nothing_about_a_device(table):
    rows = table[table["source"] == "Korthikanti et al. 2022 Fig. 1"]
    assert rows["fits_measured"].isna().all()
    assert (rows["measured_bytes"] > rows["capacity_bytes"]).any()


@pytest.mark.parametrize(
    ("words", "metric"),
    [
        ("nvidia-smi used", "device"),
        ("peak reserved (torchtitan log, max over GPUs)", "reserved"),
        ("peak torch.cuda max_memory_allocated over ranks", "allocated"),
        ("activations per GPU (first stage), tensor parallel only", "activations"),
        ("parameters+optimizer per GPU", "states"),
        ("HBM used", "device"),
        ("max HBM allocated", "allocated"),
        ("max memory allocated on the device", "allocated"),
        ("HBM reserved", "reserved"),
        ("activation memory used", "activations"),
        ("optimizer states, HBM", "optimizer"),
        ("peak memory used", "device"),
        ("max_memory_used", "device"),
        ("nvidia-smi, with what is reserved", "device"),
        ("Max memory", "allocated"),
    ],
)
def test_metrics(words, metric):
    assert metric_of(words) == metric


def user_row(**changes) -> pd.DataFrame:
    row = {
        "id": "mine", "source": "my cluster", "model": "Llama-3 8B", "arch": "dense", "layers": "32", "hidden": "4096", "heads": "32",
        "kv_heads": "8", "ffn_hidden": "14336", "seq_len": "8192", "gpu": "H100-SXM-80GB", "gpus": "8", "tp": "4", "pp": "1",
        "dp": "2", "zero_stage": "1", "mbs": "1", "gbs": "16", "precision": "bf16", "recompute": "none", "metric": "peak allocated",
        "value_GiB": "40", "outcome": "fits",
    }  # fmt: skip
    return pd.DataFrame([row | changes])


def test_a_users_row_needs_few_columns():
    (row,) = validate_memory(user_row()).to_dict("records")
    assert row["skipped"] == ""
    assert np.isfinite(row["relative_error"])


def test_another_spelling_of_a_model_is_told_as_for_step_times():
    usual, other = validate_memory(pd.concat([user_row(), user_row(model="meta-llama/Llama-3-8B")])).to_dict("records")
    assert other["predicted_bytes"] == usual["predicted_bytes"]
    assert other["assumptions"] == f"model printed as meta-llama/Llama-3-8B: Llama-3 8B; {usual['assumptions']}"


@pytest.mark.parametrize(
    ("blank", "reason"),
    [("kv_heads", "not printed: kv_heads"), ("head_dim", "not printed: head_dim"), ("ffn_hidden", "not printed: ffn_hidden")],
)
def test_dimensions_that_a_name_does_not_tell_are_not_guessed(blank, reason):
    cells = {"model": "Qwen3-32B", "layers": "64", "hidden": "5120", "heads": "64", "head_dim": "128", "ffn_hidden": "25600"}
    whole, less = validate_memory(pd.concat([user_row(**cells), user_row(**cells | {blank: ""})])).to_dict("records")
    assert (whole["skipped"], less["skipped"]) == ("", reason)


def test_a_shipped_models_own_dimensions_go_before_guesses():
    """Rows of DeepSeek-V3 in another's words: three dense layers and latent attention, not "every layer is MoE"."""
    cells = {
        "model": "DeepSeek V3 671B", "arch": "moe", "layers": "61", "hidden": "7168", "heads": "128", "kv_heads": "", "ffn_hidden": "",
        "experts": "256", "topk": "8", "moe_ffn_hidden": "2048", "gpus": "512", "tp": "1", "pp": "16", "dp": "32", "ep": "32", "gbs": "512",
    }  # fmt: skip
    (line,) = validate_memory(user_row(**cells)).to_dict("records")
    assert line["skipped"] == ""
    assert "every layer is MoE" not in line["assumptions"]
    assert "vocab not printed: 129280, as in deepseek-v3" in line["assumptions"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"value_GiB": "forty"}, "value_GiB = 'forty' is not a number"),
        ({"value_GiB": "-1"}, "value_GiB = -1 is not positive"),
        ({"metric": "goodput"}, "metric not known: goodput"),
        ({"gpus": "eight"}, "gpus is not a whole number"),
        ({"gpu": "abacus"}, "no accelerator profile: abacus"),
    ],
)
def test_a_bad_row_is_skipped_with_its_reason(change, reason):
    rows = pd.concat([user_row(**change), user_row(id="good")], ignore_index=True)
    bad, good = validate_memory(rows).to_dict("records")
    assert bad["skipped"] == reason
    assert good["skipped"] == ""


def test_summary_of_nothing():
    assert memory_summary(validate_memory(user_row(value_GiB="", outcome=""))).set_index("source").loc["all rows", "peaks"] == 0


def test_torchtitan_compiles_its_loss_since_2025(table):
    """The log-softmax of 2024 is three fp32 tensors; two 16-bit ones are left when the loss is compiled with the model."""
    rows = table.set_index("id").loc[["mem-tt-8b-h200-32", "mem-tt-8b-128-compile", "mem-tt-8b-128-eager", "mem-tt-8b-8-f8"]]
    assert rows["relative_error"].abs().max() <= 0.03
    assert "loss compiled with the model" in rows.loc["mem-tt-8b-h200-32", "assumptions"]
    assert "loss compiled" not in rows.loc["mem-tt-8b-128-compile", "assumptions"]
