"""Oracle: bills added up by hand from published counts; the table against single simulations."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from simulator.cli import app
from simulator.errors import ProfileError
from simulator.network.bill import bill_of_materials
from simulator.network.build import topology
from simulator.planning.fabrics import candidates, fabrics, kind_of_link
from simulator.scenario.profiles import CLUSTERS, FABRICS, PARTS
from simulator.scenario.scenario import Scenario
from simulator.simulate import simulate_step
from tests.test_topology import of

SCENARIO = Scenario(
    model="qwen3-30b-a3b",
    cluster="superpod-1024-h100",
    plan={"ep": 32, "dispatcher": "deepep", "recompute": "full"},
    job={"tokens": 1e12, "global_batch": 1024, "sequence_length": 4096},
)


def test_bill_of_a_superpod_of_four_units():
    cluster = of("ib-ndr-rail", 1024)
    bill = bill_of_materials(topology(cluster), cluster).set_index("item")
    assert bill["count"].to_dict() == {"leaf switches": 32, "spine switches": 16, "host cables": 1024, "leaf cables": 1024}
    assert bill["ports"].to_dict() == {"leaf switches": 2048, "spine switches": 1024, "host cables": 2048, "leaf cables": 2048}
    assert bill.loc["leaf switches", "price_usd"] == 32 * 38000
    assert bill.loc["host cables", "price_usd"] == 1024 * 2 * 650
    assert bill["power_w"].sum() == 48 * 747 + 2048 * 2 * 8
    assert set(bill["grade"]) == {"assumed"}
    assert set(bill["date"]) == {"2026"}


def test_a_part_without_a_figure_is_said_not_zero():
    cluster = CLUSTERS.load("a100-superpod-1120")
    bill = bill_of_materials(topology(cluster), cluster).set_index("item")
    assert PARTS.load("qm8790").price_usd is None
    assert bill.loc["leaf switches"].isna()["price_usd"]


def test_table_holds_what_single_simulations_say():
    table = fabrics(SCENARIO, ["ib-ndr-rail", "ib-ndr-clos-2to1"]).set_index("fabric")
    for name, row in table.iterrows():
        cluster = SCENARIO.cluster.model_copy(update={"fabric": FABRICS.load(name)})
        alone = simulate_step(SCENARIO.model_copy(update={"cluster": cluster}), contention=True)
        assert row["step_time_s"] == alone.step_time_s
        assert row["switches"] == topology(cluster).switches
        assert row["nic_share"] == alone.network()["nic_share"].min()
    assert table.loc["ib-ndr-clos-2to1", "bisection_share"] == pytest.approx(0.5)
    assert table.loc["ib-ndr-clos-2to1", "hottest"] == "leaf up"
    assert table.loc["ib-ndr-clos-2to1", "network_usd"] < table.loc["ib-ndr-rail", "network_usd"]


def test_the_host_that_launches_a_pair_is_no_communication():
    plan = {"ep": 32, "dispatcher": "deepep", "schedule": "table", "table": "0F0 0F1+0B0 0B1\n", "recompute": "full"}
    job = SCENARIO.job.model_copy(update={"global_batch": 2048})
    pair = Scenario(model=SCENARIO.model, cluster=SCENARIO.cluster, plan=plan, job=job)
    (row,) = fabrics(pair, ["ib-ndr-rail"]).to_dict("records")
    cluster = pair.cluster.model_copy(update={"fabric": FABRICS.load("ib-ndr-rail")})
    spent = simulate_step(pair.model_copy(update={"cluster": cluster}), contention=True).timeline.exposed()
    assert spent["host_s"].min() > 0
    talks = spent[[f"{stream}_exposed_s" for stream in ("tp", "cp", "ep", "pp", "dp")]].sum(axis=1)
    assert row["exposed_s"] == pytest.approx((talks * spent["ranks"]).sum() / spent["ranks"].sum())


def test_candidates_have_the_right_ports_and_the_reach():
    found = candidates(CLUSTERS.load("h100-rail-10240"))
    assert {"ib-ndr-rail", "ib-ndr-rail-only", "ib-ndr-clos", "ib-ndr-clos-2to1", "ib-ndr-rail-deepseek", "alibaba-hpn7"} <= set(found)
    assert not {"ib-hdr-rail", "ib-xdr-rail", "single-switch-ndr"} & set(found)


def test_a_fabric_too_small_is_refused_with_its_reach():
    with pytest.raises(ProfileError, match="single-switch-ndr reaches 64 of 1,024 accelerators"):
        fabrics(SCENARIO, ["single-switch-ndr"])
    with pytest.raises(ProfileError, match="unknown fabric 'ib-ndr-rale'; did you mean ib-ndr-rail"):
        fabrics(SCENARIO, ["ib-ndr-rale"])


def test_kinds_of_links():
    assert [kind_of_link(n) for n in ("leaf 4 -> spine 17", "leaf up 3", "NIC out 9")] == ["leaf -> spine", "leaf up", "NIC out"]


def test_the_verb_prints_the_table(tmp_path):
    SCENARIO.save(tmp_path / "s.yaml")
    run = CliRunner().invoke(app, ["fabrics", str(tmp_path / "s.yaml"), "--fabric", "ib-ndr-rail", "--json", "--out", str(tmp_path)])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["fabrics"][0]["switches"] == 48
    assert (tmp_path / "fabrics.csv").read_text().startswith("fabric,family")
