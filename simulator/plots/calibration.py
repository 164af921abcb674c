"""Pictures of a calibration: predicted against measured, the roofline of a machine, its collectives, how well costs are known."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from simulator.plots.style import COLOURS, OTHER, frame, legend, new_axes


def plot_proof(steps: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw predicted against measured steps with their intervals, and return the Axes.

    Parameters
    ----------
    steps : DataFrame
        ``case``, ``measured_s``, ``predicted_s``, ``low_s``, ``high_s``: a row per step.
    ax : Axes, optional
    """
    ax = new_axes(ax, 6.5, 5.5)
    reach = np.array([0.0, 1.15 * max(steps["measured_s"].max(), steps["high_s"].max())])
    ax.fill_between(reach, 0.9 * reach, 1.1 * reach, color="0.92", label="within 10 %")
    ax.plot(reach, reach, color="0.6", linewidth=1, label="predicted = measured")
    bars = [steps["predicted_s"] - steps["low_s"], steps["high_s"] - steps["predicted_s"]]
    look = {"fmt": "o", "color": COLOURS["best plan"], "ecolor": "0.5", "capsize": 3}
    ax.errorbar(steps["measured_s"], steps["predicted_s"], yerr=bars, label="steps, 90 % interval", **look)
    for row in steps.itertuples():
        ax.annotate(row.case, (row.measured_s, row.predicted_s), xytext=(6, -10), textcoords="offset points", fontsize=8)
    ax.set_xlim(*reach)
    ax.set_ylim(*reach)
    error = (steps["predicted_s"] / steps["measured_s"] - 1).abs()
    frame(ax, f"{len(steps)} steps: mean error {error.mean():.1%}, largest {error.max():.1%}", "measured (s)", "predicted (s)")
    legend(ax, ax.get_legend_handles_labels()[0], beside=False)
    return ax


def plot_roofline(rows: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the FLOP/s of products over their FLOP per byte, under what memory and arithmetic allow, and return the Axes.

    Parameters
    ----------
    rows : DataFrame
        The raw table of a calibration: the single products and copies in it are drawn.
    ax : Axes, optional
    """
    single = rows[rows["part"] == "single"].assign(rate=lambda t: t["flop"] / t["seconds"], dense=lambda t: t["flop"] / t["bytes"])
    products = single[single["name"].isin(["product.bf16", "product.fp32", "grouped.bf16"])]
    copy = single[single["name"] == "copy"]
    stream, peak = float((copy["bytes"] / copy["seconds"]).max()), float(products["rate"].max())
    ax = new_axes(ax, 8.0, 4.5)
    reach = np.geomspace(1.0, 2 * products["dense"].max(), 50)
    ax.plot(reach, np.minimum(peak, stream * reach) / 1e9, color="0.4", label=f"roof: {stream / 1e9:.0f} GB/s, {peak / 1e9:.0f} GFLOP/s")
    colours = (COLOURS["compute: gemm"], COLOURS["compute: memory"], COLOURS["compute: grouped_gemm"])
    for (name, part), colour in zip(products.groupby("name"), colours, strict=False):
        ax.scatter(part["dense"], part["rate"] / 1e9, color=colour, label=str(name))
    ax.set_xscale("log")
    ax.set_yscale("log")
    frame(ax, "Roofline of one rank while the others do the same", "FLOP per byte", "GFLOP/s")
    legend(ax, ax.get_legend_handles_labels()[0])
    return ax


def plot_collectives(rows: pd.DataFrame, predicted: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the time of each collective by size, measured in a step (dots) and by itself (rings) and fitted (lines); return the Axes.

    Parameters
    ----------
    rows : DataFrame
        The raw table of a calibration.
    predicted : DataFrame
        ``name``, ``bytes``, ``seconds`` on a fine grid.
    ax : Axes, optional
    """
    ax = new_axes(ax, 9.0, 4.5)
    alone = rows[rows["part"] == "collective"]
    inside = rows[(rows["part"] == "together") & rows["name"].isin(alone["name"]) & (rows["bytes"] >= 1e3)]  # not the sums of one number
    palette = [COLOURS[k] for k in ("exposed: tp", "exposed: ep", "exposed: pp", "exposed: dp", "compute: gemm", "compute: attention")]
    handles = []
    for (name, part), colour in zip(alone.groupby("name", sort=False), palette, strict=False):
        ax.scatter(part["bytes"], part["seconds"] * 1e3, edgecolors=colour, facecolors="none", linewidths=0.8, s=14)
        part = inside[inside["name"] == name]
        handles.append(ax.scatter(part["bytes"], part["seconds"] * 1e3, color=colour, s=14, label=str(name)))
        line = predicted[predicted["name"] == name]
        ax.plot(line["bytes"], line["seconds"] * 1e3, color=colour, linewidth=1)
    ax.set_xscale("log")
    ax.set_yscale("log")
    frame(ax, "Collectives: measured in a step (dots), by themselves (rings), fitted (lines)", "bytes", "ms")
    legend(ax, handles)
    return ax


def plot_fits(residuals: dict[str, float], ax: Axes | None = None) -> Axes:
    """Draw how far each fitted cost is from its rows, and return the Axes.

    Parameters
    ----------
    residuals : dict
        Root mean square of predicted over measured less one, by cost.
    ax : Axes, optional
    """
    table = pd.Series(residuals).sort_values()
    ax = new_axes(ax, 8.0, 1.2 + 0.24 * len(table))
    talk = table.index.str.count(r"\.") == 2
    ax.barh(table.index, 100 * table, color=np.where(talk, COLOURS["exposed: ep"], COLOURS["compute: gemm"]), height=0.75)
    ax.set_xlim(0, max(1.0, 110 * table.max()))
    ax.margins(y=0.01)
    frame(ax, "Residual of each fitted cost (collectives in red)", "root mean square, % of the measured time")
    return ax


def plot_parts(parts: pd.DataFrame, case: str, ax: Axes | None = None) -> Axes:
    """Draw measured and predicted seconds of one step by kind of operation, and return the Axes.

    Parameters
    ----------
    parts : DataFrame
        ``case``, ``part``, ``measured_s``, ``predicted_s``.
    case : str
        Which step.
    ax : Axes, optional
    """
    table = parts[(parts["case"] == case) & (parts[["measured_s", "predicted_s"]].max(axis=1) > 0)]
    ax = new_axes(ax, 8.0, 3.6)
    place = np.arange(len(table))
    bars = [
        ax.bar(place - 0.2, table["measured_s"] * 1e3, width=0.4, color=OTHER, label="measured"),
        ax.bar(place + 0.2, table["predicted_s"] * 1e3, width=0.4, color=COLOURS["best plan"], label="predicted"),
    ]
    ax.set_xticks(place, table["part"].str.replace("[_ ]", "\n", n=1, regex=True))
    frame(ax, f"{case}: where the step goes, mean over ranks", "", "ms")
    legend(ax, bars)
    return ax
