"""Published collectives: rows as the simulator reads them, and how far its predictions may be off, each source held out."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import pytest

from simulator.scenario.profiles import FABRICS, HOSTS
from simulator.validation.collective_rows import Measured, measured, priors, published_collectives
from simulator.validation.collectives import (
    ENOUGH_ROWS,
    NETWORK,
    SCALE_UP,
    fit_links,
    fitted_constants,
    predicted_s,
    summarise_collectives,
    validate_collectives,
)


@cache
def judged() -> pd.DataFrame:
    return validate_collectives()


def row(source: str, collective: str, gpus: int, note: str = "") -> Measured:
    table = published_collectives()
    found = table[(table.source == source) & (table.collective == collective) & (table.gpus == gpus)]
    found = found[found.notes.fillna("").str.contains(note, regex=False)]
    return measured(found.iloc[0])


def test_every_row_is_predicted_or_says_why_not():
    table = judged()
    assert len(table) == 349
    assert table.loc[table.predicted_s.isna(), "skipped"].str.len().gt(0).all()
    assert (table.skipped != "").sum() == 4
    assert (table.loc[table.skipped == "", "predicted_s"] > 0).all()


def test_deepep_counts_its_own_domain():
    """43 GB/s of 1.99 domains x 4,096 tokens of 7,168 FP8 with scales: 1.40 ms, of which the NIC carries half."""
    dispatch = row("DeepEP V1 normal kernels", "moe_dispatch", 16)
    size = 4096 * 7168 * (1 + 4 / 128)
    assert dispatch.size == size
    assert dispatch.seconds == pytest.approx(1.99 * size / 43e9, rel=0.01)
    assert dispatch.out == pytest.approx(0.996, abs=0.005)
    assert (dispatch.scale_up, dispatch.network) == ("NVLink4", "InfiniBand")


def test_low_latency_kernels_send_a_copy_per_expert():
    dispatch = row("DeepEP V1 low-latency", "moe_dispatch", 32)
    assert (dispatch.out, dispatch.fan) == (8 * 31 / 32, 0.0)
    assert dispatch.seconds == 155e-6


def test_bus_bandwidth_becomes_time():
    ring = row("stas00 ml-engineering", "all_reduce", 5, "8 GiB")
    assert ring.seconds == pytest.approx(2 * 4 / 5 * 8 * 2**30 / 414.2e9, rel=1e-12)


def test_a_held_out_source_changes_nothing_of_its_own_prediction():
    """Ten times slower rows of one source move the constants of the others' fits, not of its own."""
    rows = [m for _, r in published_collectives().iterrows() if isinstance(m := measured(r), Measured)]
    rows = [m for m in rows if m.network == "InfiniBand" or (m.scale_up == "NVLink5" and not m.network)]
    name = "CoreWeave nccl-tests"
    slow = [m if m.source != name else type(m)(**{k: getattr(m, k) for k in m.__slots__} | {"seconds": 10 * m.seconds}) for m in rows]
    assert fit_links(slow, None, name) == fit_links(rows, None, name)
    assert fit_links(slow)["InfiniBand"] != fit_links(rows)["InfiniBand"]


def test_one_set_of_constants_per_link_generation():
    constants = fitted_constants()
    assert set(constants) == {"NVLink2", "NVLink3", "NVLink4", "NVLink5", "xGMI", "EFA", "InfiniBand", "RoCE"}
    for values in constants.values():
        table = SCALE_UP if set(values) == set(SCALE_UP) else NETWORK
        assert all(table[key].least <= value <= table[key].most for key, value in values.items())


def test_profiles_hold_what_the_fit_gives():
    constants, known = fitted_constants(), priors()
    for name in HOSTS.names():
        if name in known.index:
            fit, host = constants[known.loc[name, "link"]], HOSTS.load(name)
            assert host.fill_s == pytest.approx(known.loc[name, "fill_s"] * fit["fill_factor"], rel=0.02)
            assert host.bus_bytes_per_s["all_gather"] == pytest.approx(known.loc[name, "all_gather"] * fit["ring_factor"], rel=0.02)
            assert host.base_latency_s.ll == pytest.approx(known.loc[name, "ll_s"] * fit["start_factor"], rel=0.02)
    for name in ("ib-ndr-rail", "roce-400g", "efa-3200"):
        fit, fabric = constants[known.loc[name, "link"]], FABRICS.load(name)
        assert fabric.efficiency == pytest.approx(known.loc[name, "efficiency"] * fit["efficiency_factor"], rel=0.02)
        assert fabric.fill_s == pytest.approx(known.loc[name, "fill_s"] * fit["fill_factor"], rel=0.02)


@pytest.mark.parametrize(("collective", "most"), [("all_reduce", 0.10), ("moe_dispatch", 0.15), ("moe_combine", 0.15)])
def test_median_error_over_sources(collective, most):
    summary = summarise_collectives(judged()).set_index(["collective", "source"])
    assert summary.loc[(collective, "macro average over sources"), "median_error"] <= most


def test_small_messages_are_within_a_factor_of_two():
    table = judged()
    small = table[(table["bytes"] < 2**20) & table.relative_error.notna()]
    within = small.relative_error.between(-0.5, 1.0)
    assert (~within).sum() <= 1  # 32 bytes in 68.14 us, between 16 bytes in 13 us and 64 bytes in 15 us


def test_small_groups_claim_no_percentile():
    summary = summarise_collectives(judged())
    groups = summary[summary.source != "macro average over sources"]
    assert groups.loc[groups.rows < ENOUGH_ROWS, ["median_error", "within_25"]].isna().all(axis=None)
    assert groups.loc[groups.rows >= ENOUGH_ROWS, ["median_error", "within_25"]].notna().all(axis=None)


def test_sweeps_are_priced_as_rows():
    rows = [m for _, r in published_collectives().iterrows() if isinstance(m := measured(r), Measured)][::7]
    constants = fitted_constants()
    together = predicted_s(rows, constants)
    assert together == pytest.approx(np.array([predicted_s([r], constants)[0] for r in rows]), rel=1e-12)
