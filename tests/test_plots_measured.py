"""Measured against predicted: every row with a prediction is drawn where it belongs."""

from __future__ import annotations

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")
from matplotlib.figure import Figure

from simulator import plots
from simulator.errors import SimulatorError

TABLE = pd.DataFrame(
    {
        "source": ["a", "b", "a", "b"],
        "measured_s": [1e-5, 1e-3, 2e-2, 1.0],
        "predicted_s": [2e-5, 1e-3, 1e-2, np.nan],
        "relative_error": [1.0, 0.0, -0.5, np.nan],
    }
)


def test_rows_lie_at_their_times():
    ax = plots.plot_measured(TABLE, Figure().add_subplot())
    points = {tuple(p) for mark in ax.collections[1:] for p in mark.get_offsets().tolist()}
    assert points == {(1e-5, 2e-5), (1e-3, 1e-3), (2e-2, 1e-2)}
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.get_xlim() == ax.get_ylim() == pytest.approx((1e-5 / 1.5, 2e-2 * 1.5))
    assert ax.get_title(loc="left") == "3 rows, median error 50.0 %"
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["within 25 %", "a", "b"]


def test_nothing_to_draw():
    with pytest.raises(SimulatorError, match="no row of the table has a prediction"):
        plots.plot_measured(TABLE.iloc[3:])
