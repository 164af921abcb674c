"""The verbs that decide: what people read has units and adds up, and equals what the functions return."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pandas as pd
import pytest
import typer
import yaml
from command_line import data

import simulator as sim
from simulator.cli.planning import _money
from simulator.planning.advice import advise
from simulator.planning.compare import compare
from simulator.planning.layouts import WITH_PAIRS, judge
from simulator.planning.space import Space

QUESTION = {
    "model": "llama-3-8b",
    "cluster": "superpod-1024-h100",
    "job": {"tokens": 10**9, "global_batch": 64, "sequence_length": 4096},
    "plan": {"tp": 8, "pp": 8, "zero": 1, "recompute": "selective"},
}


def told(ran: SimpleNamespace) -> str:
    """Return what people read, without line breaks."""
    assert ran.code == 0, ran.err
    return " ".join(ran.out.split())


SIZES = ["--accelerators", 8, "--accelerators", 16]


def test_fewest_stops_at_the_size_that_is_in_time(myriad, file):
    both = pd.DataFrame(data(myriad("scale", file, *SIZES, "--json"))["rows"]).set_index("accelerators")
    between = both["training_days"].mean()
    rows = pd.DataFrame(data(myriad("fewest", file, "--days", between, *SIZES, "--json"))["rows"])
    assert rows["accelerators"].iloc[-1] > 8
    assert rows["training_days"].iloc[-1] <= between < rows["training_days"].iloc[0]
    said = told(myriad("fewest", file, "--days", between, *SIZES))
    assert f"finishes in {between:g} days" in said
    assert "days" in said
    assert "M$" in said
    assert "MWh" in said
    missed = myriad("fewest", file, "--days", 1e-6, *SIZES)
    assert missed.code == 2
    assert re.search(r"come nearest with .* days", " ".join(missed.err.split()))


def test_cheapest_keeps_to_its_limits(myriad, file):
    words = ["--cluster", "superpod-1024-h100", "--cluster", "h200-rail-1024", *SIZES]
    rows = pd.DataFrame(data(myriad("cheapest", file, *words, "--days", 30, "--json"))["rows"])
    assert len(rows) == 4
    assert rows["cost_usd"].is_monotonic_increasing
    assert (rows["training_days"] <= 30).all()
    for row in rows.itertuples():
        price = sim.clusters().set_index("cluster").loc[row.cluster, "price_usd_per_accelerator_hour"]
        assert row.cost_usd == pytest.approx(row.training_days * 24 * row.accelerators * price)
    limit = float(rows["cost_usd"].median())
    fewer = pd.DataFrame(data(myriad("cheapest", file, *words, "--budget", limit, "--json"))["rows"])
    assert (fewer["cost_usd"] <= limit).all()
    assert fewer["training_days"].is_monotonic_increasing  # money is the limit, so days decide
    said = told(myriad("cheapest", file, *words, "--days", 30))
    assert f"{rows['cost_usd'].iloc[0] / 1e6:.2f}" in said
    assert "cost M$" in said
    refused = myriad("cheapest", file, *words, "--budget", 1e-3)
    assert refused.code == 2
    assert "come nearest" in refused.err


@pytest.mark.parametrize(("text", "usd"), [("20M", 20e6), ("20e6", 20e6), ("1.5B", 1.5e9), ("$300k", 3e5), ("20 M$", 20e6), ("7", 7.0)])
def test_money_as_people_write_it(text, usd):
    assert _money(text) == usd


@pytest.mark.parametrize("text", ["20 millions", "M", "1.2.3M", "", "nan"])
def test_what_is_no_money_is_refused(text):
    with pytest.raises(typer.BadParameter, match="is not an amount of money; write 20e6"):
        _money(text)


def test_budget_buys_tokens_in_proportion(myriad, file):
    sets = ["--set", "cluster.base=superpod-1024-h100", "--set", "cluster.accelerators=16", "--set", "plan.pp=2"]
    one, two = (data(myriad("budget", file, "--usd", usd, *sets, "--json"))["rows"][0] for usd in (1e4, 2e4))
    assert two["tokens"] == pytest.approx(2 * one["tokens"])
    assert one["cost_usd"] == pytest.approx(1e4)
    assert one["tokens"] == pytest.approx(one["tokens_per_s"] * one["training_days"] * 86400)
    said = told(myriad("budget", file, "--usd", 1e4, *sets))
    assert "What 0.01 M$ train" in said
    assert "tokens T" in said


def test_scale_says_how_much_is_lost(myriad, file):
    sets = ["--set", "cluster.base=superpod-1024-h100", "--set", "cluster.accelerators=16", "--set", "plan.pp=2"]
    rows = pd.DataFrame(data(myriad("scale", file, "--kind", "weak", *SIZES, *sets, "--json"))["rows"])
    assert rows["global_batch"].iloc[1] == 2 * rows["global_batch"].iloc[0]
    assert rows["efficiency"].iloc[0] == 1.0
    said = told(myriad("scale", file, "--kind", "weak", *SIZES, *sets))
    assert "Weak scaling" in said
    assert f"{rows['efficiency'].iloc[1]:.1%}" in said


def test_advise_says_units_and_sources(myriad):
    found, expected = data(myriad("advise", "--flop", 1e24, "--activation", 0.05, "--json")), advise(1e24, 0.05)
    assert found["parameters"] == expected.parameters
    assert 6 * found["parameters"] * found["tokens"] == pytest.approx(1e24, rel=0.5)
    said = told(myriad("advise", "--flop", 1e24, "--activation", 0.05))
    assert f"{expected.tokens / 1e12:,.2f} T tokens" in said
    assert "B active of" in said
    assert "Sources: " in said
    assert "arXiv" in said


def test_compare_adds_up(myriad, file, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(QUESTION | {"plan": QUESTION["plan"] | {"pp": 4}}), encoding="utf-8")
    found = data(myriad("compare", file, other, "--json"))
    expected = compare({str(path): sim.Scenario.load(path) for path in (file, other)})
    steps = {row["name"]: row["step_time_s"] for row in found["rows"]}
    assert steps == {name: result.step_time_s for name, result in expected.results.items()}
    assert sum(row["seconds"] for row in found["differences"][str(other)]) == pytest.approx(steps[str(other)] - steps[str(file)])
    said = told(myriad("compare", file, other))
    assert "Beside each other" in said
    assert "takes longer than" in said
    assert f"{steps[str(file)]:.3f}" in said


def test_sweep_is_a_table_that_goes_on(myriad, file, tmp_path):
    words = ["sweep", file, "--over", "plan.tp=4,8", "--engine", "serial", "--level", "estimate", "--into", tmp_path / "answers.sqlite"]
    first = data(myriad(*words, "--json"))["rows"]
    assert [row["plan.tp"] for row in first] == [4, 8]
    assert data(myriad(*words, "--json"))["rows"] == first
    assert first[1]["step_time_s"] == sim.estimate(sim.Scenario.load(file))
    said = told(myriad(*words, "--table", tmp_path / "table.csv"))
    assert "2 scenarios" in said
    assert "step s" in said
    assert pd.read_csv(tmp_path / "table.csv")["step_time_s"].tolist() == pytest.approx([row["step_time_s"] for row in first])
    assert myriad("sweep", file, "--over", "plan.tp").code == 2


@pytest.mark.parametrize(
    ("to", "word", "changes"),
    [
        ("megatron", "--tensor-model-parallel-size 8", ["plan.recompute=full"]),
        ("torchtitan", "tensor_parallel_degree = 8", ["plan.recompute=full", "plan.zero=2", "plan.overlap.tp=torch"]),
    ],
)
def test_export_writes_the_plan(myriad, file, tmp_path, to, word, changes):
    wanted = [part for change in changes for part in ("--set", change)]
    printed = myriad("export", file, *wanted, "--to", to)
    assert printed.code == 0, printed.err
    assert word in printed.out
    assert myriad("export", file, *wanted, "--to", to, "--out", tmp_path / "launch").code == 0
    assert (tmp_path / "launch").read_text(encoding="utf-8") == printed.out


def test_export_to_deepspeed_names_what_it_cannot_say(myriad, file):
    refused = myriad("export", file, "--to", "deepspeed")
    assert refused.code == 2
    assert "DeepSpeed" in refused.err
    sets = ["plan.tp=1", "plan.pp=1", "job.global_batch=1024"]
    said = [word for one in sets for word in ("--set", one)]
    refused = myriad("export", file, "--to", "deepspeed", *said)
    assert refused.code == 2
    unsaid = {"recompute": "none", "sequence_parallel": "false", "precision.gradient_reduce": "bf16"}
    assert all(f"DeepSpeed cannot say {term}" in refused.err for term in unsaid)
    written = myriad("export", file, "--to", "deepspeed", *said, *(w for k, v in unsaid.items() for w in ("--set", f"plan.{k}={v}")))
    assert written.code == 0, written.err
    assert json.loads(written.out)["train_batch_size"] == 1024


def test_layouts_name_the_term_that_disagrees(myriad, file, tmp_path):
    row = data(myriad("layouts", file, "--no-record", "--json"))["rows"][0]
    verdict = judge(sim.Scenario.load(file))
    assert row["published_s"] == sim.simulate_step(sim.Scenario.load(file)).step_time_s
    assert row["best_s"] == verdict.best.step_time_s <= row["published_s"]
    assert row["excess"] == pytest.approx(row["published_s"] / row["best_s"] - 1)
    assert row["close"] == (row["excess"] <= 0.1)
    assert verdict.terms["seconds"].sum() == pytest.approx(row["published_s"] - row["best_s"])
    assert row["term_s"] == verdict.terms["seconds"].max()
    page = tmp_path / "planning.md"
    said = told(myriad("layouts", file, "--no-record", "--docs", page))
    text = page.read_text(encoding="utf-8")
    assert f"{row['excess']:.1%}" in said
    assert f"{row['excess']:.1%}" in text
    assert "myriad layouts" in text
    nothing = myriad("layouts", "--no-record")
    assert nothing.code == 2
    assert "no layout to judge" in nothing.err


def test_a_layout_with_a_table_is_held_against_what_its_trainer_can_run(file):
    s = sim.Scenario.load(file)
    rows = ["0F0 0F1+0B0 0F2+0B1 0F3+0B2 0B3"]
    table = s.with_plan(tp=8, pp=1, schedule="table", table="\n".join(rows)).model_copy(
        update={"job": s.job.model_copy(update={"global_batch": 4 * s.cluster.accelerators // 8})}
    )
    verdict = judge(table)
    assert verdict.best.scenario.plan.schedule in WITH_PAIRS or verdict.excess == 0
    assert verdict.legal > 1


def test_plan_keeps_to_what_is_allowed(myriad, file):
    words = [
        "plan",
        file,
        "--top",
        3,
        "--json",
        "--allow",
        "pp=4,8",
        "--allow",
        "schedule=1f1b",
        "--allow",
        "recompute=none,layernorm+mlp_act",
    ]
    found = data(myriad(*words))
    asked = Space(pp=(4, 8), schedule=("1f1b",), recompute=("none", "layernorm+mlp_act"))
    assert found["searched"]["legal"] == sim.search(sim.Scenario.load(file), top=3, space=asked).legal
    assert {plan["pp"] for plan in found["plans"]} <= {4, 8}
    assert {plan["schedule"] for plan in found["plans"]} == {"1f1b"}
    for wrong, said in (("pp", "write KEY=VALUE,VALUE"), ("pp=7", "leaves none"), ("speed=1", "speed"), ("schedule=1f2b", "1f1b")):
        refused = myriad("plan", file, "--allow", wrong)
        assert refused.code == 2
        assert said in " ".join(refused.err.split())
