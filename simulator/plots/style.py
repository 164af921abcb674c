"""Colours, words and frames that all pictures share."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes

from simulator.results.step import StepResult

#: colour of everything drawn, kept apart by all common kinds of colour blindness (after Paul Tol's "muted" and "light" schemes)
COLOURS = {
    "forward": "#88CCEE",
    "backward": "#33629B",
    "input gradient": "#44AA99",
    "weight gradient": "#DDCC77",
    "optimizer": "#117733",
    "exposed communication": "#CC6677",
    "compute: gemm": "#332288",
    "compute: grouped_gemm": "#88CCEE",
    "compute: attention": "#44AA99",
    "compute: memory": "#117733",
    "compute: recompute": "#999933",
    "compute: host": "#EE8866",
    "compute: optimizer": "#DDCC77",
    "exposed: tp": "#AA4499",
    "exposed: cp": "#FFAABB",
    "exposed: ep": "#CC6677",
    "exposed: pp": "#EE8866",
    "exposed: dp": "#882255",
    "idle": "#DDDDDD",
    "weights": "#332288",
    "gradients": "#88CCEE",
    "optimizer state": "#117733",
    "activations": "#DDCC77",
    "buffers": "#CC6677",
    "fragmentation": "#DDDDDD",
    "communication": "#AA4499",
    "context": "#333333",
    "capacity": "#882255",
    "plan": "#44AA99",
    "best plan": "#882255",
}
#: colour of what has no entry of its own
OTHER = "#777777"
#: what the parts of a breakdown are, for readers who meet the axes' names for the first time
WORDS = {
    "compute: gemm": "compute: matrix products",
    "compute: grouped_gemm": "compute: expert matrix products",
    "compute: memory": "compute: memory-bound kernels",
    "compute: host": "waiting for the host to launch kernels",
    "exposed: tp": "exposed: tensor parallel (tp)",
    "exposed: cp": "exposed: context parallel (cp)",
    "exposed: ep": "exposed: expert all-to-all (ep)",
    "exposed: pp": "exposed: pipeline sends (pp)",
    "exposed: dp": "exposed: data parallel (dp)",
    "idle": "idle: bubble and waiting",
}


def new_axes(ax: Axes | None, width: float, height: float) -> Axes:
    """Return `ax`, or the Axes of a new figure of that many inches."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def frame(ax: Axes, title: str, x: str, y: str = "") -> None:
    """Write title and axis labels, and take away the lines that bound nothing."""
    ax.set_title(title, loc="left")
    ax.set_xlabel(x, loc="center" if y else "left")
    ax.set_ylabel(y)
    ax.spines[["top", "right"]].set_visible(False)


def every(count: int, inches: float, points: float) -> int:
    """Return every how many of `count` labels to write so that each has `points` of room along `inches`."""
    return max(1, math.ceil(count * points / 72 / inches))


def legend(ax: Axes, handles: list, beside: bool = True, **kwargs: Any) -> None:
    """Put the legend where no data is: right of the axes, or under their right corner."""
    right = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0}
    place = right if beside else {"loc": "upper right", "bbox_to_anchor": (1.0, 0.0), "borderaxespad": 1.9}
    ax.legend(handles=handles, frameon=False, **place, **kwargs)


def headline(result: StepResult) -> str:
    """Return model, machine and step time as a title."""
    s = result.scenario
    return f"{s.model.name} on {s.cluster.accelerators:,} x {s.cluster.accelerator.name}: {readable_s(result.step_time_s)} per step"


def unit_of(seconds: float) -> tuple[str, float]:
    """Return the unit of an axis as long as `seconds`, and how many of it are a second."""
    return ("ms", 1e3) if seconds < 1 else ("s", 1.0)


def readable_s(seconds: float) -> str:
    """Return seconds as text; differences that are rounding errors as zero."""
    if seconds >= 1 or seconds < 1e-9:
        return f"{max(seconds, 0.0):.2f} s"
    return f"{1e3 * seconds:.3g} ms"


def percent(share: float) -> str:
    """Return a share as text that tells little from nothing."""
    return "< 0.1%" if 1e-9 < share < 0.0005 else f"{max(share, 0.0):.1%}"
