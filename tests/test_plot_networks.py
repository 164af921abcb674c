"""Pictures of networks hold what the tables hold: bars, their lengths, dots and words."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from simulator import plots

mpl.use("Agg")

TABLE = pd.DataFrame(
    {
        "fabric": ["rail", "thin", "unpriced"],
        "step_time_s": [5.0, 6.0, 7.0],
        "exposed_s": [1.0, 2.0, 3.0],
        "hottest": ["NIC out", "leaf up", "group up"],
        "nic_share": [1.0, 0.5, 0.25],
        "network_usd": [80e6, 50e6, np.nan],
        "network_w": [1.2e6, 0.8e6, np.nan],
    }
)


def axes():
    return Figure().subplots()


def test_steps_are_divided_into_exposed_and_rest():
    ax = plots.plot_fabrics(TABLE, ax=axes())
    rest, exposed = ([bar.get_width() for bar in bars] for bars in ax.containers)
    assert rest == [4.0, 4.0, 4.0]
    assert exposed == [1.0, 2.0, 3.0]
    words = [text.get_text() for text in ax.texts]
    assert "leaf up" not in words[0]
    assert "leaf up leaves 50%" in words[1]


def test_costs_leave_out_what_has_no_price():
    ax = plots.plot_fabric_costs(TABLE, ax=axes())
    assert ax.collections[0].get_offsets().tolist() == [[80.0, 5.0], [50.0, 6.0]]
    assert [text.get_text() for text in ax.texts] == ["rail", "thin"]


def test_shares_are_as_long_as_they_are():
    ax = plots.plot_shares(TABLE, ax=axes())
    assert [bar.get_width() for bar in ax.containers[0]] == pytest.approx([1.0, 0.5, 0.25])
    assert [text.get_text() for text in ax.texts] == ["100%", "50%", "25%"]
