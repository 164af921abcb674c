"""Live activations, moment by moment, against the peak that the memory model counts from the schedule alone."""

from __future__ import annotations

import numpy as np
import pytest
from small import dense, scenario

from simulator.scenario.plan import Plan
from simulator.simulate import simulate_step

SCHEDULES = [
    ("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zb-h1", 1), ("zb-h2", 1), ("zb-v", 2), ("v-min", 2), ("dualpipe", 2), ("dualpipev", 2)
]  # fmt: skip


@pytest.mark.parametrize(("name", "vpp"), SCHEDULES)
def test_peak_is_the_one_of_the_schedule(name, vpp):
    result = simulate_step(scenario(dense(8), 4, Plan(pp=4, vpp=vpp, schedule=name), micro_batches=8))
    held = result.activations_over_time()
    peak = held.groupby("stage")["activations_bytes"].max().to_numpy()
    counted = result.memory()["activations_bytes"].to_numpy()
    # a pair's backward may give back before its forward takes; everything else is in the order of the table
    assert (peak <= counted * (1 + 1e-9)).all()
    if name not in ("dualpipe", "dualpipev"):
        assert peak == pytest.approx(counted, rel=1e-9)
    assert held.groupby("stage")["activations_bytes"].last().to_numpy() == pytest.approx(np.zeros(4), abs=1e-3)
    assert (held["activations_bytes"] >= -1e-3).all()


def test_zb_h2_holds_twice_what_1f1b_holds():
    one, two = (
        simulate_step(scenario(dense(8), 4, Plan(pp=4, schedule=name), micro_batches=12)).activations_over_time()
        for name in ("1f1b", "zb-h2")
    )
    first = [t[t["stage"] == 0]["activations_bytes"].max() for t in (one, two)]
    assert first[1] / first[0] == pytest.approx(7 / 4)  # 2 p - 1 micro-batches instead of p
