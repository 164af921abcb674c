"""Predictions against measurements as pictures."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from simulator.errors import SimulatorError
from simulator.plots.style import frame, legend, new_axes

#: one per source, kept apart by all common kinds of colour blindness (Paul Tol's "muted")
_COLOURS = ("#332288", "#88CCEE", "#44AA99", "#117733", "#999933", "#DDCC77", "#CC6677", "#882255", "#AA4499")
_MARKERS = "os^Dv<>Ph"


def plot_measured(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw predicted over measured seconds, log-log, one mark per row and one colour per source, and return the Axes.

    Parameters
    ----------
    table : DataFrame
        With ``source``, ``measured_s`` and ``predicted_s``; rows without a prediction are left out.
    ax : Axes, optional

    Notes
    -----
    The line is where prediction equals measurement, the grey band 25 % to both sides.
    """
    known = table[table["predicted_s"].notna()]
    if known.empty:
        raise SimulatorError("no row of the table has a prediction; draw rows whose `skipped` is empty")
    ax = new_axes(ax, 6.5, 6.0)
    ends = [
        min(known["measured_s"].min(), known["predicted_s"].min()) / 1.5,
        max(known["measured_s"].max(), known["predicted_s"].max()) * 1.5,
    ]
    ax.fill_between(ends, [0.75 * e for e in ends], [1.25 * e for e in ends], color="#DDDDDD", linewidth=0, label="within 25 %")
    ax.plot(ends, ends, color="#333333", linewidth=1.0)
    for i, (source, part) in enumerate(known.groupby("source", sort=True)):
        ax.scatter(
            part["measured_s"], part["predicted_s"], s=26, alpha=0.8, linewidths=0,
            color=_COLOURS[i % len(_COLOURS)], marker=_MARKERS[i % len(_MARKERS)], label=source,
        )  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(ends)
    ax.set_ylim(ends)
    frame(ax, f"{len(known)} rows, median error {100 * known['relative_error'].abs().median():.1f} %", "measured (s)", "predicted (s)")
    legend(ax, ax.get_legend_handles_labels()[0], beside=True)
    return ax
