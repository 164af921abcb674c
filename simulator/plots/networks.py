"""Networks as pictures: the step on several fabrics, what they cost, and what sharing leaves of a NIC."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from simulator.plots.style import COLOURS, OTHER, frame, legend, new_axes


def plot_fabrics(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the step time of each fabric, with the communication that compute waits for in another colour, and return the Axes.

    Parameters
    ----------
    table : DataFrame
        From `simulator.fabrics`.
    ax : Axes, optional
    """
    ax = new_axes(ax, 9.0, 1.2 + 0.38 * len(table))
    place = range(len(table))
    rest = table["step_time_s"] - table["exposed_s"]
    ax.barh(place, rest, color=COLOURS["plan"], label="compute and waiting for other stages")
    ax.barh(place, table["exposed_s"], left=rest, color=COLOURS["exposed communication"], label="exposed communication")
    for y, step, hottest, share in zip(place, table["step_time_s"], table["hottest"], table["nic_share"], strict=True):
        note = f" {step:.2f} s" + (f", {hottest} leaves {share:.0%}" if share < 0.995 else "")
        ax.text(step, y, note, va="center", fontsize=8)
    ax.set_yticks(list(place), table["fabric"])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.3 * table["step_time_s"].max())
    frame(ax, "One step on each fabric", "seconds")
    legend(ax, list(ax.containers), beside=False)
    return ax


def plot_fabric_costs(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the step time over the price of each network, dots as large as its power, and return the Axes.

    Parameters
    ----------
    table : DataFrame
        From `simulator.fabrics`; rows without a price are left out.
    ax : Axes, optional
    """
    ax = new_axes(ax, 8.0, 5.0)
    priced = table.dropna(subset=["network_usd", "network_w"])
    ax.scatter(priced["network_usd"] / 1e6, priced["step_time_s"], s=priced["network_w"] / 1e4, color=COLOURS["plan"], alpha=0.6)
    priced = priced.sort_values("step_time_s", kind="stable")
    for i, (name, usd, step) in enumerate(zip(priced["fabric"], priced["network_usd"], priced["step_time_s"], strict=True)):
        height = (i + 0.5) / len(priced)  # names in a column, in the order of the dots, so that none covers another
        line = {"arrowstyle": "-", "color": OTHER, "linewidth": 0.7, "relpos": (0, 0.5)}
        where = {"xytext": (1.04, height), "textcoords": "axes fraction", "va": "center", "annotation_clip": False}
        ax.annotate(name, (usd / 1e6, step), fontsize=8, arrowprops=line, **where)
    ax.margins(0.2)
    frame(ax, "What a network costs, and what the step makes of it (area: watts)", "network (million $)", "step time (s)")
    return ax


def plot_shares(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the share of its NIC that the slowest collective keeps on each fabric, and return the Axes.

    Parameters
    ----------
    table : DataFrame
        Columns ``fabric`` and ``nic_share``, as `simulator.fabrics` returns them.
    ax : Axes, optional
    """
    ax = new_axes(ax, 8.0, 1.2 + 0.38 * len(table))
    place = range(len(table))
    bars = ax.barh(place, table["nic_share"], color=[COLOURS["plan"] if s > 0.995 else OTHER for s in table["nic_share"]])
    ax.bar_label(bars, [f"{s:.0%}" for s in table["nic_share"]], padding=3, fontsize=8)
    ax.set_yticks(list(place), table["fabric"])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.15)
    frame(ax, "What sharing leaves of a NIC", "share of the line rate")
    return ax
