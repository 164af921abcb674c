"""Predictions against measurements: the scatter with its identity line, and residuals by feature."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simulator.plots.style import frame, new_axes

#: colour and marker by architecture, completeness
_STYLES = {
    ("moe", "yes"): ("#882255", "o", "MoE, complete"),
    ("moe", "partial"): ("#CC6677", "^", "MoE, partial"),
    ("dense", "yes"): ("#33629B", "o", "dense, complete"),
    ("dense", "partial"): ("#88CCEE", "^", "dense, partial"),
}
#: features whose residuals are drawn: column -> label
_FEATURES = {
    "accelerator": "accelerator",
    "precision": "precision of the matrix products",
    "recompute": "recompute",
    "accelerators": "accelerators",
    "tokens": "tokens per micro-batch and rank",
    "hidden": "hidden width",
    "tp": "tensor parallel",
    "pp": "pipeline parallel",
    "ep": "expert parallel",
}


def plot_accuracy(rows: pd.DataFrame, figure: Figure | None = None) -> Axes:
    """Draw predicted over measured step times on logarithmic axes with the identity line and a band of 20 %, and return the Axes.

    Parameters
    ----------
    rows : DataFrame
        ``rows`` of a `simulator.validation.report.Report`.
    figure : Figure, optional
    """
    ax = new_axes(None, 7, 6.5) if figure is None else figure.subplots()
    ends = np.array([rows[["measured_s", "predicted_s"]].min().min() * 0.8, rows[["measured_s", "predicted_s"]].max().max() * 1.25])
    ax.fill_between(ends, ends / 1.2, ends * 1.2, color="#EEEEEE", zorder=0, label="within 20 %")
    ax.plot(ends, ends, color="#777777", linewidth=1, zorder=1)
    for (arch, complete), (colour, marker, label) in reversed(_STYLES.items()):
        some = rows[(rows["arch"] == arch) & ((rows["complete"] == "yes") == (complete == "yes"))]
        if len(some):
            ax.scatter(
                some["measured_s"], some["predicted_s"], s=14, color=colour, marker=marker, alpha=0.6, linewidths=0,
                label=f"{label} ({len(some):,})",
            )  # fmt: skip
    ax.set(xscale="log", yscale="log", xlim=ends, ylim=ends)
    frame(ax, "Predicted and measured steps, cold", "measured step (s)", "predicted step (s)")
    ax.legend(frameon=False, loc="upper left")
    return ax


def plot_residuals(rows: pd.DataFrame, figure: Figure | None = None) -> Figure:
    """Draw predicted over measured by feature, median and middle 80 % of the rows of each value, and return the Figure.

    Parameters
    ----------
    rows : DataFrame
        ``rows`` of a `simulator.validation.report.Report`.
    figure : Figure, optional
    """
    if figure is None:
        import matplotlib.pyplot as plt

        figure = plt.figure(figsize=(12, 7), layout="constrained")
    for ax, (column, label) in zip(figure.subplots(3, 3, sharey=True).flat, _FEATURES.items(), strict=True):
        values = rows[column]
        if values.dtype.kind in "if":
            values = 2.0 ** np.floor(np.log2(values) + 0.5)  # by powers of two
        groups = sorted(((value, some) for value, some in rows["residual"].groupby(values)), key=lambda pair: pair[0])
        ratio = [np.exp(np.quantile(some, [0.1, 0.5, 0.9])) for _, some in groups]
        low, middle, high = np.array(ratio).T
        place = np.arange(len(groups))
        ax.axhline(1.0, color="#777777", linewidth=1)
        ax.vlines(place, low, high, color="#88CCEE", linewidth=5)
        ax.plot(place, middle, "o", color="#33629B", markersize=4)
        names = [f"{value:g}" if isinstance(value, float) else str(value) for value, _ in groups]
        crowded = max(map(len, names)) * len(names) > 40
        ax.set_xticks(place, names, rotation=35 if crowded else 0, ha="right" if crowded else "center", fontsize=7)
        ax.set_yscale("log")
        ax.set_yticks([0.25, 0.5, 1, 2], ["1/4", "1/2", "1", "2"])
        ax.minorticks_off()
        frame(ax, "", label)
    figure.supylabel("predicted / measured")
    return figure
