"""A user's file: every wrong cell is told with line, column and remedy, and the rest is scored."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from simulator.errors import ProfileError
from simulator.scenario.profiles import MODELS
from simulator.validation.collective_rows import published_collectives
from simulator.validation.collectives import validate_collectives
from simulator.validation.memory import published_memory
from simulator.validation.own_page import schema_page
from simulator.validation.published import published_runs, scenario_from_row
from simulator.validation.report import confront
from simulator.validation.schema import COLLECTIVES, PEAKS, RUNS
from simulator.validation.user_rows import read_user_rows

GOOD = {
    "id": "mine", "model": "my 8B", "arch": "dense", "layers": 32, "hidden": 4096, "ffn_hidden": 14336, "heads": 32, "kv_heads": 8,
    "head_dim": 128, "vocab": 128256, "seq_len": 8192, "gpu": "h100-sxm5-80", "gpus": 64, "tp": 2, "pp": 1, "cp": 1, "gbs": 128,
    "precision": "bf16", "step_time_s_derived": 3.1,
}  # fmt: skip
MOE = {"arch": "moe", "experts": 8, "topk": 2, "moe_ffn_hidden": 14336, "dense_layers": 0, "ep": 8}


@pytest.fixture
def write(tmp_path):
    def file(*rows: dict) -> Path:
        path = tmp_path / "runs.csv"
        pd.DataFrame(rows).to_csv(path, index=False)
        return path

    return file


def test_a_good_row_of_few_columns_is_scored(write):
    found = read_user_rows(write(GOOD, GOOD | MOE | {"id": "sparse", "model": "my MoE"}))
    assert found.problems == []
    report = confront({"data": found.rows})
    assert report.table["skipped"].tolist() == ["", ""]
    assert report.rows["release"].tolist() == ["runs", "runs"]
    assert (report.rows["low_s"] < report.rows["high_s"]).all()
    # two models of one release: each is anchored by the other
    assert report.rows["factor"].notna().all()
    assert "inter-node fabric not printed: vendor reference design" in report.rows["assumptions"][0]


@pytest.mark.parametrize(
    ("changes", "column", "what", "remedy"),
    [
        ({"tp": "eight"}, "tp", "'eight' is not a number", "write a whole number above 0"),
        ({"tp": "2.5"}, "tp", "'2.5' is not a whole number above 0", "write a whole number above 0"),
        ({"step_time_s_derived": "310 ms"}, "step_time_s_derived", "'310 ms' carries a unit", "write 0.31"),
        ({"seq_len": "8k"}, "seq_len", "'8k' carries a unit", "write 8000"),
        ({"step_time_s_derived": "nan"}, "step_time_s_derived", "'nan' is not a number above 0", "seconds per optimizer step"),
        ({"step_time_s_derived": "-3"}, "step_time_s_derived", "'-3' is not a number above 0", "write a number above 0"),
        ({"step_time_s_derived": ""}, "step_time_s_derived", "is blank", "write the measured seconds"),
        ({"gpu": "h10-sxm5-80"}, "gpu", "'h10-sxm5-80' has no profile", "did you mean h100-sxm5-80"),
        ({"arch": "sparse"}, "arch", "'sparse'", "write dense or moe"),
        ({"layers": ""}, "layers", "is blank", "write transformer layers"),
        ({"dp": 64}, "dp", "tp x pp x cp x dp = 128, gpus = 64", "write 32"),
        ({"tp": 3}, "gpus", "tp x pp x cp = 3 does not divide 64", "use a multiple of 3"),
        ({"gbs": 100}, "gbs", "100 is not a multiple of dp x mbs = 32", "use 96"),
        (MOE | {"ep": 48}, "ep", "ep x etp = 48 does not divide dp x cp x tp = 64", "use a divisor of 64"),
        (MOE | {"experts": ""}, "experts", "is blank", "write routed experts per layer"),
    ],
)
def test_a_wrong_cell_is_told_and_the_other_row_is_scored(write, changes, column, what, remedy):
    found = read_user_rows(write(GOOD | changes | {"id": "wrong"}, GOOD))
    assert found.rows["id"].tolist() == ["mine"]
    (problem,) = found.problems
    assert problem.rule == f"runs.csv, line 2 (wrong), column {column}"
    assert problem.numbers == what
    assert remedy in problem.remedy


def test_a_remedy_taken_is_a_good_row(write):
    for changes in ({"step_time_s_derived": "0.31"}, {"dp": 32}, {"gbs": 96}, MOE | {"ep": 64, "experts": 64}):
        assert read_user_rows(write(GOOD | changes)).problems == []


def test_a_missing_column_is_told_once(write):
    row = {k: v for k, v in GOOD.items() if k != "heads"}
    found = read_user_rows(write(row, row))
    assert [p.rule for p in found.problems] == ["runs.csv, column heads"]
    assert "query heads" in found.problems[0].remedy
    assert found.rows.empty


def test_an_unknown_heading_is_told_and_left_out(write):
    found = read_user_rows(write(GOOD | {"micro_batch": 1, "tps": 3}))
    assert [p.rule for p in found.problems] == ["runs.csv, heading micro_batch", "runs.csv, heading tps"]
    assert found.rows["id"].tolist() == ["mine"]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00rubbish", b'a,b\n"1,2\n'])
def test_what_is_no_table_is_refused(tmp_path, content):
    path = tmp_path / "runs.csv"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match="is not a table"):
        read_user_rows(path)


def test_a_row_that_converts_to_no_scenario_is_skipped_with_the_reason(write):
    found = read_user_rows(write(GOOD | {"pp": 2, "pp_schedule": "ZB-B"}, GOOD | {"id": "fine"}))
    table = confront({"data": found.rows}).table
    assert table["skipped"].tolist() == ["pipeline schedule not modelled: ZB-B", ""]


def test_memory_rows_are_scored_and_told(tmp_path):
    rows = published_memory().set_index("id", drop=False).loc[["mem-tt-8b-8-eager", "mem-tt-8b-128-eager"]].copy()
    rows.loc["mem-tt-8b-128-eager", "value_GiB"] = "67 GiB"
    rows.to_csv(tmp_path / "peaks.csv", index=False)
    found = read_user_rows(tmp_path / "peaks.csv", "memory")
    assert [(p.rule, p.remedy) for p in found.problems] == [
        ("peaks.csv, line 3 (mem-tt-8b-128-eager), column value_GiB",
         "write 67, if that is the peak on the fullest accelerator, 2^30 bytes; blank where the run failed")
    ]  # fmt: skip
    report = confront({"memory": found.rows})
    assert report.memory["id"].tolist() == ["mem-tt-8b-8-eager"]
    assert report.memory["measured_bytes"].tolist() == [82.4 * 2**30]
    assert report.rows.empty


def test_collectives_are_scored_and_told(tmp_path):
    rows = published_collectives().astype(str).iloc[[20, 25, 60]].copy()
    rows.iloc[1, rows.columns.get_loc("gpus")] = "eight"
    rows.to_csv(tmp_path / "nccl.csv", index=False)
    found = read_user_rows(tmp_path / "nccl.csv", "collectives")
    assert [p.rule for p in found.problems] == ["nccl.csv, line 3, column gpus"]
    table = confront({"collectives": found.rows}).collectives
    known = validate_collectives(held_out=False)
    assert table["predicted_s"].tolist() == pytest.approx(known["predicted_s"].iloc[[20, 60]].tolist())


@pytest.mark.parametrize(
    ("model", "blank", "taken"),
    [
        ("Llama-3 8B", "vocab", "vocab not printed: 128256"),
        ("meta-llama/Llama-3-8B", "vocab", "vocab not printed: 128256"),
        ("GPT 8B", "kv_heads", "key-value heads not printed: 32"),
        ("Llama-3 8B", "head_dim", "width of heads not printed: 128"),
    ],
)
def test_a_blank_that_the_name_tells_is_an_assumption(write, model, blank, taken):
    found = read_user_rows(write(GOOD | {"model": model, blank: ""}))
    assert found.problems == []
    assert taken in confront({"data": found.rows}).table["assumptions"][0]


@pytest.mark.parametrize(
    ("model", "blank"),
    [("my 8B", "vocab"), ("Llama-3 8B", "kv_heads"), ("my 8B", "head_dim"), ("Qwen3-8B", "head_dim"), ("DeepSeek-V2", "vocab")],
)
def test_a_blank_that_the_name_does_not_tell_is_a_problem(write, model, blank):
    (problem,) = read_user_rows(write(GOOD | {"model": model, blank: ""})).problems
    assert (problem.rule, problem.numbers) == (f"runs.csv, line 2 (mine), column {blank}", "is blank")


def test_gpt_oss_is_read_on_its_shipped_file_and_not_as_a_gpt(write):
    """openai/gpt-oss-20b, as its config.json says, with only the columns that tell it from 120B."""
    cells = MOE | {"layers": 24, "hidden": 2880, "heads": 64, "experts": 32, "topk": 4, "moe_ffn_hidden": 2880, "ffn_hidden": ""}
    blank = dict.fromkeys(("vocab", "kv_heads", "head_dim"), "")
    found = read_user_rows(write(GOOD | cells | blank | {"model": "gpt-oss-20b"}))
    assert found.problems == []
    scenario, said = scenario_from_row(found.rows.iloc[0])
    model, large = scenario.model, MODELS.load("gpt-oss-120b")
    assert (model.vocab, model.kv_heads, model.head_dim, model.layers, model.experts.count) == (201088, 8, 64, 24, 32)
    assert model.windows == large.windows[:24]
    same = ("gated", "layer_norm", "attention_bias", "mlp_bias", "tied_embeddings", "positions")
    assert [getattr(model, name) for name in same] == [getattr(large, name) for name in same]
    assert {f"{name} not printed: {value}, as in gpt-oss-120b" for name, value in zip(blank, (201088, 8, 64), strict=True)} <= set(said)
    assert "Megatron's GPT" not in "; ".join(said)


def test_published_rows_are_read_as_a_users(tmp_path):
    """All that are predicted as published, in a file of their own, also the one whose table prints more experts' ranks than there are."""
    runs = published_runs().drop(columns="file")
    runs = runs[runs["complete"].isin(["yes", "partial"]) & runs["source"].str.contains("Megatron-Bridge|Zero Bubble|JAX")]
    path = tmp_path / "published.csv"
    runs.to_csv(path, index=False)
    assert read_user_rows(path).problems == []


def test_the_schema_knows_every_published_column():
    assert set(published_runs().columns) - {"file"} == {c.name for c in RUNS} - {"release"}
    assert set(published_memory().columns) <= {c.name for c in PEAKS}
    assert set(published_collectives().columns) == {c.name for c in COLLECTIVES}


def test_the_page_on_the_schema_is_the_schema():
    page = Path(__file__).parents[1] / "docs" / "validation.md"
    assert page.read_text(encoding="utf-8") == schema_page()
